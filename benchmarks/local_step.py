"""What a local step costs: LocalSGDStrategy in a round longer than the run, against plain single-device Lightning.

    python benchmarks/local_step.py

Two workers of one LocalSGDStrategy job and two independent single-device processes, pinned to the same two cores with
one thread each, take turns: a block of steps of the one, then of the other, in random order. Every few blocks all four
processes are started anew, so that one process's luck with its memory is not taken for a cost. Shown: the ratio of the
median times per step, with its bootstrap 95 % interval, by the clock and by the processes' own CPU time (which other
programs on the machine disturb less). The aim is a ratio of at most 1.02.

Needs: as many cores as workers, for the clock to mean something; about 3 minutes on quiet cores (`--quick`: 1).
"""

import argparse
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from multiprocessing.connection import Connection
from statistics import mean, median, quantiles
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from workers import QUIET, ask, workers

from lightning_localsgd import LocalSGDStrategy

NETWORKS = {
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10)),
    "conv": lambda: nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(1600, 10),
    ),
}  # fmt: skip
BLOCK = {"mlp": 60, "conv": 12}  # steps of a turn, which takes a third of a second
OURS, PLAIN = "LocalSGDStrategy", "single device"


class Classifier(LightningModule):
    """An ordinary module: it logs, and it steps with AdamW."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.network(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Turns(Callback):
    """Trains a block of steps whenever the parent says so, and tells how long a step took."""

    def __init__(self, pipe: Connection, block: int) -> None:
        self.pipe, self.block = pipe, block

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % self.block:
            return
        if batch_idx:
            self.pipe.send(
                ((time.perf_counter() - self.wall) / self.block, (time.process_time() - self.cpu) / self.block)
            )
        trainer.should_stop = not self.pipe.recv()
        self.wall, self.cpu = time.perf_counter(), time.process_time()


def train(pipe: Connection, rank: int, network: str, size: int) -> None:
    seed_everything(rank, verbose=False)
    data = TensorDataset(torch.randn(2048, 1, 28, 28), torch.randint(10, (2048,)))
    loader = DataLoader(data, batch_size=32, sampler=RandomSampler(data, replacement=True, num_samples=10**9))
    trainer = Trainer(
        strategy=LocalSGDStrategy(period=10**9) if size > 1 else "auto",
        devices=size,
        max_epochs=1,
        use_distributed_sampler=False,
        callbacks=Turns(pipe, BLOCK[network]),
        **QUIET,
    )
    trainer.fit(Classifier(NETWORKS[network]()), loader)


def measure(network: str, size: int, generations: int, repeats: int) -> list[list[dict[str, tuple[float, float]]]]:
    """Return for each generation of processes, for each repeat, both ways' seconds per step: (clock, CPU)."""
    results = []
    for _ in range(generations):
        with ExitStack() as stack:
            ways = {
                OURS: stack.enter_context(workers(size, train, network, size)),
                PLAIN: stack.enter_context(workers(size, train, network, 1)),
            }
            for pipes in ways.values():  # warm-up
                ask(pipes, True)
            turns = []
            for _ in range(repeats):
                turn = {}
                for way in random.sample(list(ways), 2):
                    wall, cpu = zip(*ask(ways[way], True), strict=True)
                    turn[way] = mean(wall), mean(cpu)
                turns.append(turn)
            results.append(turns)
            for pipe in chain(*ways.values()):
                pipe.send(False)
    return results


def ratio(
    results: Sequence[Sequence[Mapping[str, Sequence[float]]]], way: str, to: str, which: int
) -> tuple[float, float, float]:
    """Return the ratio of median times, and its 95 % interval by resampling generations and repeats in them.

    Args:
        results: of each generation, of each repeat in it, the times of each way.
        way: above the line.
        to: below it.
        which: of the times.
    """

    def of(turns: Sequence[Mapping[str, Sequence[float]]]) -> float:
        return median(turn[way][which] for turn in turns) / median(turn[to][which] for turn in turns)

    def resample() -> float:
        generations = random.choices(results, k=len(results))
        return of([turn for turns in generations for turn in random.choices(turns, k=len(turns))])

    cuts = quantiles((resample() for _ in range(10_000)), n=40)
    return of(list(chain(*results))), cuts[0], cuts[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--generations", type=int, default=10, help="how often the processes are started anew")
    parser.add_argument("--repeats", type=int, default=4, help="pairs of blocks in a generation")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--quick", action="store_true", help="4 generations")
    args = parser.parse_args()
    generations = 4 if args.quick else args.generations
    print(f"{args.workers} workers, {generations} x {args.repeats} interleaved pairs of blocks; times per step")
    for network in args.networks:
        results = measure(network, args.workers, generations, args.repeats)
        for which, clock in enumerate(("wall clock", "CPU time")):
            ours, plain = (
                1000 * median(turn[way][which] for turns in results for turn in turns) for way in (OURS, PLAIN)
            )
            middle, low, high = ratio(results, OURS, PLAIN, which)
            print(
                f"{network:5} {clock:10}  {OURS} {ours:6.3f} ms  {PLAIN} {plain:6.3f} ms  "
                f"ratio {middle:.3f}  (95 % interval {low:.3f} to {high:.3f}; aim 1.02)",
                flush=True,
            )


if __name__ == "__main__":
    main()
