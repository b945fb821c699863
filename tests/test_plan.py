"""Which setting to take: the arithmetic by hand, and real runs that are measured and leave nothing behind."""

import os
import re
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule

from lightning_localsgd import DiLoCo, Mean, measuring
from lightning_localsgd.measuring import Run, check, completed, measure, solved
from lightning_localsgd.plan import (
    WIRES,
    Costs,
    Setting,
    as_yaml,
    bars,
    bits,
    doubt,
    free,
    from_numbers,
    limits,
    main,
    recommended,
    seconds,
    settings,
    shortest_delay,
    show,
)  # fmt: skip
from tests.models import Regression, loader
from tests.shell import COMMAND, ROOT, ok
from tests.workers import Raised, run_workers

DIGITS = ROOT / "configs" / "digits.yaml"
NUMBERS = ["--workers", "4", "--parameters", "1e6", "--step-seconds", "0.01", "--mbit", "80"]
# A step of 1 s on the slower one of two workers; averages of 4 s and 1 s, of which 0.5 and 0.25 cannot be hidden.
COSTS = Costs((1.0, 0.8), 6.0, {"float32": 4.0, "int8": 1.0}, {"float32": 0.5, "int8": 0.25})
TRAINER = [
    "--seed_everything=0",
    "--trainer.accelerator=cpu",
    "--trainer.devices=2",
    "--trainer.use_distributed_sampler=false",
]


@pytest.fixture
def at_root(monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of what Lightning calls
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))


# ------------------------------------------------------------------------------------------------------- the arithmetic


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (Setting(1), 6.0),
        (Setting(8), 1 + 4 / 8),
        (Setting(8, "int8"), 1 + 1 / 8),
        (Setting(8, "float32", 2), 1 + (4 - 2) / 8),
        (Setting(8, "float32", 4), 1 + 0.5 / 8),
        (Setting(2, "float32", 2), 1 + (4 - 2) / 2),
    ],
)
def test_what_a_step_takes(setting, expected):
    assert seconds(COSTS, setting) == pytest.approx(expected)


def test_a_delay_is_a_fifth_longer_than_what_it_hides_and_at_most_the_period():
    assert shortest_delay(COSTS, 8, "float32") == 5  # 1.2 * (4 - 0.5) = 4.2
    assert shortest_delay(COSTS, 4, "float32") == 4
    assert shortest_delay(COSTS, 8, "int8") == 1
    assert shortest_delay(Costs((1.0,), 6.0, {"int8": 1.0}, {"int8": 1.1}), 8, "int8") == 0  # gains nothing
    assert shortest_delay(Costs((1.0,), 6.0, {"int8": 1.0}, {}), 8, "int8") == 0


def test_all_periods_are_compared_with_and_without_a_delay():
    found = settings(COSTS)
    assert len(found) == len(set(found)) == 1 + 9 * 2 * 2
    assert {setting.period for setting in found} == {1, 2, 4, 8, 16, 32, 64, 128, 256, 512}
    assert all(setting.delay <= setting.period for setting in found)


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        (Costs((1.0,), 1.02, {"float32": 4.0}, {}), Setting(1)),
        (Costs((1.0,), 1.2, {"float32": 1.0}, {}), Setting(64)),  # 32 has 97.2 % of the speed of 512, and 64 has 98.7 %
        (Costs((1.0,), 9.0, {"float32": 1.0, "int8": 1.0}, {"float32": 0.0, "int8": 0.0}), Setting(2, "float32", 2)),
        (Costs((1.0,), 9.0, {"float32": 0.03, "int8": 0.01}, {"float32": 0.0, "int8": 0.0}), Setting(2)),
        (Costs((1.0,), 9.0, {"float32": 1.0, "int8": 0.03}, {"float32": 0.0}), Setting(2, "int8")),
    ],
)
def test_the_shortest_period_that_is_fast_enough_is_recommended(costs, expected):
    assert recommended(costs) == expected
    fastest = min(seconds(costs, setting) for setting in settings(costs))
    assert fastest / seconds(costs, recommended(costs)) >= 0.98


def test_the_costs_by_numbers():
    costs = from_numbers(workers=4, parameters=1e6, step_seconds=0.01, mbit=80, latency_ms=0.5)
    latency = 4 * 3 * 0.5e-3
    assert costs.steps == (0.01,) * 4
    assert costs.blocking["float32"] == pytest.approx(1.5 * 32e6 / 80e6 + latency)
    assert costs.blocking["int4"] == pytest.approx(1.5 * 1e6 * (4 + 16 / 64) / 80e6 + latency)
    assert costs.ddp == pytest.approx(0.01 / 3 + costs.blocking["float32"])
    assert from_numbers(2, 1e3, 0.01, 1000).ddp == pytest.approx(0.01)  # beside the backward pass
    assert [bits(wire) for wire in WIRES] == [32, 16, 16 + 16 / 512, 8 + 16 / 128, 4 + 16 / 64]


def test_what_limits():
    network = Costs((1.0, 1.0), 9.0, {"float32": 8.0}, {})
    assert limits(network, Setting(8)).startswith("Limited by the network: averages take 50% of the time. DDP would ")
    slower = limits(Costs((1.0, 2.0), 2.0, {"float32": 0.02}, {}), Setting(8))
    assert slower.startswith(
        "Limited by the slowest worker: averages take 0% of the time; workers wait 25% of the time"
    )
    assert "for rank 1, whose step takes 1.33 times the mean" in slower
    assert limits(Costs((1.0, 1.0), 1.0, {"float32": 0.02}, {}), Setting(8)).startswith("Limited by the step itself: ")
    assert "as long as 8 steps" in limits(network, Setting(8))


def test_the_plot_of_words():
    lines = bars(Costs((1.0,), 2.0, {"float32": 2.0, "int8": 1.0}, {"float32": 0.0, "int8": 0.0}), width=100)
    assert len(lines) == 2 + 10 + 1
    assert lines[2].count("█") == 50
    assert [lines[3].count(mark) for mark in "█▓░"] == [50, 67 - 50, 100 - 67]  # 1 / 2, 1 / 1.5, and all of it hidden


# ---------------------------------------------------------------------------------------------------- numbers, as typed


def call(capsys, *words):
    main([str(word) for word in words])
    return capsys.readouterr().out


def block(printed):
    return re.search(r"^trainer:\n(?:  .*\n)+", printed, re.MULTILINE)[0]


def test_numbers_are_planned_with_a_picture_that_replaces_no_file(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.png").write_text("mine")
    printed = call(capsys, *NUMBERS)
    assert "4 workers; steps/s of each worker, which without averages are 100" in printed
    assert printed.endswith("written: plan-1.png\n")
    assert (tmp_path / "plan.png").read_text() == "mine"
    assert (tmp_path / "plan-1.png").read_bytes().startswith(b"\x89PNG")
    best = recommended(from_numbers(4, 1e6, 0.01, 80))
    found = yaml.safe_load(block(printed))["trainer"]["strategy"]["init_args"]
    assert found == {"period": best.period, "mean": {"wire": best.wire, "delay": best.delay}}
    assert f"Recommended: {best}, " in printed
    assert call(capsys, *NUMBERS, "--no-picture", "--latency-ms", 1).count("written") == 0
    assert sorted(os.listdir(tmp_path)) == ["plan-1.png", "plan.png"]
    assert free(tmp_path / "plan.png") == tmp_path / "plan-2.png"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "Give a run to measure, as `--config run.yaml`, or `--workers`"),
        (NUMBERS[2:], "all of the numbers are needed, and --workers is missing"),
        (NUMBERS[:4], "all of the numbers are needed, and --step-seconds, --mbit is missing"),
        (
            [*NUMBERS, "--workers", "1"],
            "`workers` must be an int of at least 2: one worker has nothing to average, got",
        ),
        ([*NUMBERS, "--parameters", "0"], "`parameters` must be a number above 0, got 0.0"),
        ([*NUMBERS, "--step-seconds", "nan"], "`step-seconds` must be a number above 0, got nan"),
        ([*NUMBERS, "--mbit", "-1"], "`mbit` must be a number above 0, got -1.0"),
        ([*NUMBERS, "--latency-ms", "-1"], "`latency-ms` must be a number of at least 0, got -1.0"),
        ([*NUMBERS, "--seconds", "5"], "With numbers given nothing is measured, and `--seconds` has no effect"),
        ([*NUMBERS, "--config", "run.yaml"], "With numbers given nothing is measured, and `--config` has no effect"),
        ([*NUMBERS, "--trainer.devices=3"], "nothing is measured, and `--trainer.devices=3` has no effect"),
        (
            [*NUMBERS, "--no-picture", "--picture", "a.png"],
            "`--picture` has no effect with `--no-picture`, got",
        ),
        ([*NUMBERS, "--picture", "nowhere/a.png"], "`--picture` must be in a folder that exists, got 'nowhere/a.png'"),
        (["--config", DIGITS, "--seconds", "0"], "`--seconds` must be a number above 0, got 0.0"),
        (
            ["--config", DIGITS, "--trainer.devices=1"],
            "`plan` needs at least 2 workers, since one has nothing to",
        ),
        (
            ["--config", DIGITS, "--trainer.strategy.replica=node"],
            "`plan` needs at least 2 workers, since one has nothing to",
        ),
        (
            ["--config", DIGITS, "--trainer.strategy.pace=proportional"],
            '`plan` needs the `pace` "equal", got Proportional',
        ),
    ],
)
def test_what_is_refused(capsys, at_root, words, error):
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    assert end.value.code == 2
    assert error in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("package", "words"), [("rich", ["--no-picture"]), ("matplotlib", [])])
def test_what_is_not_installed_is_named(capsys, monkeypatch, package, words):
    monkeypatch.setattr("lightning_localsgd.plan.find_spec", lambda name: None if name == package else object())
    with pytest.raises(SystemExit):
        main([*NUMBERS, *words])
    assert f"`plan` needs the package {package}: pip install 'lightning-localsgd[plan]'" in capsys.readouterr().err


@pytest.mark.parametrize("setting", [Setting(1), Setting(16), Setting(8, "int4", 8)], ids=str)
def test_the_block_is_ready_to_paste(at_root, tmp_path, setting):
    path = tmp_path / "plan.yaml"
    path.write_text(as_yaml(setting))
    strategy = Run(["--config", str(DIGITS), "--config", str(path)]).trainer.strategy
    assert strategy.schedule.period == setting.period
    assert strategy.mean == Mean(wire=setting.wire, delay=setting.delay)


# ------------------------------------------------------------------------------------------------------------- measured


def test_each_fit_has_the_strategy_of_the_user_but_for_its_period_and_mean(at_root):
    given = ["--trainer.strategy.outer=DiLoCo", "--trainer.strategy.mean.wire=int8"]
    given += ["--trainer.strategy.mean.rounding=stochastic", "--trainer.strategy.mean.bucket_mb=3"]
    given += ["--trainer.strategy.process_group_backend=gloo"]
    of = Run(["--config", str(DIGITS), *given])
    one, plain, ddp = of.strategy(4, "int4", 3), of.strategy(4), of.strategy(1)
    assert one.mean == Mean(3, wire="int4", delay=3, rounding="stochastic")
    assert plain.mean == ddp.mean == Mean(3)
    assert one.outer == plain.outer == DiLoCo()
    assert ddp.outer is None
    assert ddp.process_group_backend == one.process_group_backend == "gloo"
    assert of.may_delay
    assert not Run(["--config", str(DIGITS), "--trainer.strategy.optimizer_state=average"]).may_delay
    assert Run(["--config", str(DIGITS), "--trainer.strategy=ddp"]).strategy(8, "int8").mean == Mean(wire="int8")


def test_costs_follow_from_what_was_measured():
    seen = [measuring._Seen(1.0, own, 0.0, 0.0) for own in (0.5, 1.0)]
    found = {("float32", False): (4, 3.0), ("int8", False): (4, 1.5), ("float32", True): (10, 1.25)}
    costs = solved(seen, 2.0, found)
    assert costs == Costs((0.5, 1.0), 2.0, {"float32": 8.0, "int8": 2.0}, {"float32": 2.5})
    doubtful = solved(seen, 0.8, found)
    assert doubtful.steps == (0.4, 0.8)  # nothing is faster than a step alone
    assert doubtful.noise == pytest.approx(0.25)
    assert doubt(doubtful).startswith("steps without averages were 25% slower than some with them")
    whole = completed(costs, may_delay=True)
    assert list(whole.blocking) == list(whole.hidden) == list(WIRES)
    assert whole.blocking["bfloat16"] == pytest.approx(2.0 * 16 / 8.125)  # nearer in bits than float32
    assert whole.blocking["int4"] == pytest.approx(2.0 * 4.25 / 8.125)
    assert whole.hidden["int8"] == pytest.approx(2.5 * 8.125 / 32)
    assert whole.scaled == {"bfloat16", "float16", "int8", "int4"}
    assert completed(costs, may_delay=False).hidden == {}


class Slower:
    """A bench on which two of the settings, not known before, are slower than computed."""

    def __init__(self, rounds):
        self.rounds = rounds  # for which there is time
        self.said = []
        self.measured = []

    def repeats(self, each, least, most):
        return least

    def has(self, seconds):
        self.rounds -= 1
        return self.rounds >= 0

    def measure(self, period, first, last, wire, delay):
        assert (first, last) == (2 * period, 4 * period)
        self.measured.append(Setting(period, wire, delay))
        slow = 1.5 if period <= 4 else 1.04
        return [measuring._Seen(value, 0.0, 0.0, 0.0) for value in (1.0, slow * seconds(self.costs, self.measured[-1]))]

    def say(self, words):
        self.said.append(words)


@pytest.mark.parametrize(("rounds", "periods"), [(9, [2, 4, 8]), (1, [2]), (0, [])])
def test_what_is_recommended_is_measured_itself_and_left_where_it_is_slower_than_computed(rounds, periods):
    bench = Slower(rounds)
    bench.costs = costs = Costs((1.0,), 9.0, {"float32": 1.5}, {"float32": 0.0})
    found = check(costs, bench, overhead=1.0)
    assert [setting.period for setting in bench.measured] == periods
    assert list(found.checked) == bench.measured
    assert bench.said[:1] == ["period 2, float32, delay 2: 1500 ms a step, 1000 ms expected"][:rounds]
    assert recommended(found).period == {9: 8, 1: 4, 0: 2}[rounds]
    slow = Setting(2, "float32", 2)
    assert seconds(found, slow) == (1.5 if rounds else 1.0)
    assert seconds(found, Setting(8, "float32", 2)) == 1.0  # within 5 % of it


def test_of_a_checked_setting_the_measured_speed_is_told(capsys):
    best = recommended(COSTS)
    for costs, told in ((COSTS, 0), (replace(COSTS, checked={best: 1.03}), 1)):
        show(costs)
        assert capsys.readouterr().out.count("steps/s; measured: 0.971\n") == told


def test_numbers_that_contradict_each_other_are_doubted(capsys):
    for noise, is_doubted in ((0.09, False), (0.11, True)):
        show(replace(COSTS, noise=noise))
        assert ("Beware: steps without averages" in capsys.readouterr().out) == is_doubted


def test_digits_are_measured(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(DIGITS.read_text())
    before = set(os.listdir(tmp_path))
    words = ["plan", "--config", config, "--seconds", "3", "--trainer.callbacks+=LearningRateMonitor"]
    printed = ok("env", f"PYTHONPATH={ROOT}", COMMAND, *words, cwd=tmp_path)
    assert "2 workers; steps/s" in printed
    assert printed.count("Recommended: ") == printed.count("Limited by ") == 1  # of rank 0 alone
    assert re.search(r"a step of DDP: [\d.]+ ms\nan average in float32 costs [\d.]+ ms", printed)
    assert set(os.listdir(tmp_path)) - before == {"plan.png"}
    assert yaml.safe_load(block(printed))["trainer"]["strategy"]["init_args"]["period"] >= 1


class Data(LightningDataModule):
    def __init__(self, lengths: list[int]):
        super().__init__()
        self.lengths = lengths

    def train_dataloader(self):
        return loader(self.lengths)

    def val_dataloader(self):
        raise AssertionError("nothing is validated")


class Watched(Regression):
    """Needs a logger, the length of the run, and what a validation finds."""

    def training_step(self, batch, batch_idx):
        self.logger.experiment.add_scalar("a", 1)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches == 24
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return [optimizer], [{"scheduler": scheduler, "monitor": "val_loss"}]


class Twice(Regression):
    """Steps two optimizers by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=lr, momentum=0.9) for lr in (0.01, 0.02)]


def measured(fits, *cases):
    measuring._FITS = fits
    os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"  # of what Lightning calls
    os.chdir(ROOT)
    found = []
    for module, lengths, duration, *words in cases:
        said = []
        of = Run(
            [
                f"--model=tests.test_plan.{module}",
                "--data=tests.test_plan.Data",
                f"--data.lengths={lengths}",
                *TRAINER,
                *words,
            ]
        )
        found.append((measure(of, duration, said.append), said))
    return found


def test_all_is_measured_where_there_is_time_and_all_ranks_know_the_same():
    many = run_workers(
        measured, 2, 10_000,
        ("Watched", [12, 12], 600, "--trainer.max_steps=24", "--trainer.strategy.outer=DiLoCo"),
        ("Twice", [50, 50], 600, "--trainer.strategy.optimizer_state=average"),
        ("Twice", [50, 50], 1e-6),
    )  # fmt: skip
    for one, other in zip(*many, strict=True):
        assert one[0] == other[0]
        assert other[1] == []  # rank 0 alone tells
    (full, said), (no_delay, _), (short, told) = many[0]
    assert full.scaled == no_delay.scaled == set()
    assert len(said) == 2 + 10 + len(full.checked)
    assert recommended(full).period == 1 or recommended(full) in full.checked
    assert set(full.hidden) == set(no_delay.blocking) == set(WIRES)
    assert no_delay.hidden == {}
    assert len(told) == 3  # a step, DDP, and float32, however little time there is
    assert short.scaled == set(WIRES)
    for costs in (full, no_delay, short):
        assert len(costs.steps) == 2
        assert 0 < costs.step <= costs.ddp
        assert min(costs.blocking.values()) >= 0


def test_a_run_without_data_is_refused_by_all_ranks():
    found = run_workers(measured, 2, 16, ("Regression", [0, 0], 1), catch=True)
    assert all(isinstance(one, Raised) for one in found), found
    assert all("must have data" in one.message or "no batch" in one.message for one in found), found
