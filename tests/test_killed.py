"""Whenever all workers are killed, the newest checkpoint is complete, and a run goes on from it bit for bit."""

import multiprocessing
import os
import pickle
import random
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback

from lightning_localsgd.checkpoint import Parts
from tests.resume import Case, later, run
from tests.workers import run_workers

pytestmark = [
    pytest.mark.filterwarnings("ignore:It is recommended to use `self.log"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork"),
    # `ModelCheckpoint(train_time_interval=...)` is one of the triggers.
    pytest.mark.filterwarnings("ignore:`ModelCheckpoint.train_time_interval=.*` makes the workers wait"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
]


@st.composite
def killed_runs(draw):
    """Draw a run, a trigger of checkpoints, and the number of batches after which all workers are killed."""
    manual = draw(st.booleans())
    trigger = draw(st.sampled_from(["steps", "time", "epoch", "validation"]))
    validates = trigger == "validation" or draw(st.booleans())
    options = {"use_distributed_sampler": draw(st.booleans())}
    if validates:
        options["val_check_interval"] = draw(st.integers(1, 6))
    if draw(st.booleans()):
        options |= {"max_steps": draw(st.integers(15, 40)), "max_epochs": -1}
    case = Case(
        workers=draw(st.integers(1, 4)),
        period=draw(st.integers(1, 9)),
        accumulate=1 if manual else draw(st.integers(1, 3)),
        optimizer=draw(st.sampled_from(["sgd", "momentum", "adamw"])),
        kind=draw(st.sampled_from(["plain", "norm", "noisy"])),
        manual=manual,
        batches=8 if options["use_distributed_sampler"] else draw(st.integers(6, 9)),
        data={"shuffle": True, "num_workers": draw(st.sampled_from([0, 0, 2]))},
        transform=False,
        options=options,
        scheduler=None if manual else draw(st.sampled_from([None, "step", *(["plateau"] if validates else [])])),
    )
    saver = {
        "steps": {"every_n_train_steps": draw(st.integers(1, 7))},
        "time": {"train_time_interval": timedelta(milliseconds=1)},
        "epoch": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
        "validation": {"monitor": "val_loss"},
    }[trigger]
    return case, saver, draw(st.integers(2, 20))


class Kills(Callback):
    """Kills this worker after so many batches, and the processes that load its data, which might not notice."""

    def __init__(self, after):
        self.after = after

    def on_train_batch_start(self, trainer, *_):
        if trainer.fit_loop.total_batch_idx >= self.after:
            for pid in children_of(os.getpid()):
                with suppress(ProcessLookupError):  # it has ended meanwhile
                    os.kill(pid, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)


def run_twice(case, saver, after, folder):
    """Run to the end, and again with checkpoints until the end comes sooner."""
    digests = run(case)
    rank = dist.get_rank() if dist.is_initialized() else 0
    Path(folder, f"straight-{rank}").write_bytes(pickle.dumps(digests))
    if dist.is_initialized():
        dist.barrier()
    run(case, f"{folder}/saved", saver, callbacks=[Kills(after)])


@pytest.mark.drawn
@given(killed_runs())
def test_a_killed_run_goes_on_bit_for_bit(drawn):
    case, saver, after = drawn
    folder = tempfile.mkdtemp()
    try:
        run_workers(run_twice, case.workers, case, saver, after, folder, timeout=120, catch=True)
        files = sorted(Path(folder, "saved").glob("*.ckpt"), key=os.path.getmtime)
        if not files:  # killed before the first one
            return
        again = run_workers(run, case.workers, case, None, None, str(files[-1]), timeout=120)
        for rank, (digests, end, _) in enumerate(again):
            straight, straight_end, _ = pickle.loads(Path(folder, f"straight-{rank}").read_bytes())
            first = min((key for key in digests if key != "end"), default=0)
            expected = later(straight, first) if first else {key: straight[key] for key in digests}
            assert digests == expected, (files[-1], first)
            assert end == straight_end
    finally:
        shutil.rmtree(folder)


def save_for_ever(folder):
    run(Case(batches=100_000, epochs=1), folder, {"every_n_train_steps": 1, "save_last": True})


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(1, 50))])
def test_a_kill_in_the_middle_of_saving_leaves_a_complete_checkpoint(seed, tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=run_workers, args=(save_for_ever, 2, str(tmp_path)))
    process.start()
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and len(list(tmp_path.glob("step=*.ckpt"))) < 2:
        time.sleep(0.01)
    time.sleep(random.Random(seed).random())
    killed = [process.pid, *children_of(process.pid)]
    for pid in killed[1:]:
        os.kill(pid, signal.SIGKILL)
    process.kill()
    process.join()
    assert len(killed) > 2
    files = sorted(tmp_path.glob("*.ckpt"), key=os.path.getmtime)
    assert files
    for file in files:
        parts = Parts.of_file(str(file))
        assert parts is not None, file
        for rank in range(2):
            assert parts.read(rank, str(file))["worker"]["clock"]
    assert run_workers(loads, 2, str(files[-1])) == [True, True]


def loads(path):
    case = Case(batches=100_000, epochs=1, options={"max_steps": int(1e9), "limit_train_batches": 1})
    digests, _, _ = run(case, resume=path)
    return bool(digests)


def children_of(pid):
    """Return the processes that a process has started, and those that these have."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:  # it has ended meanwhile
            continue
        if parent == pid:
            found += [int(path.name), *children_of(int(path.name))]
    return found
