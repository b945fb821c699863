"""Time to an accuracy on real data over a slow link, ours against DDP with its own tuned learning rate.

    sudo python benchmarks/accuracy.py

Two hosts with links of 100 Mbit/s, one worker each, train a perceptron of 1.1 million parameters (4.5 MB) on
scikit-learn's digits, real scans: two of three to learn from, the others held out. Its average in float32 takes 20 to
40 local steps. All ways take the same number of epochs, with SGD of momentum 0.9 at a constant learning rate, which is
chosen for each way from the same grid by the final held-out accuracy, the mean over the seeds (on fast links: it does
not depend on them). Then each way trains on the slow link, once a seed, in random order.

The *target* is DDP's final accuracy less 0.5 points, for each seed. Each worker copies its replica at the end of each
epoch, and the means of these copies are evaluated after the run, so that evaluation does not give a delayed average
time to arrive. The time to a target runs to the end of the first epoch with that accuracy, and what the end of `fit`
takes is added, in which all average once more.

Prints a table, which `docs/performance.md` shows, and writes the picture `docs/accuracy.png`. Needs: Linux, root, `ip`
and `tc` (Debian: iproute2), scikit-learn, matplotlib; a core for each worker; about 8 minutes (`--quick`: one, of one
seed, and no picture).
"""

import argparse
import os
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch
from hosts import hosts, missing, sent
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy, Strategy
from slow_link import Digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from workers import QUIET, ask, workers

from lightning_localsgd import LocalSGDStrategy, Mean

BATCH = 64  # of each worker
RATES = (0.05, 0.1, 0.2, 0.4)
POINTS = 0.005
DDP = "DDP"
WAYS: dict[str, Callable[[], Strategy]] = {
    DDP: DDPStrategy,
    "period 32, float32, blocking": lambda: LocalSGDStrategy(32),
    "period 32, float32, delay 31": lambda: LocalSGDStrategy(32, mean=Mean(delay=31)),
    "period 16, int8, delay 8": lambda: LocalSGDStrategy(16, mean=Mean(wire="int8", delay=8)),
}
PICTURE = Path(__file__).parent.parent / "docs" / "accuracy.png"


class Run(NamedTuple):
    """Of one seed."""

    seconds: list[float]  # of training until the end of each epoch
    accuracies: list[float]
    ending: float  # seconds that the end of `fit` took
    megabytes: float  # sent by a host, 10^6 bytes


def time_to(run: Run, target: float) -> float:
    """Return the seconds to this accuracy, infinite if it is not reached."""
    for seconds, accuracy in zip(run.seconds, run.accuracies, strict=True):
        if accuracy >= target - 1e-9:
            return seconds + run.ending
    return float("inf")


# ------------------------------------------------------------------------------------------------------------- training


def data() -> tuple[TensorDataset, TensorDataset]:
    """Return the digits to learn from, and those held out."""
    from sklearn.datasets import load_digits  # an extra

    pixels, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)
    held_out = torch.arange(len(labels)) % 3 == 2
    return TensorDataset(images[~held_out], labels[~held_out]), TensorDataset(images[held_out], labels[held_out])


class Perceptron(Digits):
    """The network of `slow_link.py`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return torch.nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.9)


class Copies(Callback):
    """Copies the replica at the end of each epoch, and notes when that is."""

    def __init__(self) -> None:
        self.replicas: list[Tensor] = []
        self.seconds: list[float] = []

    def on_train_start(self, *_: Any) -> None:
        self.start = time.perf_counter(), sent()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.end = time.perf_counter(), sent()
        if trainer.is_last_batch:
            self.seconds.append(self.end[0] - self.start[0])
            self.replicas.append(torch.nn.utils.parameters_to_vector(pl_module.parameters()).detach())


@torch.no_grad()
def accuracy(parameters: Tensor, test: TensorDataset) -> float:
    """Return the share of held-out digits that a network of these parameters gets right."""
    model = Perceptron(0.0)
    torch.nn.utils.vector_to_parameters(parameters, model.parameters())
    images, labels = test.tensors
    return float((model.network(images).argmax(1) == labels).float().mean())


def train(pipe: Connection, rank: int, folder: str) -> None:
    """Train as the parent says, time after time: receives (way, rate, seed, epochs), sends what is left of a run."""
    part, test = data()
    while message := pipe.recv():
        way, rate, seed, epochs = message
        seed_everything(seed, verbose=False)
        copies = Copies()
        trainer = Trainer(strategy=WAYS[way](), devices=1, num_nodes=2, max_epochs=epochs, callbacks=copies, **QUIET)
        trainer.fit(Perceptron(rate), DataLoader(part, batch_size=BATCH, shuffle=True, drop_last=True))
        ending = time.perf_counter() - copies.end[0]
        torch.save(copies.replicas, Path(folder, str(rank)))
        pipe.send((copies.seconds, ending, (sent() - copies.start[1]) / 1e6))
        pipe.recv()  # when both have saved
        if rank == 0:
            others = torch.load(Path(folder, "1"))
            pipe.send([accuracy((own + other) / 2, test) for own, other in zip(copies.replicas, others, strict=True)])


def run(pipes: list[Connection], way: str, rate: float, seed: int, epochs: int) -> Run:
    (seconds, ending, megabytes), _ = ask(pipes, (way, rate, seed, epochs), timeout=1200)
    pipes[1].send(None)
    return Run(seconds, ask(pipes[:1], None)[0], ending, megabytes)


Runs = dict[str, list[Run]]  # by way, one of each seed


def measure(mbit: float, seeds: Sequence[int], rates: Sequence[float], epochs: int) -> tuple[dict[str, float], Runs]:
    """Return the learning rate of each way, and the runs with it on the slow link."""
    finals: dict[str, dict[float, float]] = defaultdict(dict)
    runs: Runs = {way: [] for way in WAYS}
    with (
        tempfile.TemporaryDirectory() as folder,
        hosts(2) as lab,
        workers(2, train, folder, job=lab.enter) as pipes,
    ):
        lab.shape(10_000)
        run(pipes, DDP, rates[0], 0, 1)  # starts the process group, warms up
        for way in WAYS:
            for rate in rates if len(rates) > 1 else ():
                finals[way][rate] = mean(run(pipes, way, rate, seed, epochs).accuracies[-1] for seed in seeds)
            if finals[way]:
                print(f"{way}: " + ", ".join(f"{100 * of:.2f} % at {at}" for at, of in finals[way].items()), flush=True)
        chosen = {way: max(rates, key=lambda rate: finals[way].get(rate, 0.0)) for way in WAYS}
        lab.shape(mbit)
        for seed in seeds:
            for way in random.sample(list(WAYS), len(WAYS)):
                runs[way].append(run(pipes, way, chosen[way], seed, epochs))
        for pipe in pipes:
            pipe.send(None)
    return chosen, runs


def table(chosen: dict[str, float], runs: Runs) -> str:
    """Return the table of the documentation."""
    lines = [
        "| | learning rate | final accuracy, % | s to target | DDP's / this | s of all epochs | MB sent |",
        "|" + "---|" * 7,
    ]
    for way, several in runs.items():
        targets = [ddp.accuracies[-1] - POINTS for ddp in runs[DDP]]
        ours = [time_to(of, target) for of, target in zip(several, targets, strict=True)]
        ratios = [time_to(ddp, target) / own for ddp, target, own in zip(runs[DDP], targets, ours, strict=True)]
        finals = ", ".join(f"{100 * of.accuracies[-1]:.2f}" for of in several)
        lines.append(
            f"| {way} | {chosen[way]} | {finals} | {', '.join(f'{own:.2f}' for own in ours)} | "
            f"{', '.join(f'{ratio:.1f}' for ratio in ratios)}; median {median(ratios):.1f} | "
            f"{median(of.seconds[-1] + of.ending for of in several):.2f} | {several[0].megabytes:.1f} |"
        )
    return "\n".join(lines)


def draw(runs: Runs, mbit: float) -> None:
    import matplotlib.pyplot as plt  # an extra

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    target = median(ddp.accuracies[-1] for ddp in runs[DDP]) - POINTS
    axes.axhline(100 * target, color="gray", linestyle=":", linewidth=1)
    for number, (way, several) in enumerate(runs.items()):
        for place, of in enumerate(several):
            values = [100 * value for value in of.accuracies]
            axes.plot(of.seconds, values, f"C{number}-", label=None if place else way, linewidth=1.2, alpha=0.8)
    axes.set_xscale("log")
    axes.set_ylim(bottom=max(0, 100 * target - 12), top=100)
    axes.set_xlabel(f"wall time, s (links of {mbit:g} Mbit/s)")
    axes.set_ylabel("held-out accuracy, %")
    axes.set_title(f"Digits, two hosts, {len(runs[DDP])} seeds; dotted: the target", fontsize=10)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(PICTURE, dpi=140)
    print(f"\nwrote {PICTURE}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", type=float, default=100, help="of each link, in Mbit/s")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates; one is just taken")
    parser.add_argument("--quick", action="store_true", help="one seed, one learning rate, 4 epochs, no picture")
    args = parser.parse_args()
    if lacks := missing():
        print(f"skipped: {lacks}")
        return
    seeds, rates, epochs = range(args.seeds), args.rates, args.epochs
    if args.quick:
        seeds, rates, epochs = range(1), (0.1,), 4
    chosen, runs = measure(args.mbit, seeds, rates, epochs)
    print(f"\n{table(chosen, runs)}\n\n{epochs} epochs, load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")
    if not args.quick:
        draw(runs, args.mbit)


if __name__ == "__main__":
    main()
