"""The page about a run: from real logs, opened in a real browser."""

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_localsgd import DiLoCo, LocalSGDMonitor, LocalSGDStrategy, PostLocal, report
from tests.models import loader, trainer
from tests.shell import COMMAND, QUIET, ROOT, ok
from tests.test_monitor import Logs, installed
from tests.workers import run_workers

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
TITLES = [
    "Loss", "Period: steps in a round", "Drift of the replicas, and of each worker",
    "Drift over the movement of the mean", "Share of the time blocked by averages", "Sent by each worker so far",
    "Cosine of the workers' updates", "Noise of the workers' updates",
]  # fmt: skip


def train(folder, kinds, steps):
    loggers = [CSVLogger(folder, name="", version="csv")]
    if "tensorboard" in kinds:
        loggers.append(TensorBoardLogger(folder, name="", version="tensorboard"))
    strategy = LocalSGDStrategy(PostLocal(4, then=3), outer=DiLoCo())
    run = trainer(2, strategy, callbacks=[LocalSGDMonitor(anchor=True)], logger=loggers, log_every_n_steps=1)
    run.fit(Logs(), loader([steps, steps]))


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs")
    kinds = ["csv", "tensorboard"] if installed("tensorboard") else ["csv"]
    run_workers(train, 2, str(folder), kinds, 16)
    return folder


class Reader(HTMLParser):
    """Collects what a page has and whether its tags are in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.words, self.addresses = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_needs_nothing_beside_itself(logs, capsys):
    report.main([str(logs / "csv")])
    path = logs / "csv" / "report.html"
    assert capsys.readouterr().out == f"written: {path}\n"
    page = Reader(path.read_text())
    assert page.addresses == []
    assert "script" not in page.seen
    assert "default-src 'none'" in path.read_text()
    assert [word for word in page.words if word in TITLES] == TITLES
    assert page.seen.count("svg") == len(TITLES)
    for words in ("steps that averaged gradients", "4, of 3 steps", "drift of the replicas", "drift", "each worker"):
        assert words in page.words


@pytest.mark.skipif(not installed("tensorboard"), reason="needs the package `tensorboard`")
def test_the_same_from_event_files(logs, tmp_path):
    ours = report.read(logs / "csv")
    theirs = report.read(logs / "tensorboard")
    for name, points in ours.items():
        assert [step for step, _ in points] == [step for step, _ in theirs[name]]
        assert [value for _, value in points] == pytest.approx([value for _, value in theirs[name]], rel=1e-6)


def test_event_files_without_the_package(tmp_path, monkeypatch):
    (tmp_path / "events.out.tfevents.1").touch()
    monkeypatch.setitem(sys.modules, "tensorboard.backend.event_processing.event_accumulator", None)
    with pytest.raises(ValueError, match="need the package `tensorboard` to be read"):
        report.read(tmp_path)


def test_a_run_that_has_not_ended(logs):
    series = {name: points for name, points in report.read(logs / "csv").items() if "/total/" not in name}
    assert "The run has written no totals" in report.page("run", series)


def test_names_are_no_markup(logs):
    series = report.read(logs / "csv") | {"<b>loss": [(0.0, 1.0), (1.0, float("nan")), (2.0, 1.0)]}
    page = Reader(report.page("<i>run", series))
    assert "<b>loss" in page.words
    assert "b" not in page.seen


def test_what_was_sent_so_far():
    series = {"localsgd/round": [(0, 1), (5, 3), (9, 4)], "localsgd/bytes_sent": [(0, 10.0), (5, 4.0), (9, 2.0)]}
    assert report.so_far(series, "bytes_sent") == [(0, 10), (5, 18), (9, 20)]


def test_a_curve_of_many_points_keeps_its_mean_and_its_span():
    thin = report._thinned([(step, step % 2) for step in range(10_000)])
    assert len(thin) == 400
    assert all(value == pytest.approx(0.5, abs=0.03) for _, value in thin)
    assert thin[0][0] < 25
    assert thin[-1][0] > 9975


def test_what_is_no_run(tmp_path, capsys):
    def told(*words):
        with pytest.raises(SystemExit) as end:
            report.main([str(word) for word in words])
        assert end.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    prefix = "lightning-localsgd report: error: "
    assert told(tmp_path / "no") == f"{prefix}The run must be a folder of logs, got {str(tmp_path / 'no')!r}."
    nothing = f"{prefix}There must be a metrics.csv or event files of TensorBoard in {str(tmp_path)!r}, and none is"
    assert told(tmp_path) == f"{nothing}."
    (tmp_path / "version_0").mkdir()
    (tmp_path / "version_0" / "metrics.csv").write_text("step,loss\n0,1.5\n")
    assert told(tmp_path) == f"{nothing}: try {tmp_path / 'version_0'}."
    assert "There must be metrics of `LocalSGDMonitor`" in told(tmp_path / "version_0")


def test_from_yaml_to_the_page(tmp_path):
    monitor = {"class_path": "lightning_localsgd.LocalSGDMonitor", "init_args": {"anchor": True}}
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path), "name": "", "version": "run"}}
    few = {"max_epochs": 1, "limit_train_batches": 16, "log_every_n_steps": 1}
    (tmp_path / "more.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [monitor], "logger": logger} | few}))
    configs = ["--config", ROOT / "configs" / "digits.yaml", "--config", tmp_path / "more.yaml"]
    printed = ok(COMMAND, "fit", *configs, f"--trainer.default_root_dir={tmp_path}", *QUIET)
    assert "rounds that averaged models" in printed
    assert ok(COMMAND, "report", tmp_path / "run", "--output", tmp_path / "page.html").startswith("written: ")
    assert "drift of the replicas" in Reader((tmp_path / "page.html").read_text()).words
    assert "`lightning-localsgd report --help`" in re.sub(r"\s+", " ", ok(COMMAND, "--help"))


# ------------------------------------------------------------------------------------------------------- in a browser


def browse(page, *options, timeout=120):
    """Return what a real browser says of a page, its console's messages apart."""
    command = [BROWSER, "--headless", "--disable-gpu", "--no-first-run", f"--user-data-dir={page.parent / 'profile'}"]
    if os.geteuid() == 0:
        command.append("--no-sandbox")  # which it asks for
    command += ["--enable-logging=stderr", "--hide-scrollbars", "--window-size=1200,1500", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium")
def test_a_browser_shows_it(logs, tmp_path):
    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    report.main([str(logs / "csv"), "--output", str(page)])
    _, told = browse(page, f"--screenshot={picture}")
    assert told == []
    image = pytest.importorskip("PIL.Image").open(picture).convert("RGB")
    assert image.size == (1200, 1500)
    colours = {colour: count for count, colour in image.getcolors(maxcolors=1 << 24)}
    # The curves' two colours, the ink, and a page that is empty for the most part but not all over.
    assert colours[(0x2A, 0x6F, 0xDB)] > 500
    assert colours[(0xD9, 0x66, 0x1F)] > 50
    assert 0.8 < colours[(0xFC, 0xFC, 0xFB)] / (1200 * 1500) < 0.99
    shown, told = browse(page, "--dump-dom")
    assert told == []
    assert shown.count("<polyline") >= len(TITLES)


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium")
def test_a_browser_would_tell_of_an_error(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<!doctype html><script>nothing.here</script>")
    _, told = browse(page, "--dump-dom")
    assert any("nothing is not defined" in line for line in told)
