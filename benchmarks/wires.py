"""What fewer bits and delays cost in accuracy: the digits example with each wire format.

    python benchmarks/wires.py [--workers 2] [--period 4] [--epochs 20] [--seeds 0 1 2]

Workers train `examples/digits.py` as it is, with each way to average in turn, and rank 0 tests the model on the images
that were held out. For each way the table has the mean, the lowest and the highest over the seeds of the accuracy and
of the cross-entropy, and says whether the mean accuracy lies within the range of float32's seeds. All of it follows
from the seeds: averages that are delayed land after a number of steps, so a busy machine changes nothing.

Needs: scikit-learn; about ten minutes on two cores.
"""

import argparse
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean

import torch
from lightning.pytorch import Trainer, seed_everything
from workers import QUIET, ask, workers

from lightning_localsgd import LocalSGDStrategy, Mean

sys.path.append(str(Path(__file__).parent.parent))  # for the example
from examples.digits import Digits, DigitsData

REFERENCE = "float32"


def ways(period: int) -> dict[str, Mean]:
    """Return each way to average, by name."""
    return {
        REFERENCE: Mean(),
        f"float32, delay {period // 2}": Mean(delay=period // 2),
        "bfloat16": Mean(wire="bfloat16"),
        "float16": Mean(wire="float16"),
        "int8": Mean(wire="int8"),
        f"int8, delay {period // 2}": Mean(wire="int8", delay=period // 2),
        "int8, no error feedback": Mean(wire="int8", error_feedback=False),
        "int4": Mean(wire="int4"),
        "int4, stochastic rounding": Mean(wire="int4", rounding="stochastic"),
        "int4, no error feedback": Mean(wire="int4", error_feedback=False),
    }


def train(pipe: Connection, rank: int, size: int, period: int, epochs: int) -> None:
    """For each way and seed that comes, train; rank 0 sends back accuracy and cross-entropy on held-out images."""
    while (asked := pipe.recv()) is not None:
        how, seed = asked
        seed_everything(seed, verbose=False)
        model, data = Digits(), DigitsData()
        trainer = Trainer(devices=size, strategy=LocalSGDStrategy(period, mean=how), max_epochs=epochs, **QUIET)
        trainer.fit(model, data)
        data.setup("test")
        images, digits = data.test.tensors
        with torch.no_grad():
            scores = model.eval()(images)
        loss = torch.nn.functional.cross_entropy(scores, digits)
        pipe.send((100 * float((scores.argmax(1) == digits).float().mean()), float(loss)))


def spread(values: list[float], digits: int) -> str:
    """Return their mean, the lowest and the highest in words."""
    return f"{mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--period", type=int, default=4)
    options.add_argument("--epochs", type=int, default=20)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = options.parse_args()

    print("| average | test accuracy, % | cross-entropy | within float32's range |")
    print("|---|---|---|---|")
    reference: list[float] = []
    with workers(args.workers, train, args.workers, args.period, args.epochs) as pipes:
        for name, how in ways(args.period).items():
            found = [ask(pipes, (how, seed), timeout=900)[0] for seed in args.seeds]
            accuracies, losses = ([one[i] for one in found] for i in range(2))
            reference = reference or accuracies
            within = (
                "yes" if min(reference) <= mean(accuracies) else f"{mean(accuracies) - mean(reference):+.2f} points"
            )
            print(f"| {name} | {spread(accuracies, 2)} | {spread(losses, 4)} | {within} |", flush=True)
        for pipe in pipes:
            pipe.send(None)


if __name__ == "__main__":
    main()
