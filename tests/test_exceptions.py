"""One worker raises, or dies, or somebody presses Ctrl-C: all end soon, and the first error is there to be read."""

import multiprocessing
import os
import re
import signal
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from socket import gethostname
from subprocess import DEVNULL, PIPE, STDOUT, Popen, TimeoutExpired

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LambdaCallback
from torch.utils.data import DataLoader, Dataset

from lightning_localsgd import LocalSGDStrategy, Mean
from tests.models import Regression, batch, rank, same, state_of, trainer
from tests.shell import ROOT
from tests.workers import run_workers

HOST = gethostname()

SOON = 25  # seconds, on a busy machine; torch's and torchrun's own SIGKILL come 30 s after the first error


class Fault:
    """Raises at one place on one rank, once."""

    def __init__(self, where, who):
        self.where, self.who, self.raised = where, who, False

    def __call__(self, where):
        if where == self.where and rank() == self.who and not self.raised:
            self.raised = True
            raise ZeroDivisionError(f"on purpose, in {where}")


class Numbers(Dataset):
    """Six batches, the fourth of which cannot be loaded if ``broken``."""

    def __init__(self, owner, broken):
        self.owner, self.broken = owner, broken

    def __len__(self):
        return 6

    def __getitem__(self, index):
        if self.broken and index == 3:
            raise ZeroDivisionError("on purpose, in loader")
        return batch(self.owner, index)


class Faulty(Regression):
    def __init__(self, fault):
        super().__init__()
        self.fault = fault

    def train_dataloader(self):
        broken = self.fault.where == "loader" and rank() == self.fault.who
        workers = {"num_workers": 2, "multiprocessing_context": "fork"} if broken else {}
        return DataLoader(Numbers(rank(), broken), batch_size=None, **workers)

    def val_dataloader(self):
        return DataLoader(Numbers(rank(), False), batch_size=None)

    def setup(self, stage):
        super().setup(stage)
        self.fault("setup")

    def training_step(self, batch, batch_idx):
        if batch_idx == 3:
            self.fault("training_step")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.fault("validation")
        super().validation_step(batch, batch_idx)

    def backward(self, loss):
        if self.global_step == 3:
            loss.register_hook(lambda grad: self.fault("backward"))
        loss.backward()

    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        optimizer.step(closure)
        self.fault("optimizer step")

    def on_train_epoch_end(self):
        self.fault("on_train_epoch_end")


class FaultyCallback(Callback):
    def __init__(self, fault):
        self.fault = fault

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2:
            self.fault("a callback")


class FaultyMean(Mean):
    def average(self, *args, **options):
        self.fault("an average")
        super().average(*args, **options)


def fit(fault=None, period=4):
    fault = fault or Fault("nowhere", -1)
    mean = FaultyMean()
    object.__setattr__(mean, "fault", fault)
    model = Faulty(fault)
    strategy = LocalSGDStrategy(period=period, mean=mean)
    trainer(2, strategy, callbacks=[FaultyCallback(fault)], num_sanity_val_steps=0).fit(model)
    return state_of(model)


def fail_and_live_on(places, folder):
    """Fit once for each place and failing rank; whoever fails stays until the other has heard of it."""
    seen = {}
    for where in places:
        for who in (0, 1):
            heard = Path(folder, f"{where} {who}")
            try:
                fit(Fault(where, who))
            except Exception as error:
                seen[where, who] = (type(error).__name__, str(error))
            if rank() == who:
                seen[where, who] += (_comes(heard),)
            else:
                heard.touch()
    seen["again"] = fit()
    return seen


def _comes(path, limit=SOON):
    deadline = time.monotonic() + limit
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return path.exists()


PLACES = ["training_step", "backward", "optimizer step", "a callback", "validation", "on_train_epoch_end"]


def test_others_hear_of_it_at_once_even_if_the_process_lives_on(tmp_path):
    ranks = run_workers(fail_and_live_on, 2, PLACES, str(tmp_path))
    for where in PLACES:
        for who in (0, 1):
            name, message, others_heard = ranks[who][where, who]
            assert (name, others_heard) == ("ZeroDivisionError", True), where
            assert f"on purpose, in {where}" in message
            name, message = ranks[1 - who][where, who]
            assert name == "RuntimeError", where
            assert message.startswith(f"Rank {1 - who} on host {HOST}, which ")
            assert message.endswith("cannot go on, because another worker has left; see the first error above.")
            assert "at its step " in message
    assert same([ends["again"] for ends in ranks])  # and both can fit again


def fail(where, who):
    fit(Fault(where, who))


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("an average", f"Rank 0 on host {HOST}, which averages its model, cannot go on"),
        ("loader", f"Rank 0 on host {HOST}, which ends a round at its step 4, cannot go on"),
        ("setup", f"Rank 0 on host {HOST}, which starts, cannot go on"),
    ],
)
def test_others_hear_of_it_when_the_process_ends(where, says):
    ends = run_workers(fail, 2, where, 1, catch=True, timeout=60)
    assert ends[1].type == "ZeroDivisionError"
    assert ends[0].type == "RuntimeError"
    assert re.search(says, ends[0].message)


def fail_and_leave_a_process(folder):
    heard = Path(folder, "heard")
    loads = multiprocessing.get_context("fork").Process(target=time.sleep, args=(2 * SOON,))  # and keeps what is open
    try:
        trainer(2, 4, callbacks=[LambdaCallback(on_train_start=lambda *_: loads.start())]).fit(
            Faulty(Fault("training_step", 1))
        )
    except Exception as error:
        if rank() == 1:
            others_heard = _comes(heard)
            loads.kill()
            return others_heard
        heard.touch()
        loads.kill()
        return str(error)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_others_hear_of_it_even_if_a_loading_process_keeps_connections_open(tmp_path):
    message, others_heard = run_workers(fail_and_leave_a_process, 2, str(tmp_path), timeout=60)
    assert others_heard
    assert message == (
        f"Rank 0 on host {HOST}, which ends a round at its step 4, cannot go on, because another worker has left; see "
        "the first error above."
    )


class Lingers(Regression):
    """Rank 1 fails; rank 0 is told by a signal, as launchers do, in the midst of a round that does not end."""

    def __init__(self, folder, validate):
        super().__init__()
        self.folder, self.validate, self.after = Path(folder), validate, 0

    def step(self):
        if rank() == 1:
            raise ZeroDivisionError("on purpose")
        self.after += (self.folder / "signalled").exists()
        if (self.folder / "left").exists() and not self.after:
            os.kill(os.getpid(), signal.SIGTERM)
            (self.folder / "signalled").touch()
        time.sleep(0.01)

    def training_step(self, batch, batch_idx):
        if not self.validate:
            self.step()
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        if self.validate:
            self.step()
        super().validation_step(batch, batch_idx)

    def train_dataloader(self):
        return DataLoader([batch(rank(), index % 100) for index in range(2)] * (1 if self.validate else 1000), None)

    def val_dataloader(self):
        return DataLoader([batch(rank(), 0)] * 2000, None)


def fail_in_a_long_round(folder, validate):
    model = Lingers(folder, validate)
    try:
        trainer(2, 10_000, num_sanity_val_steps=0).fit(model)
    except Exception as error:
        if rank() == 1:
            Path(folder, "left").touch()
            _comes(Path(folder, "heard"))
        Path(folder, "heard").touch()
        return type(error).__name__, str(error), model.after
    return None


@pytest.mark.parametrize("validate", [False, True])
def test_in_mid_round_a_signal_tells_that_another_worker_has_left(validate, tmp_path):
    ends = run_workers(fail_in_a_long_round, 2, str(tmp_path), validate, timeout=60)
    (name, message, batches_after), other = ends
    assert name == "RuntimeError"
    assert batches_after < 300  # of 10 ms: the board is read once a second
    assert re.fullmatch(
        rf"Rank 0 on host {HOST}, at its step \d+, cannot go on, because another worker has left; see .*", message
    )
    assert other == ("ZeroDivisionError", "on purpose", 0)


class Job:
    """A user's script and all that it started; see `tests/faulty.py`."""

    def __init__(self, process, folder):
        self.process, self.folder = process, folder
        self.since = None

    def signal(self, group):
        assert _comes(self.folder / "running", limit=200), "it has not started training"
        self.since = time.time()
        (os.killpg if group else os.kill)(self.process.pid, signal.SIGINT)

    def end(self):
        """Wait until all its processes have ended; return the exit code, what was printed, and the seconds it took."""
        try:
            output, _ = self.process.communicate(timeout=200)  # which any of them keeps open
        except TimeoutExpired as error:
            pytest.fail(f"still running: {self.alive()}\n{error.output}")
        ended = time.time()
        while self.alive() and time.time() < ended + SOON:
            time.sleep(0.05)
        assert not self.alive()
        return self.process.returncode, output, time.time() - (self.since or self.failed())

    def failed(self):
        return float((self.folder / "failed").read_text())

    def alive(self):
        return [pid for pid in (int(path.stem) for path in self.folder.glob("*.pid")) if _runs(pid)]


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def hears_ctrl_c():
    """Also where these tests run in the background of a shell, whose children are deaf to it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def started(start, where, who, folder):
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if start == "torchrun" else []
    command = [sys.executable, *run, "-m", "tests.faulty", start, where, str(who), str(folder)]
    options = {"cwd": ROOT, "stdin": DEVNULL, "stdout": PIPE, "stderr": STDOUT, "text": True}
    process = Popen(
        command,
        **options,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        preexec_fn=hears_ctrl_c,
    )
    try:
        yield Job(process, folder)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


# In a round that goes on for ever, so that no header tells of it.
@pytest.mark.parametrize(
    ("start", "where", "who"),
    [
        ("popen", "loader", 0),
        ("popen", "training_step", 1),
        ("fork", "training_step", 0),
        pytest.param("torchrun", "training_step", 1, marks=pytest.mark.soak),
        pytest.param("spawn", "training_step", 1, marks=pytest.mark.soak),
        pytest.param("popen", "validation", 0, marks=pytest.mark.soak),
        pytest.param("torchrun", "loader", 0, marks=pytest.mark.soak),
    ],
)
def test_a_job_ends_soon_however_it_was_started(start, where, who, tmp_path):
    with started(start, where, who, tmp_path) as job:
        code, output, seconds = job.end()
    assert code != 0
    assert f"ZeroDivisionError: on purpose, in {where}" in output, output
    assert 'tests/faulty.py", line' in output  # the traceback
    assert seconds < SOON, output


@pytest.mark.parametrize(
    ("start", "where", "group"),
    [
        ("popen", "waits", False),  # rank 0 waits for the others at the end of its data
        ("popen", "nowhere", True),
        pytest.param("fork", "nowhere", False, marks=pytest.mark.soak),
        pytest.param("fork", "nowhere", True, marks=pytest.mark.soak),
        pytest.param("spawn", "nowhere", False, marks=pytest.mark.soak),
        pytest.param("torchrun", "nowhere", True, marks=pytest.mark.soak),
    ],
)
def test_ctrl_c_ends_a_job_soon(start, where, group, tmp_path):
    with started(start, where, 0, tmp_path) as job:
        job.signal(group)
        code, output, seconds = job.end()
    assert code != 0
    assert seconds < SOON, output
