"""How fast two hosts train over a slow link: DDPStrategy against LocalSGDStrategy, by period.

    sudo python benchmarks/slow_link.py

Two network namespaces stand for two hosts, joined by a bridge, with the bandwidth of each link shaped by the kernel
(`tbf`, both directions). One worker a host trains the same LightningModule, an MLP of 1.1 million parameters (4.5 MB)
on scikit-learn's digits, for the same number of steps under each strategy, in random order. Shown: time per step, and
speed relative to the same two workers each training alone in the same run (so 100 % is a network that costs nothing),
with the bytes that a host sent per step by the kernel's counter. Of several runs the fastest counts: whatever else
the machine does can only slow a run down. Writes the picture `docs/speed.png`.

Needs: Linux, root, `ip` and `tc` (Debian: iproute2), scikit-learn, matplotlib; at least 2 cores; about 5 minutes
(`--quick`: one, and no picture).
"""

import argparse
import random
import time
from collections import defaultdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from hosts import hosts, missing, sent
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from workers import QUIET, ask, workers

from lightning_localsgd import LocalSGDStrategy

PERIODS = (1, 2, 4, 8, 16, 32)
ALONE, DDP = "alone", "DDP"  # ways to train beside the periods
PICTURE = Path(__file__).parent.parent / "docs" / "speed.png"


# ------------------------------------------------------------------------------------------------------------- training


class Digits(LightningModule):
    """A perceptron with two hidden layers."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.network(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Stopwatch(Callback):
    """Measures seconds and bytes sent from the end of step ``first`` on."""

    def __init__(self, first: int) -> None:
        self.first = first

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.first:
            self.start = time.perf_counter(), sent()
        self.end = time.perf_counter(), sent()


class Cost(NamedTuple):
    """Of one step."""

    seconds: float
    bytes: float


def train(pipe: Connection, rank: int) -> None:
    """Train as the parent says, time after time: receives (way, steps), sends the cost."""
    from sklearn.datasets import load_digits  # an extra

    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    while message := pipe.recv():
        way, steps = message
        if way == "all_reduce":
            payload = torch.cat([parameter.detach().flatten() for parameter in Digits().parameters()])
            start = time.perf_counter(), sent()
            for _ in range(steps):
                dist.all_reduce(payload)
            end = time.perf_counter(), sent()
        else:
            seed_everything(0, verbose=False)
            strategies = {ALONE: lambda: "auto", DDP: DDPStrategy}
            strategy = strategies[way]() if way in strategies else LocalSGDStrategy(way)
            first = max(2, way) if way in PERIODS else 2  # whole rounds, and the first one is for warming up
            watch = Stopwatch(first)
            trainer = Trainer(
                strategy=strategy,
                devices=1,
                num_nodes=1 if way == ALONE else 2,
                max_steps=first + steps,
                max_epochs=1,
                use_distributed_sampler=False,
                callbacks=watch,
                **QUIET,
            )
            sampler = RandomSampler(
                data, replacement=True, num_samples=10**7, generator=torch.Generator().manual_seed(rank)
            )
            trainer.fit(Digits(), DataLoader(data, batch_size=256, sampler=sampler))
            start, end = watch.start, watch.end
        pipe.send(Cost(*((after - before) / steps for before, after in zip(start, end, strict=True))))


def measure(speeds: list[int], ways: list[Any], steps: int, repeats: int) -> dict[tuple[int, Any], Cost]:
    """Return for each speed of the link, for each way to train, the cost of a step in the fastest run."""
    costs = defaultdict(list)
    with hosts() as lab, workers(2, train, job=lab.enter) as pipes:
        ask(pipes, (DDP, 2))  # starts the process group, warms up
        for _ in range(repeats):
            for mbit in speeds:
                lab.shape(mbit)
                for way in random.sample(ways, len(ways)):
                    costs[mbit, way].append(max(ask(pipes, (way, 8 if way == "all_reduce" else steps))))
        for pipe in pipes:
            pipe.send(None)
    return {key: min(several) for key, several in costs.items()}


def show(costs: dict[tuple[int, Any], Cost], speeds: list[int], ways: list[Any]) -> None:
    payload = sum(parameter.nbytes for parameter in Digits().parameters())
    for mbit in speeds:
        alone, raw = costs[mbit, ALONE], costs[mbit, "all_reduce"]
        floor = payload * 8 / (mbit * 1e6)
        print(f"\n{mbit} Mbit/s; model of {payload / 1e6:.2f} MB; payload / rate = {1000 * floor:.0f} ms")
        print("                  ms/step   speed, % of alone   vs DDP   MB sent/step   sent/payload")
        for way in ways:
            cost = costs[mbit, way]
            name = f"period {way}" if way in PERIODS else way
            relative, faster = alone.seconds / cost.seconds, costs[mbit, DDP].seconds / cost.seconds
            print(
                f"  {name:12} {1000 * cost.seconds:10.1f} {100 * relative:19.1f} {faster:8.2f} "
                f"{cost.bytes / 1e6:14.3f} {cost.bytes / payload:14.3f}",
                flush=True,
            )
        print(f"  a bare all_reduce of the model takes {raw.seconds / floor:.2f} times payload / rate")


def draw(costs: dict[tuple[int, Any], Cost], speeds: list[int]) -> None:
    import matplotlib.pyplot as plt  # an extra

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    axes.axhline(100, color="lightgray", zorder=0)
    for number, mbit in enumerate(sorted(speeds, reverse=True)):
        relative = {way: 100 * costs[mbit, ALONE].seconds / costs[mbit, way].seconds for way in (DDP, *PERIODS)}
        name = f"{mbit // 1000} Gbit/s" if mbit % 1000 == 0 else f"{mbit} Mbit/s"
        axes.plot(PERIODS, [relative[period] for period in PERIODS], f"C{number}o-", label=name)
        axes.axhline(relative[DDP], color=f"C{number}", linestyle=":", label=f"{name}, DDP")
    axes.set_xscale("log", base=2)
    axes.set_xticks(PERIODS, [str(period) for period in PERIODS])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("period: steps between two averages")
    axes.set_ylabel("speed, % of a worker without network")
    figure.legend(loc="outside upper center", ncols=len(speeds), frameon=False)
    figure.savefig(PICTURE, dpi=160)
    print(f"\nwrote {PICTURE}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speeds", type=int, nargs="+", default=[100, 1000], help="of a link, in Mbit/s")
    parser.add_argument("--steps", type=int, default=32, help="timed steps of each run")
    parser.add_argument("--repeats", type=int, default=4, help="runs of each way; the fastest counts")
    parser.add_argument("--quick", action="store_true", help="once, with periods 1, 8 and 32, no picture")
    args = parser.parse_args()
    if lacks := missing():
        print(f"skipped: {lacks}")
        return
    periods = (1, 8, 32) if args.quick else PERIODS
    ways = [ALONE, DDP, *periods]
    costs = measure(args.speeds, [*ways, "all_reduce"], args.steps, 1 if args.quick else args.repeats)
    show(costs, args.speeds, ways)
    if not args.quick:
        draw(costs, args.speeds)


if __name__ == "__main__":
    main()
