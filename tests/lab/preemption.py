"""Jobs that are interrupted at random moments and requeued: does each end as if it had not been?

    sudo python -m tests.lab.preemption --runs 60

Each run is `examples/slurm/preemptible.sbatch` on two hosts under a real SLURM. It trains digits for four epochs, with
rounds of 1, 5, 100 or all steps; one worker may be up to five times slower. At a random moment since its processes
are there, SIGUSR1 or SIGTERM comes to one worker or to both, in some runs in the second turn again. The job
requeues itself. In the end all weights
must be those of the run that nobody interrupted, bit for bit, with one checkpoint of each interruption.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from lightning_localsgd.checkpoint import Parts
from lightning_localsgd.cli import main as main_of_command
from tests.lab.cluster import Cluster, cluster, missing
from tests.shell import ROOT
from tests.workers import run_workers

SCRIPT = ROOT / "examples" / "slurm" / "preemptible.sbatch"
ENV = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
PERIODS = ("1", "5", "100", "AtEnd")


@dataclass(frozen=True)
class Plan:
    """One run."""

    period: str
    seconds: tuple[float, float]  # of each worker's step
    validation: float
    signals: tuple[tuple[int, tuple[int, ...], float], ...]  # in each turn: which, to whom, after how many seconds

    @classmethod
    def draw(cls, seed: int) -> "Plan":
        """Return the run of this seed."""
        chance = random.Random(seed)
        fast, slow = 0.02, 0.02 * chance.choice([1, 2, 5])
        seconds = chance.choice([(fast, slow), (slow, fast)])
        signals = []
        for _ in range(chance.choice([1, 1, 2])):
            number = chance.choice([signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM])
            signals.append((number, chance.choice([(0,), (1,), (0, 1)]), chance.uniform(0, 76 * slow + 4)))
        return cls(chance.choice(PERIODS), seconds, chance.choice([0, 0.5]), tuple(signals))


@dataclass
class Outcome:
    """What became of a run."""

    turns: int
    moments: list[str]
    seconds: list[float]  # from each signal in training to its checkpoint


def words(period: str, seconds: tuple[float, ...], validation: float, folder: Path) -> list[str]:
    """Return the options of the command."""
    return [
        "--model=tests.lab.preempted.Skewed",
        f"--model.seconds={list(seconds)}",
        f"--model.validation={validation}",
        f"--trainer.strategy.period={period}",
        "--trainer.max_epochs=4",
        "--trainer.enable_model_summary=false",
        f"--trainer.default_root_dir={folder}",
        "--trainer.callbacks+=tests.lab.preempted.Tells",
        f"--trainer.callbacks.folder={folder}",
    ]


@cache
def undisturbed(period: str) -> str:
    """Return the digest of the weights of the run that nobody interrupts, by two processes of this machine."""
    folder = Path(tempfile.mkdtemp())
    try:
        run_workers(_train, 2, words(period, (0, 0), 0, folder))
        digests = {(folder / f"digest-{rank}").read_text() for rank in range(2)}
        assert len(digests) == 1
        return digests.pop()
    finally:
        shutil.rmtree(folder)


def _train(given: list[str]) -> None:
    sys.argv = ["lightning-localsgd", "fit", "--config", str(ROOT / "configs" / "slurm.yaml"), *given]
    warnings.simplefilter("ignore")  # of what Lightning calls
    main_of_command()


def interrupt(lab: Cluster, plan: Plan, folder: Path) -> Outcome:
    """Run a job, interrupt it, and see that it ends well.

    Raises:
        AssertionError: if it does not.
    """
    outcome = Outcome(0, [], [])
    given = words(plan.period, plan.seconds, plan.validation, folder)
    job = lab.submit(f"--output={folder}/job.out", "--time=10", SCRIPT, *given, env=ENV)
    for turn, (number, who, after) in enumerate(plan.signals):
        pids = [_file(lab, job, folder / f"pid-{turn}-{rank}") for rank in range(2)]
        if None in pids:
            break
        time.sleep(after)
        trains = all((folder / f"trains-{turn}-{rank}").exists() for rank in range(2))
        steps = [_read(folder / f"step-{turn}-{rank}") for rank in range(2)]
        at = time.time()
        for rank in who:
            with suppress(ProcessLookupError):
                os.kill(int(pids[rank]), number)
        outcome.moments.append(f"{number.name} to {who} after {after:.1f} s, at steps {steps}, trains: {trains}")
        saved = folder / f"hpc_ckpt_{outcome.turns + 1}.ckpt"
        if not _goes_on(lab, job, folder, turn + 1):
            break
        outcome.turns += 1
        if saved.exists() and trains:
            outcome.seconds.append(saved.stat().st_mtime - at)
    state = lab.wait(job, 180)
    printed = (folder / "job.out").read_text()
    told = f"{plan}, {outcome}, {sorted(path.name for path in folder.iterdir())}:\n{printed}"
    # After the training a signal ends the process, as it ends any other: its weights are there by then.
    assert state == "COMPLETED" or "`Trainer.fit` stopped" in printed, f"{state}: {told}"
    for rank in range(2):
        assert (folder / f"digest-{rank}").read_text() == undisturbed(plan.period), f"other weights: {told}"
    saved = sorted(folder.glob("hpc_ckpt_*"))
    assert "does not go on exactly" not in printed, told
    assert len(saved) <= outcome.turns, f"saved twice: {told}"  # fewer where it had not begun to train
    assert not list(folder.rglob(".localsgd-*")), f"half a file: {told}"
    for path in saved:
        parts = Parts.of(torch.load(path, weights_only=True))
        for rank in range(2):
            parts.read(rank, str(path))
    return outcome


_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")


def _file(lab: Cluster, job: int, path: Path) -> str | None:
    """Wait for a file, and return what is in it, or None if the job ends without it."""
    deadline = time.monotonic() + 240
    while (text := _read(path)) is None:
        if lab.state(job) in _ENDED or time.monotonic() > deadline:  # not "PREEMPTED", in which a job is for a moment
            return None
        time.sleep(0.3)
    return text


def _read(path: Path) -> str | None:
    with suppress(FileNotFoundError):
        return path.read_text()
    return None


def _goes_on(lab: Cluster, job: int, folder: Path, turn: int) -> bool:
    """Wait until the next turn has begun, or the job has ended without one."""
    return _file(lab, job, folder / f"pid-{turn}-0") is not None


def soak(lab: Cluster, seeds: range, at_once: int = 3) -> list[Outcome]:
    """Run these plans; raise after all if one failed."""
    folders = Path(tempfile.mkdtemp(prefix="lsgd-preempted-"))
    for period in sorted({Plan.draw(seed).period for seed in seeds}):
        undisturbed(period)  # once, and not by several threads

    def one(seed: int) -> Outcome | AssertionError:
        folder = folders / str(seed)
        folder.mkdir()
        try:
            return interrupt(lab, Plan.draw(seed), folder)
        except (AssertionError, TimeoutError) as error:
            return AssertionError(f"seed {seed}: {error} {(folder / 'job.out').read_text()}")

    with ThreadPoolExecutor(at_once) as pool:
        outcomes = []
        for seed, outcome in zip(seeds, pool.map(one, seeds), strict=True):
            print(seed, outcome, flush=True)  # noqa: T201
            outcomes.append(outcome)
    failed = [outcome for outcome in outcomes if isinstance(outcome, AssertionError)]
    if failed:
        raise AssertionError(f"{len(failed)} of {len(outcomes)} failed; the first: {failed[0]}")
    shutil.rmtree(folders)
    return outcomes


def main() -> None:
    """Run as many as are asked for."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--runs", type=int, default=60)
    options.add_argument("--seed", type=int, default=0, help="of the first run")
    options.add_argument("--at-once", type=int, default=3, help="jobs")
    args = options.parse_args()
    if why := missing():
        sys.exit(f"skipped: {why}")
    start = time.monotonic()
    with cluster(2) as lab:
        outcomes = soak(lab, range(args.seed, args.seed + args.runs), args.at_once)
    turns = sum(outcome.turns for outcome in outcomes)
    seconds = [second for outcome in outcomes for second in outcome.seconds]
    print(  # noqa: T201
        f"{args.runs} of {args.runs} runs, requeued {turns} times, ended as if nobody had interrupted them; from a "
        f"signal to its checkpoint at most {max(seconds, default=0):.1f} s; {time.monotonic() - start:.0f} s in all"
    )


if __name__ == "__main__":
    main()
