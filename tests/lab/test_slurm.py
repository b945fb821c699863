"""The scripts in examples/slurm, submitted as they are."""

import itertools
import json
import os
import re
import statistics
import sys
from pathlib import Path

import pytest
import torch

from examples.digits import Digits, DigitsData
from tests.shell import COMMAND, ROOT, ok

SCRIPTS = ROOT / "examples" / "slurm"
EPOCHS = 8  # of 19 steps
PLACES = [f"{2 * node + device}-n{node}" for node in range(2) for device in range(2)]
ENV = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def submit(lab, script, folder, *words, options=(), env=None, timeout=200):
    """Run a script, or one of the examples by its name, to its end, and return what it printed."""
    out = folder / "job.out"
    words = [*words, f"--trainer.default_root_dir={folder}"]
    path = SCRIPTS / f"{script}.sbatch" if isinstance(script, str) else script
    job = lab.submit(f"--output={out}", *options, path, *words, env=ENV | (env or {}))
    state = lab.wait(job, timeout)
    printed = out.read_text() if out.exists() else ""
    assert state == "COMPLETED", f"{state}: {printed}"
    return printed


def checkpoint_of(folder):
    (found,) = folder.glob("lightning_logs/*/checkpoints/last.ckpt")
    return found


@pytest.fixture(scope="module")
def on_one_machine(tmp_path_factory):
    """Return the checkpoint of the same training by two processes on one machine."""
    folder = tmp_path_factory.mktemp("one")
    words = ["--config", ROOT / "configs" / "slurm.yaml", f"--trainer.default_root_dir={folder}"]
    ok("env", "OMP_NUM_THREADS=1", f"PYTHONPATH={ROOT}", COMMAND, "fit", *words, f"--trainer.max_epochs={EPOCHS}")
    return torch.load(checkpoint_of(folder), weights_only=True)


def test_two_hosts_train_as_one_machine_does_and_are_silent_between_averages(lab, tmp_path, on_one_machine):
    counted = ["--trainer.callbacks+=tests.lab.counted.Counted", f"--trainer.callbacks.folder={tmp_path}"]
    lab.network.shape(100)
    try:
        printed = submit(lab, "cpu", tmp_path, *counted, f"--trainer.max_epochs={EPOCHS}")
    finally:
        lab.network.shape(10_000)
    assert "Starting with 2 processes" in printed
    trained = torch.load(checkpoint_of(tmp_path), weights_only=True)
    for name, value in on_one_machine["state_dict"].items():
        assert torch.equal(trained["state_dict"][name], value), name

    model, data = Digits(), DigitsData()
    model.load_state_dict(trained["state_dict"])
    data.setup("test")
    images, digits = data.test.tensors
    with torch.no_grad():
        assert (model.eval()(images).argmax(1) == digits).float().mean() > 0.96

    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    for rank in range(2):
        counts = json.loads((tmp_path / f"{rank}-n{rank}.json").read_text())
        sent = [after - before for before, after in itertools.pairwise(counts)]  # in steps 2, 3, ...
        rounds = [sent[i] for i in range(len(sent)) if (i + 2) % 8 == 0]
        within = [sent[i] for i in range(len(sent)) if (i + 2) % 8 != 0 and (i + 2) % 19 > 1]  # nor next to validation
        assert len(counts) == 19 * EPOCHS
        assert min(rounds) > 0.98 * size
        assert statistics.median(within) == 0
        assert max(within) < 0.05 * size  # SLURM's own word now and then


@pytest.mark.parametrize(
    ("name", "options", "env", "workers"),
    [
        ("gpu", ["--nodes=1"], {"ACCELERATOR": "cpu"}, 2),
        ("tasks", [], {}, 4),
        ("container", [], {"CONTAINER": "unshare --ipc"}, 2),
        ("preemptible", [], {}, 2),
    ],
)
def test_a_script_runs(lab, tmp_path, name, options, env, workers):
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=9"]
    printed = submit(lab, name, tmp_path, *short, options=options, env=env)
    assert f"Starting with {workers} processes" in printed
    checkpoint = torch.load(checkpoint_of(tmp_path), weights_only=True)
    assert checkpoint["lightning_localsgd"]["workers"] == workers


def test_one_model_a_round_leaves_a_node_of_two_devices(lab, tmp_path):
    words = ["--trainer.callbacks+=tests.lab.counted.Counted", f"--trainer.callbacks.folder={tmp_path}"]
    words += ["--trainer.strategy.replica=node", "--model.width=128", "--trainer.max_epochs=3"]
    submit(lab, "tasks", tmp_path, *words)
    size = 4 * sum(tensor.numel() for tensor in Digits(width=128).state_dict().values())
    for name in PLACES:
        counts = json.loads((tmp_path / f"{name}.json").read_text())
        sent = [after - before for before, after in itertools.pairwise(counts)]  # in steps 2, 3, ...
        rounds = [sent[i] for i in range(len(sent)) if (i + 2) % 8 == 0]
        within = [sent[i] for i in range(len(sent)) if (i + 2) % 8 != 0 and (i + 2) % 9 > 1]
        assert len(rounds) == 3
        assert all(0.98 * size < one < 1.05 * size for one in rounds)
        assert statistics.median(within) < 1e-3 * size  # signals are looked for once a second
        assert max(within) < 0.05 * size


def test_an_array_trains_each_seed(lab, tmp_path):
    words = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=9"]
    where = [f"--chdir={tmp_path}", f"--output={tmp_path}/%a.out", "--array=0-1%2"]
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    job = lab.submit(*where, SCRIPTS / "seeds.sbatch", *words, env=ENV)
    for seed in range(2):
        assert lab.wait(f"{job}_{seed}", 200) == "COMPLETED", (tmp_path / f"{seed}.out").read_text()
        (saved,) = (tmp_path / "runs").glob(f"{job}-{seed}/lightning_logs/*/config.yaml")
        assert f"seed_everything: {seed}\n" in saved.read_text()


def test_plan_measures_on_the_nodes_of_the_job(lab, tmp_path):
    script, picture = tmp_path / "plan.sbatch", tmp_path / "plan.png"
    fits = (SCRIPTS / "cpu.sbatch").read_text()
    script.write_text(fits.replace("lightning-localsgd fit", "lightning-localsgd plan"))
    assert script.read_text() != fits
    lab.network.shape(20)
    try:
        words = ["--model.width=256", "--trainer.callbacks=null", "--seconds=15", f"--picture={picture}"]
        printed = submit(lab, script, tmp_path, *words)
    finally:
        lab.network.shape(10_000)
    assert "2 workers; steps/s of each worker" in printed
    assert printed.count("Recommended: ") == printed.count("Limited by ") == 1, printed
    size = sum(parameter.numel() for parameter in Digits(width=256).parameters())
    (average,) = re.findall(r"^an average in float32 costs ([\d.]+) ms$", printed, re.MULTILINE)
    assert float(average) > 1000 * 32 * size / 20e6  # the link between the nodes, which no memory of one machine has
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"job.out", "plan.sbatch", "plan.png"}
