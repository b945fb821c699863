"""What `lightning-localsgd env` says, and what it never says."""

import sys

import pytest

from lightning_localsgd import __version__
from lightning_localsgd.cli import main
from lightning_localsgd.environment import interfaces, sections
from tests.shell import COMMAND, ROOT, ok

DIGITS = ROOT / "configs" / "digits.yaml"
NOTHING = ("LOCAL_RANK", "SLURM_LOCALID", "MASTER_ADDR")


@pytest.fixture
def env(monkeypatch, capsys):
    """Return what `lightning-localsgd env` prints in this process with these words and these variables."""

    def call(*words, code=0, **variables):
        for name in NOTHING:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["lightning-localsgd", "env", *map(str, words)])
        if code:
            with pytest.raises(SystemExit) as end:
                main()
            assert end.value.code == code
        else:
            main()
        return "".join(capsys.readouterr())

    return call


def test_it_says_what_an_issue_needs(env):
    printed = env("--config", DIGITS, MASTER_ADDR="n0")
    titles = [line for line in printed.splitlines() if not line.startswith(" ")]
    assert titles == [*sections({}), f"configuration {DIGITS}"]
    lines = [line.split() for line in printed.splitlines()]
    assert ["lightning-localsgd", __version__] in lines
    assert ["gloo", "available"] in lines
    assert ["MASTER_ADDR", "n0"] in lines
    assert ["trainer.devices", "2"] in lines
    assert ["class_path:", "lightning_localsgd.LocalSGDStrategy"] in lines
    assert ["period:", "8"] in lines


def test_the_command_is_there_and_takes_no_model():
    assert "versions\n" in ok(COMMAND, "env")
    assert "`lightning-localsgd env --help`" in ok(COMMAND, "--help")


def test_no_variable_is_shown_but_the_known_ones(env):
    secrets = {name: f"secret of {name}" for name in ("WANDB_API_KEY", "SLURM_JWT", "MASTER_PASSWORD", "HF_TOKEN")}
    assert "secret of" not in env(**secrets)


def test_one_process_of_each_host_prints(env):
    assert env(LOCAL_RANK="1") == ""
    assert env(SLURM_LOCALID="3") == ""
    assert env(LOCAL_RANK="0", RANK="4").count("versions\n") == 1


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ("model: a.B\n", "trainer.strategy  none: this command's default"),
        ("trainer: {}\n", "trainer.strategy  none: this command's default"),
        ("trainer: {strategy: ddp}\n", "trainer.strategy  ddp"),
        ("trainer: {strategy: {class_path: A}, callbacks: [{class_path: token}]}\n", "      class_path: A\n"),
    ],
)
def test_of_a_configuration_it_shows_the_strategy(env, tmp_path, config, told):
    (tmp_path / "run.yaml").write_text(config)
    printed = env("--config", tmp_path / "run.yaml")
    assert told in printed
    assert "token" not in printed


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (None, "must be a YAML file that can be read"),
        ("trainer: [", "must be a YAML file that can be read"),
        ("- a\n", "must have a mapping `trainer`, or none"),
        ("trainer: 3\n", "must have a mapping `trainer`, or none"),
    ],
)
def test_what_is_no_configuration_is_named(env, tmp_path, config, why):
    if config is not None:
        (tmp_path / "run.yaml").write_text(config)
    printed = env("--config", tmp_path / "run.yaml", code=2)
    assert why in printed
    assert "versions" not in printed


def test_interfaces_have_a_speed_where_linux_says_so(tmp_path):
    for name, speed in (("eth0", "1000\n"), ("eth1", "-1\n"), ("lo", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "operstate").write_text("up\n")
        (tmp_path / name / "mtu").write_text("1500\n")
        if speed is not None:
            (tmp_path / name / "speed").write_text(speed)
    (tmp_path / "bonding_masters").write_text("")
    assert interfaces(tmp_path, {"eth0": "10.77.0.2"}) == [
        ("eth0", "up, 1000 Mbit/s, MTU 1500, address 10.77.0.2"),
        ("eth1", "up, speed unknown, MTU 1500"),
        ("lo", "up, speed unknown, MTU 1500"),
    ]
    assert interfaces(tmp_path / "not Linux", {}) == []
