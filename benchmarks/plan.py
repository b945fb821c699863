"""How near `lightning-localsgd plan` comes: the throughput that it predicts against the measured one, on shaped links.

    sudo python benchmarks/plan.py

Two hosts are network namespaces joined by a bridge, with the bandwidth of each link shaped by the kernel (`tbf`, both
directions); one worker of one thread a host. At 50, 200 and 1000 Mbit/s `plan` measures a perceptron of 1.1 million
parameters (4.5 MB) on scikit-learn's digits. Then the same module trains with Lightning's own DDP, with the setting
that `plan` recommends, and with three others: float32 blocking with a period of 8, bfloat16 blocking with 64, and int8
with 16 and the delay that `plan` proposes; in random order, and medians count.

Prints the predicted and the measured steps/s of each, their ratio, and how near the recommended setting comes to the
fastest of all that were tried; exits with 1 if a ratio is off by more than 15 % or the latter by more than 5 %, but for
`--quick`, whose runs are too short to judge by.

Needs: Linux, root, `ip` and `tc` (Debian: iproute2), scikit-learn; a core for each worker, and nothing else that uses
them; about 7 minutes (`--quick`: less than one, at 100 Mbit/s, DDP and two settings, once).
"""

import argparse
import os
import random
import sys
from collections import defaultdict
from multiprocessing.connection import Connection
from statistics import median

import torch
from hosts import hosts, missing
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from network import Stopwatch
from slow_link import Digits
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from workers import QUIET, ask, workers

from lightning_localsgd import LocalSGDStrategy, Mean
from lightning_localsgd.measuring import Run, measure
from lightning_localsgd.plan import Costs, Setting, recommended, seconds, shortest_delay

DDP = Setting(1)
BATCH = 128
WORDS = [
    "--model=slow_link.Digits",
    "--data=plan.Data",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.num_nodes=2",
    "--trainer.use_distributed_sampler=false",
]


class Data(LightningDataModule):
    """Digits without an end."""

    def train_dataloader(self) -> DataLoader:
        from sklearn.datasets import load_digits  # an extra

        images, labels = load_digits(return_X_y=True)
        data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
        random_ = torch.Generator().manual_seed(int(os.environ["NODE_RANK"]))
        return DataLoader(data, BATCH, sampler=RandomSampler(data, True, num_samples=10**7, generator=random_))


def work(pipe: Connection, rank: int) -> None:
    """Do as the parent says: measure for so many seconds, or train for so many rounds; send the costs, or a step's."""
    while message := pipe.recv():
        what, amount = message
        seed_everything(0, verbose=False)
        if what == "plan":
            pipe.send(measure(Run(WORDS), amount))
            continue
        period, wire, delay = what
        strategy = DDPStrategy() if what == DDP else LocalSGDStrategy(period, mean=Mean(wire=wire, delay=delay))
        first = 2 * period if period > 1 else 3
        watch = Stopwatch(first, first + amount * period)
        trainer = Trainer(
            strategy=strategy, devices=1, num_nodes=2, max_steps=watch.last + 1, max_epochs=1,
            use_distributed_sampler=False, callbacks=watch, **QUIET,
        )  # fmt: skip
        trainer.fit(Digits(), Data())
        pipe.send((watch.end[0] - watch.start[0]) / (amount * period))


def compare(mbit: float, duration: float, others: int, repeats: int) -> tuple[Costs, dict[Setting, list[float]]]:
    """Return what `plan` has measured on links of this speed, and the seconds of a step with settings that it names."""
    measured = defaultdict(list)
    with hosts(2) as lab, workers(2, work, job=lab.enter) as pipes:
        lab.shape(mbit)
        costs, other = ask(pipes, ("plan", duration), timeout=300)
        if costs != other:
            raise RuntimeError(f"All workers must know the same costs, got {costs} and {other}.")
        delayed = Setting(16, "int8", shortest_delay(costs, 16, "int8"))
        ways = [DDP, recommended(costs), *[delayed, Setting(8), Setting(64, "bfloat16")][:others]]
        ways = list(dict.fromkeys(ways))
        for _ in range(repeats):
            for way in random.sample(ways, len(ways)):
                rounds = max(2, round(4 / (way.period * seconds(costs, way))))
                measured[way].append(max(ask(pipes, (way, rounds), timeout=300)))
        for pipe in pipes:
            pipe.send(None)
    return costs, {way: measured[way] for way in ways}


def table(mbit: float, costs: Costs, measured: dict[Setting, list[float]]) -> tuple[str, list[float], float]:
    """Return rows, the ratios of predicted to measured speed, and the recommended setting's to the fastest tried."""
    lines, ratios, best = [], [], recommended(costs)
    speeds = {way: 1 / median(several) for way, several in measured.items()}
    for way, speed in speeds.items():
        predicted = 1 / seconds(costs, way)
        ratios.append(predicted / speed)
        name = f"{way}, recommended" if way == best else str(way)
        span = f"{1 / max(measured[way]):.4g} to {1 / min(measured[way]):.4g}"
        lines.append(f"| {mbit:g} | {name} | {predicted:.4g} | {speed:.4g} | {span} | {ratios[-1]:.3f} |")
    return "\n".join(lines), ratios, speeds[best] / max(speeds.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speeds", type=float, nargs="+", default=[50, 200, 1000], help="of a link, in Mbit/s")
    parser.add_argument("--seconds", type=float, default=60, help="that `plan` may measure")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each setting; medians count")
    parser.add_argument("--quick", action="store_true", help="one speed, DDP and two settings, once")
    args = parser.parse_args()
    if lacks := missing():
        print(f"skipped: {lacks}")
        return
    if args.quick:
        args.speeds, args.seconds, args.repeats = [100], 10, 1
    off = least = 1.0
    print("| Mbit/s | setting | predicted steps/s | measured | from to | ratio |\n" + "|---" * 6 + "|", flush=True)
    for mbit in args.speeds:
        costs, measured = compare(mbit, args.seconds, 1 if args.quick else 3, args.repeats)
        rows, ratios, near = table(mbit, costs, measured)
        print(rows, flush=True)
        off, least = max(off, *ratios, *(1 / ratio for ratio in ratios)), min(least, near)
    print(
        f"\npredictions are off by a factor of {off:.3f} at most; the recommended setting has {least:.1%} of the speed"
    )
    print(f"of the fastest that was tried, or more. Load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores.")
    sys.exit(not args.quick and (off > 1.15 or least < 0.95))


if __name__ == "__main__":
    main()
