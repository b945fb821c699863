"""The command line: real runs of every configuration, and what it parses and prints."""

import re
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

from lightning_localsgd import Mean
from lightning_localsgd.cli import main
from tests.shell import COMMAND, QUIET, ROOT, ok, run

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
DIGITS = ROOT / "configs" / "digits.yaml"

each_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)


@pytest.fixture
def parse(monkeypatch, capsys):
    """Return what the command prints that is called with these arguments in this process, and ends by itself."""

    def call(*args, code=0):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(sys, "argv", ["lightning-localsgd", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        assert (end.value.code or 0) == code, err
        return out + err

    return call


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Return a function that runs a configuration for some steps, once, and returns the folder with what it saved."""

    @cache
    def train(config):
        root = tmp_path_factory.mktemp(config.stem)
        few = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=20", f"--trainer.default_root_dir={root}"]
        printed = ok(COMMAND, "fit", "--config", config, *few, *QUIET)
        devices = yaml.safe_load(config.read_text())["trainer"]["devices"]
        assert f"Starting with {devices} processes" in printed
        return root / "lightning_logs" / "version_0"

    return train


def checkpoint_of(folder: Path) -> Path:
    (path,) = (path for path in folder.glob("checkpoints/*.ckpt") if path.name != "last.ckpt")
    return path


@each_config
def test_a_configuration_trains(train, config):
    checkpoint = torch.load(checkpoint_of(train(config)), weights_only=True)
    clock = checkpoint["lightning_localsgd"]["clock"]
    assert checkpoint["global_step"] == clock["start"] + clock["taken"]
    assert clock["round"] > 0


@each_config
def test_a_saved_configuration_goes_on_from_its_checkpoint(train, config, tmp_path):
    folder = train(config)
    before = torch.load(checkpoint_of(folder), weights_only=True)
    options = [f"--trainer.default_root_dir={tmp_path}", "--trainer.max_epochs=2"]
    ok(COMMAND, "fit", "--config", folder / "config.yaml", "--ckpt_path", checkpoint_of(folder), *options)
    after = torch.load(checkpoint_of(tmp_path / "lightning_logs" / "version_0"), weights_only=True)
    assert after["global_step"] == 2 * before["global_step"]
    clock = after["lightning_localsgd"]["clock"]
    assert clock["start"] + clock["taken"] == after["global_step"]
    assert clock["round"] > before["lightning_localsgd"]["clock"]["round"]


def evaluate(subcommand, folder, tmp_path, workers):
    options = [f"--trainer.default_root_dir={tmp_path}", f"--trainer.devices={workers}", *QUIET]
    what = ["--config", folder / "config.yaml", "--ckpt_path", checkpoint_of(folder)]
    printed = ok(sys.executable, "-m", "lightning_localsgd", subcommand, *what, *options)
    assert f"Starting with {workers} processes" in printed
    assert "Loaded model weights from the checkpoint" in printed
    return printed


def test_validate(train, tmp_path):
    assert "val_accuracy" in evaluate("validate", train(DIGITS), tmp_path, workers=1)


def test_predict(train, tmp_path):
    evaluate("predict", train(DIGITS), tmp_path, workers=2)


def test_fit_and_test_do_what_the_example_does(train, tmp_path):
    printed = evaluate("test", train(DIGITS), tmp_path, workers=2)
    assert re.search(r"test_images +│ +360\.0", printed)
    accuracy = float(re.search(r"test_accuracy +│ +([0-9.]+)", printed)[1])
    example = run(sys.executable, "examples/digits.py", "--epochs=1")
    assert f"held-out test accuracy: {accuracy:.4f} on 360 images" in example.output
    assert accuracy < 0.97
    assert example.code == 1
    assert "below 0.97" in example.output.splitlines()[-1]


@each_config
def test_the_printed_configuration_is_parsed_and_printed_again(parse, config, tmp_path):
    printed = parse("fit", "--config", config, "--print_config")
    (tmp_path / "again.yaml").write_text(printed)
    assert parse("fit", "--config", tmp_path / "again.yaml", "--print_config") == printed
    given, all_of_it = yaml.safe_load(config.read_text()), yaml.safe_load(printed)
    assert includes(all_of_it, given)


def includes(whole: object, part: object) -> bool:
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(key in whole and includes(whole[key], part[key]) for key in part)
    if isinstance(part, list):
        return isinstance(whole, list) and all(includes(*pair) for pair in zip(whole, part, strict=True))
    return whole == part


def strategy(printed: str) -> dict:
    return yaml.safe_load(printed)["trainer"]["strategy"]


def test_a_period_by_its_short_name(parse):
    short = [
        "--trainer.strategy=LocalSGDStrategy",
        "--trainer.strategy.period=Every",
        "--trainer.strategy.period.period=4",
    ]
    found = strategy(parse("fit", "--model=examples.digits.Digits", *short, "--print_config"))
    assert found["class_path"] == "lightning_localsgd.LocalSGDStrategy"
    assert found["init_args"]["period"] == {"class_path": "lightning_localsgd.Every", "init_args": {"period": 4}}


def test_our_strategy_is_the_default(parse):
    options = ["--trainer.strategy.period=5", "--trainer.strategy.mean.bucket_mb=3"]
    found = strategy(parse("fit", "--model=examples.digits.Digits", *options, "--print_config"))
    assert found["class_path"] == "lightning_localsgd.LocalSGDStrategy"
    assert found["init_args"]["period"] == 5
    assert found["init_args"]["mean"] == asdict(Mean(bucket_mb=3.0))
    assert strategy(parse("fit", "--config", DIGITS, "--trainer.strategy=ddp", "--print_config")) == "ddp"


def test_a_file_in_the_current_folder_is_found(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from lightning.pytorch import LightningModule\n\n\nclass Mine(LightningModule): ...\n"
    )
    assert "class_path: mine.Mine" in ok(COMMAND, "fit", "--model=mine.Mine", "--print_config", cwd=tmp_path)


@pytest.mark.parametrize("subcommand", ["fit", "validate", "test", "predict"])
def test_help(parse, subcommand):
    assert subcommand in parse("--help")
    printed = parse(subcommand, "--help")
    assert printed.startswith(f"usage: lightning-localsgd [options] {subcommand} ")
    assert "--trainer.strategy " in printed


def test_both_commands_are_one():
    printed = ok(COMMAND, "--help")
    assert printed.startswith("usage: lightning-localsgd ")
    assert ok(sys.executable, "-m", "lightning_localsgd", "--help") == printed


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--trainer.strategy.perod=3", "perod"),
        ("--trainer.strategy.period=1.5", "1.5"),
        ("--trainer.strategy.period=Evry", "Evry"),
        ("--trainer.strategy.find_unused_parameters=true", "find_unused_parameters"),
    ],
)
def test_what_cannot_be_parsed_is_named(parse, option, told):
    assert told in parse("fit", "--config", DIGITS, option, code=2)


def test_an_unknown_key_in_a_file_is_named(parse, tmp_path):
    (tmp_path / "wrong.yaml").write_text(DIGITS.read_text().replace("period: 8", "periods: 8"))
    assert "periods" in parse("fit", "--config", tmp_path / "wrong.yaml", code=2)


@pytest.mark.parametrize(("value", "told"), [("", "got None"), (" 3", "got 3")])
def test_a_trainer_that_is_no_mapping_is_named(parse, tmp_path, monkeypatch, value, told):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    (tmp_path / "wrong.yaml").write_text(f"seed_everything: false\nmodel: examples.digits.Digits\ntrainer:{value}\n")
    printed = parse("fit", "--config", tmp_path / "wrong.yaml", code=2)
    assert "`trainer` must be a mapping of options, " + told in printed


def test_a_wrong_period_ends_before_there_is_a_trainer(parse, monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of what Lightning calls
    with pytest.raises(ValueError, match=r"`period` must be an int of at least 1, got 0\."):
        parse("fit", "--config", DIGITS, "--seed_everything=false", "--trainer.strategy.period=0")
