"""The paper's experiment, in kind: ResNet-20 with I = 1, 4, 8, 16, 32, against epochs and against wall time.

    sudo python benchmarks/paper.py

Two hosts on a slow link, one worker each, train the ResNet-20 of `examples/resnet20.py` (the CIFAR variant of He et al.
2016: 0.27 million parameters, BatchNorm, shortcuts without parameters) with plain SGD, a constant learning rate and no
augmentation, from one seed. I = 1 averages gradients, as DDP does. After each epoch the average of the workers is
evaluated; its loss is that on the training images, with the running statistics of BatchNorm. Evaluation is not in the
wall time.

The images are CIFAR-10 where torchvision is installed and finds or can download it, else scikit-learn's digits, real
scans of 8 x 8 pixels, enlarged to 16 x 16. The setting is ours: what the paper used besides model, data and I was not
at hand. No number here is one of the paper's.

Prints a table and draws `docs/paper.png`. Needs: Linux, root, `ip` and `tc` (Debian: iproute2), scikit-learn or
torchvision, matplotlib; a core for each worker; about a quarter of an hour with the digits (`--quick`: two minutes,
with fewer epochs and I = 1, 8, 32, and no picture).
"""

import argparse
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hosts import hosts, missing, sent
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader
from workers import QUIET, ask, listen, workers

from lightning_localsgd import LocalSGDStrategy

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # for the example
from examples.resnet20 import DATA, ResNet20, found  # noqa: E402

INTERVALS = (1, 4, 8, 16, 32)
BATCH = 32  # of each worker
RATE = 0.1
PICTURE = ROOT / "docs" / "paper.png"


class Evaluated(ResNet20):
    """ResNet-20, with the loss on the first loader's images and the accuracy on the second's."""

    def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        outputs = self.network(batch[0])
        if dataloader_idx == 0:
            value = functional.cross_entropy(outputs, batch[1])
        else:
            value = (outputs.argmax(1) == batch[1]).float().mean()
        name = ("loss", "accuracy")[dataloader_idx]
        self.log(name, value, batch_size=len(batch[1]), sync_dist=True, add_dataloader_idx=False)


class Epoch(NamedTuple):
    """Where a run is after an epoch."""

    loss: float
    accuracy: float
    seconds: float  # of training since the start
    megabytes: float  # sent by a worker in training since the start, 10^6 bytes


class Watch(Callback):
    """Notes where the run is after each epoch; what comes between two epochs' steps is not counted."""

    def __init__(self) -> None:
        self.epochs: list[Epoch] = []
        self.begun = self.now = self.before = (0.0, 0.0)  # seconds, megabytes

    def on_train_epoch_start(self, *_: Any) -> None:
        self.begun = time.perf_counter(), sent() / 1e6

    def on_train_batch_end(self, *_: Any) -> None:
        self.now = time.perf_counter(), sent() / 1e6

    def on_validation_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        spent = [total + now - begun for total, now, begun in zip(self.before, self.now, self.begun, strict=True)]
        self.before = spent[0], spent[1]
        metrics = trainer.callback_metrics
        self.epochs.append(Epoch(float(metrics["loss"]), float(metrics["accuracy"]), *spent))


def train(pipe: Connection, rank: int, size: int, name: str) -> None:
    """Train as the parent says, time after time: receives (interval, epochs), sends what each epoch gave."""
    data = DATA[name](False)
    part = torch.utils.data.Subset(data.train, range(min(10_000, len(data.train))))  # of which the loss is taken
    while message := pipe.recv():
        interval, epochs = message
        seed_everything(0, verbose=False)
        model, watch = Evaluated(lr=RATE), Watch()
        trainer = Trainer(
            strategy=LocalSGDStrategy(interval),
            devices=1,
            num_nodes=size,
            max_epochs=epochs,
            num_sanity_val_steps=0,
            callbacks=watch,
            **QUIET,
        )
        loader = DataLoader(data.train, batch_size=BATCH, shuffle=True, drop_last=True)
        trainer.fit(model, loader, [DataLoader(of, batch_size=256) for of in (part, data.test)])
        pipe.send((trainer.global_step, watch.epochs))


class Run(NamedTuple):
    """What training with one interval gave."""

    steps: int
    epochs: list[Epoch]

    @property
    def seconds(self) -> float:
        return self.epochs[-1].seconds


def measure(name: str, size: int, mbit: float, intervals: Sequence[int], epochs: int) -> dict[int, Run]:
    """Return what each interval gave, as the first worker saw it."""
    with hosts(size) as lab, workers(size, train, size, name, job=lab.enter) as pipes:
        lab.shape(mbit)
        ask(pipes, (8, 1), timeout=600)  # starts the process group, warms up
        runs = {}
        for interval in intervals:
            for pipe in pipes:
                pipe.send((interval, epochs))
            runs[interval] = Run(*listen(pipes, timeout=24 * 3600)[0])
            print(f"I = {interval}: {runs[interval].seconds:.0f} s", flush=True)
        for pipe in pipes:
            pipe.send(None)
    return runs


def table(runs: dict[int, Run]) -> str:
    """Return the table of the documentation."""
    first = next(iter(runs.values()))
    lines = [
        "| I | rounds | training loss | test accuracy, % | s per epoch | times as fast as I = 1 | MB sent per epoch |",
        "|" + "---|" * 7,
    ]
    for interval, run in runs.items():
        last, number = run.epochs[-1], len(run.epochs)
        lines.append(
            f"| {interval} | {run.steps / interval:.0f} | {last.loss:.4f} | {100 * last.accuracy:.1f} | "
            f"{run.seconds / number:.2f} | {first.seconds / run.seconds:.2f} | {last.megabytes / number:.2f} |"
        )
    return "\n".join(lines)


def draw(runs: dict[int, Run], title: str) -> None:
    import matplotlib.pyplot as plt  # an extra

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, 2, figsize=(9.2, 6.6), layout="constrained", sharey="row")
    for number, (interval, run) in enumerate(runs.items()):
        losses, accuracies, seconds, _ = zip(*run.epochs, strict=True)
        numbers = range(1, len(losses) + 1)
        for row, values in enumerate((losses, [100 * accuracy for accuracy in accuracies])):
            for axis, against in zip(axes[row], (numbers, seconds), strict=True):
                axis.plot(against, values, f"C{number}-", label=f"I = {interval}", linewidth=1.4)
    axes[0, 0].set_yscale("log")
    axes[0, 0].set_ylabel("training loss of the average")
    axes[1, 0].set_ylabel("test accuracy of the average, %")
    lowest = min(run.epochs[len(run.epochs) // 4].accuracy for run in runs.values())
    axes[1, 0].set_ylim(100 * lowest // 10 * 10, 100.3)
    axes[1, 0].xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].sharex(axes[1, 0])
    for axis, name in zip(axes[1], ("epochs", "wall time, s"), strict=True):
        axis.set_xlabel(name)
    figure.suptitle(title, fontsize=10)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(runs), frameon=False)
    figure.savefig(PICTURE, dpi=140)
    print(f"\nwrote {PICTURE}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="and hosts")
    parser.add_argument("--mbit", type=float, default=20, help="of each link, in Mbit/s")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="4 epochs with I = 1, 8 and 32, no picture")
    args = parser.parse_args()
    if lacks := missing():
        print(f"skipped: {lacks}")
        return
    name, epochs = found(), 4 if args.quick else args.epochs
    runs = measure(name, args.workers, args.mbit, (1, 8, 32) if args.quick else INTERVALS, epochs)
    size = sum(parameter.numel() for parameter in ResNet20().parameters())
    title = (
        f"ResNet-20 ({size / 1e6:.2f} million parameters) on {name}\n"
        f"{args.workers} workers, batches of {BATCH} each, SGD at {RATE}, links of {args.mbit:g} Mbit/s"
    )
    print(f"\n{title}; {epochs} epochs of {next(iter(runs.values())).steps // epochs} steps\n\n{table(runs)}")
    if not args.quick:
        draw(runs, title)


if __name__ == "__main__":
    main()
