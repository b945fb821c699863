"""Whether `CommBudget(0.05)` finds its period, on links of different speed, and stays there when a worker is slow.

    sudo python benchmarks/comm_budget.py

Two hosts, one worker each, on links of 50, 200 and 1000 Mbit/s. A local step takes 20 ms, most of it asleep, so that
the workers do not disturb each other on the cores that they share. Each run has 20 rounds to settle, 10 in which the
share of averaging is measured, and 12 in which one worker is 1.5 times slower. On the fastest link, the link then slows
down in mid-run for 30 rounds. For two smaller models rounds of a few steps, or of one, are enough.

The schedule's own measurements are not used for the table. Its periods are noted as it names them. The time of an
average runs from the end of `localsgd::header` to that of `localsgd::round`, the names under which a profiler shows
them. In a second measure, without these, all that a round takes beyond its steps counts (the header and waiting for the
other worker too): wall time minus steps times the mean step inside the rounds.

Exits with 1 if an aim is missed. Needs: Linux, root, `ip` and `tc` (Debian: iproute2); about 8 minutes (`--quick`: two,
without the slowest link).
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, ClassVar, NamedTuple

import torch
from hosts import hosts, missing
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from workers import QUIET, ask, workers

from lightning_localsgd import CommBudget, LocalSGDStrategy, Progress

SHARE = 0.05
STEP = 0.02  # seconds
SETTLING, MEASURED, SLOWED = 20, 10, 12  # rounds
NEAR = 0.1  # a period has settled if it stays within this much of its median


class Phase(NamedTuple):
    """Of a run."""

    rounds: int
    mbit: float  # of each link
    slower: float = 1.0  # how many times longer a step of rank 1 takes


class Round(NamedTuple):
    """What one worker has seen of a round."""

    length: int
    seconds: float
    average: float  # seconds from the header's end to the landing
    waited: float  # seconds in the header
    step: float  # seconds of a local step, the mean of those between the first and the last, or NaN


# ---------------------------------------------------------------------------------------------------------- what is run


class Sleeper(LightningModule):
    """A linear network of about the given size, whose steps take a given time.

    Args:
        megabytes: of its parameters, 10^6 bytes.
        seconds: of a step.
    """

    def __init__(self, megabytes: float, seconds: float) -> None:
        super().__init__()
        width = round(megabytes * 1e6 / 4 / 64)
        self.network = nn.Sequential(nn.Linear(32, width, bias=False), nn.Linear(width, 32, bias=False))
        self.seconds = seconds

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        start = time.perf_counter()
        loss = self.network(batch[0]).square().mean()
        time.sleep(max(0.0, start + self.seconds - time.perf_counter()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


class Noted(CommBudget):
    """Notes what it answers, and when: just after the last round has landed."""

    answers: ClassVar[list[tuple[float, int]]] = []

    def length(self, progress: Progress) -> int:
        length = super().length(progress)
        self.answers.append((time.perf_counter(), length))
        return length


class Watch(Callback):
    """Leads through the phases, and puts the rounds together from what it and others have noted."""

    def __init__(self, phases: Sequence[Phase], pipe: Connection, rank: int, spans: list[tuple[str, float, float]]):
        self.phases, self.pipe, self.rank, self.spans = list(phases), pipe, rank, spans
        self.step_ends: list[float] = []
        self.rounds: list[Round] = []
        self.left = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if not self.step_ends:
            self._next_phase(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.step_ends.append(time.perf_counter())
        if len(self.rounds) == len(Noted.answers) - 1:
            return  # in mid-round
        (began, length), (ended, _) = Noted.answers[-2:]
        header = [span for span in self.spans if span[0] == "localsgd::header"][-1]
        landing = [span for span in self.spans if span[0] == "localsgd::round"][-1]
        inside = self.step_ends[-length:-1]
        step = (inside[-1] - inside[0]) / (length - 2) if length > 2 else math.nan
        waited, average = header[2] - header[1], landing[2] - header[2]
        self.rounds.append(Round(length, ended - began, average, waited, step))
        self.spans.clear()
        self.left -= 1
        if not self.left:
            self._next_phase(trainer, pl_module)

    def _next_phase(self, trainer: Trainer, module: Sleeper) -> None:
        if not self.phases:
            trainer.should_stop = True
            return
        phase = self.phases.pop(0)
        self.left = phase.rounds
        module.seconds = STEP * (phase.slower if self.rank == 1 else 1.0)
        self.pipe.send(phase)
        self.pipe.recv()  # the links have their speed


@contextmanager
def spans() -> Iterator[list[tuple[str, float, float]]]:
    """Within it, what `torch.profiler.record_function` marks is noted too, as (name, start, end)."""
    noted: list[tuple[str, float, float]] = []
    real = torch.profiler.record_function

    class Span(real):  # type: ignore[misc, valid-type]
        def __enter__(self) -> Any:
            self.began = time.perf_counter()
            return super().__enter__()

        def __exit__(self, *error: Any) -> None:
            super().__exit__(*error)
            noted.append((self.name, self.began, time.perf_counter()))

    torch.profiler.record_function = Span  # type: ignore[misc]
    try:
        yield noted
    finally:
        torch.profiler.record_function = real  # type: ignore[misc]


def train(pipe: Connection, rank: int) -> None:
    """Train as the parent says, time after time: receives (megabytes, phases), sends each phase and the rounds."""
    data = TensorDataset(torch.randn(64, 32))
    while message := pipe.recv():
        megabytes, phases = message
        seed_everything(0, verbose=False)
        Noted.answers.clear()
        with spans() as noted:
            watch = Watch(phases, pipe, rank, noted)
            trainer = Trainer(
                strategy=LocalSGDStrategy(Noted(SHARE)),
                devices=1,
                num_nodes=2,
                max_epochs=1,
                use_distributed_sampler=False,
                callbacks=watch,
                **QUIET,
            )
            sampler = RandomSampler(data, replacement=True, num_samples=10**7)
            trainer.fit(Sleeper(megabytes, STEP), DataLoader(data, batch_size=4, sampler=sampler))
        pipe.send(watch.rounds)


# -------------------------------------------------------------------------------------------------------- what is shown


def settled(lengths: Sequence[int], near: float = NEAR) -> int | None:
    """Return after how many rounds all later ones have a length near their median, 10 of them at least, or None."""
    for rounds in range(len(lengths) - MEASURED + 1):
        later = lengths[rounds:]
        if farthest(later, statistics.median(later)) <= near:
            return rounds
    return None


def farthest(lengths: Sequence[int], reference: float) -> float:
    """Return how far any of the lengths is from the reference, relative to it; one step is near enough."""
    return max(0.0 if abs(length - reference) <= 1 else abs(length - reference) / reference for length in lengths)


def share(rounds: Sequence[Round]) -> float:
    """Return the share of averaging in the wall time."""
    return sum(each.average for each in rounds) / sum(each.seconds for each in rounds)


def beyond_steps(rounds: Sequence[Round]) -> float:
    """Return the share of all that is not local steps, NaN where no round has steps inside it."""
    steps = [(each.length - 2, each.step) for each in rounds if each.length > 2]
    if not steps:
        return math.nan
    step = sum(number * seconds for number, seconds in steps) / sum(number for number, _ in steps)
    seconds = sum(each.seconds for each in rounds)
    return 1 - step * sum(each.length for each in rounds) / seconds


def share_if_shorter(rounds: Sequence[Round]) -> float:
    """Return the share if each round had one step less."""
    average = sum(each.average for each in rounds)
    rest = sum((each.seconds - each.average) * (1 - 1 / each.length) for each in rounds)
    return average / (average + rest)


class Run(NamedTuple):
    """A model on a link."""

    megabytes: float
    mbit: float
    slows_to: float | None = None  # the link, in mid-run
    needs_less: bool = False

    def phases(self) -> list[Phase]:
        phases = [Phase(SETTLING + MEASURED, self.mbit)]
        if not self.needs_less:
            phases.append(Phase(SLOWED, self.mbit, slower=1.5))
        if self.slows_to:
            phases.append(Phase(SETTLING + MEASURED, self.slows_to))
        return phases


RUNS = (
    Run(2.0, 50),
    Run(2.0, 200),
    Run(2.0, 1000, slows_to=200),
    Run(0.3, 1000, needs_less=True),
    Run(0.02, 1000, needs_less=True),
)


def measure(run: Run, lab: Any, pipes: list[Connection]) -> list[list[Round]]:
    """Return the rounds of rank 0, and of rank 1."""
    seen = ask(pipes, (run.megabytes, run.phases()))
    while isinstance(seen[0], Phase):
        lab.shape(seen[0].mbit)
        seen = ask(pipes, "go", timeout=600)
    return seen


def show(run: Run, workers_rounds: list[list[Round]], verbose: bool) -> bool:
    """Print what was seen on one link; return whether the aims are met."""
    lengths = [each.length for each in workers_rounds[0]]
    assert lengths == [each.length for each in workers_rounds[1]]
    if verbose:
        print("periods:", *lengths, file=sys.stderr)
    met = row(run, f"{run.mbit:g} Mbit/s", [rounds[: SETTLING + MEASURED] for rounds in workers_rounds])
    start = SETTLING + MEASURED
    if not run.needs_less:
        slow = [rounds[start : start + SLOWED] for rounds in workers_rounds]
        usual = statistics.median(lengths[start - MEASURED : start])
        moved = farthest([each.length for each in slow[0]], usual)
        waiting = max(sum(each.waited for each in rounds) / sum(each.seconds for each in rounds) for rounds in slow)
        fine = moved <= 0.25
        print(
            f"| | a worker 1.5 times slower | | {statistics.median(each.length for each in slow[0]):g}, at most "
            f"{100 * moved:.0f} % off | {statistics.mean(map(share, slow)):.3f}, waiting {waiting:.2f} | | | "
            f"{yes(fine)} |",
            flush=True,
        )
        met = met and fine
        start += SLOWED
    if run.slows_to:
        name = f"slows down to {run.slows_to:g} Mbit/s"
        met = row(run, name, [rounds[start:] for rounds in workers_rounds]) and met
    return met


def row(run: Run, name: str, workers_rounds: list[list[Round]]) -> bool:
    lengths = [each.length for each in workers_rounds[0]]
    rounds = settled(lengths)
    window = slice(rounds, rounds + MEASURED) if rounds is not None else slice(-MEASURED, None)
    now = [each[window] for each in workers_rounds]
    taken, shorter = statistics.mean(map(share, now)), statistics.mean(map(share_if_shorter, now))
    period = statistics.median(lengths[window])
    if run.needs_less:
        met = period == 1 or taken <= SHARE < shorter
    else:
        met = rounds is not None and rounds <= SETTLING and 0.03 <= taken <= 0.06
    print(
        f"| {run.megabytes:g} | {name} | {'not' if rounds is None else rounds} | {period:g} | {taken:.3f} | "
        f"{shorter:.3f} | {statistics.mean(map(beyond_steps, now)):.3f} | {yes(met)} |",
        flush=True,
    )
    return met


def yes(met: bool) -> str:
    return "yes" if met else "**no**"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="without the slowest link")
    parser.add_argument("--verbose", action="store_true", help="print all periods")
    args = parser.parse_args()
    if lacks := missing():
        print(f"skipped: {lacks}")
        return
    print(
        "| model, MB | link | rounds until it has settled | period | share of averaging | with one step less | all "
        "that is not local steps | aim met |\n|---|---|---|---|---|---|---|---|"
    )
    met = []
    with hosts() as lab, workers(2, train, job=lab.enter) as pipes:
        lab.shape(1000)
        for run in RUNS[1:] if args.quick else RUNS:
            met.append(show(run, measure(run, lab, pipes), args.verbose))
        for pipe in pipes:
            pipe.send(None)
    if not all(met):
        sys.exit(1)


if __name__ == "__main__":
    main()
