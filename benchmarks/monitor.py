"""What LocalSGDMonitor costs: training with it, and with its anchor, against training without.

    python benchmarks/monitor.py

Four jobs of two workers each, on the same two cores with one thread each, take turns: a block of rounds of 8 steps of
the one, then of the others, in random order. All write to a CSVLogger, each 50 steps as is Lightning's default. Every
few blocks all processes are started anew. Shown: the ratio of the median times per step to those without a monitor,
with its bootstrap 95 % interval, by the clock and by the processes' own CPU time (which other programs on the machine
disturb less); the aim is at most 1.01. Then which part of a worker's time the calls of the monitor took, by its own
clock: of turns without a stranger the surer number, where the ratio drowns in noise, as that of a second
job without a monitor shows.

Needs: as many cores as workers, for the clock to mean something; about 5 minutes on quiet cores (`--quick`: 2).
"""

import argparse
import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import chain
from multiprocessing.connection import Connection
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from local_step import NETWORKS, Classifier, Turns, ratio
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from workers import QUIET, ask, workers

from lightning_localsgd import LocalSGDMonitor, LocalSGDStrategy
from lightning_localsgd.spread import Probe
from lightning_localsgd.worker import Worker

PERIOD = 8
ROUNDS = {"mlp": 16, "conv": 3}  # of a turn, which takes about half a second
WAYS: dict[str, bool | None] = {"without": None, "without, again": None, "monitor": False, "with an anchor": True}


class Turn(NamedTuple):
    """Seconds of a step by the clock and by CPU time, and the share of them in the monitor's own calls."""

    wall: float
    cpu: float
    own: float


class Timed(LocalSGDMonitor):
    """Times its own calls."""

    seconds = 0.0

    def on_train_batch_end(self, *args: Any) -> None:
        with_time(self, super().on_train_batch_end, *args)

    def on_fit_end(self, *_: Any) -> None:
        """No table."""


def with_time(monitor: Timed, call: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    start = time.perf_counter()
    result = call(*args, **settings)
    monitor.seconds += time.perf_counter() - start
    return result


class Tells(Turns):
    """Tells also how long the monitor took."""

    def __init__(self, pipe: Connection, block: int, monitor: Timed | None) -> None:
        super().__init__(pipe, block)
        self.monitor = monitor

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.block:
            return
        if batch_idx:
            seconds = time.perf_counter() - self.wall
            own = self.monitor.seconds / seconds if self.monitor is not None else 0.0
            self.pipe.send(Turn(seconds / self.block, (time.process_time() - self.cpu) / self.block, own))
        trainer.should_stop = not self.pipe.recv()
        if self.monitor is not None:
            self.monitor.seconds = 0.0
        self.wall, self.cpu = time.perf_counter(), time.process_time()


def train(pipe: Connection, rank: int, network: str, size: int, anchor: bool | None) -> None:
    seed_everything(rank, verbose=False)
    data = TensorDataset(torch.randn(2048, 1, 28, 28), torch.randint(10, (2048,)))
    loader = DataLoader(data, batch_size=32, sampler=RandomSampler(data, replacement=True, num_samples=10**9))
    monitor = None if anchor is None else Timed(anchor)
    if monitor is not None:  # and what is done for it elsewhere
        for owner, name in ((Probe, "begin"), (Probe, "over"), (Worker, "_tell_of_models")):
            setattr(owner, name, timed(monitor, getattr(owner, name)))
    turns = Tells(pipe, PERIOD * ROUNDS[network], monitor)
    with TemporaryDirectory() as folder:
        trainer = Trainer(
            strategy=LocalSGDStrategy(period=PERIOD),
            devices=size,
            max_epochs=1,
            use_distributed_sampler=False,
            callbacks=[turns] if monitor is None else [monitor, turns],
            **(QUIET | {"logger": CSVLogger(folder)}),
        )
        trainer.fit(Classifier(NETWORKS[network]()), loader)


def timed(monitor: Timed, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **settings: Any) -> Any:
        result = with_time(monitor, method, *args, **settings)
        return timed(monitor, result) if callable(result) else result

    return call


def measure(network: str, size: int, generations: int, repeats: int) -> list[list[dict[str, Turn]]]:
    """Return for each generation of processes, for each repeat, what a turn of each way took."""
    results = []
    for _ in range(generations):
        with ExitStack() as stack:
            jobs = {  # which of them starts first may matter
                way: stack.enter_context(workers(size, train, network, size, WAYS[way]))
                for way in random.sample(list(WAYS), len(WAYS))
            }
            for pipes in jobs.values():  # warm-up
                ask(pipes, True)
            turns = []
            for _ in range(repeats):
                turn = {}
                for way in random.sample(list(jobs), len(jobs)):
                    turn[way] = Turn(*map(mean, zip(*ask(jobs[way], True), strict=True)))
                turns.append(turn)
            results.append(turns)
            for pipe in chain(*jobs.values()):
                pipe.send(False)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--generations", type=int, default=8, help="how often the processes are started anew")
    parser.add_argument("--repeats", type=int, default=8, help="turns in a generation")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--quick", action="store_true", help="3 generations")
    args = parser.parse_args()
    generations = 3 if args.quick else args.generations
    print(f"{args.workers} workers, rounds of {PERIOD} steps, {generations} x {args.repeats} turns")
    for network in args.networks:
        results = measure(network, args.workers, generations, args.repeats)
        turns = list(chain(*results))
        step = 1000 * median(turn["without"].wall for turn in turns)
        print(f"{network}: {step:.3f} ms a step without a monitor")
        for way in list(WAYS)[1:]:
            for which, clock in enumerate(("wall clock", "CPU time")):
                middle, low, high = ratio(results, way, "without", which)
                print(f"  {way:14} {clock:10} ratio {middle:.3f}  (95 % interval {low:.3f} to {high:.3f}; aim 1.01)")
            print(f"  {way:14} own calls  {median(turn[way].own for turn in turns):.2%} of the time", flush=True)


if __name__ == "__main__":
    main()
