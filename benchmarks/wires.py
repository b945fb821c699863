"""What fewer bits and delays cost in accuracy: two of the examples with each wire format.

    python benchmarks/wires.py [digits] [gpt] [--workers 2] [--period 4] [--seeds 0 1 2] [--ways WAY ...]

`digits` is `examples/digits.py` as it is, `gpt` the small GPT of `benchmarks/learning_rates.py`. Workers train it with
each way to average in turn, and rank 0 tests the model on what was held out. The table has the mean, the lowest and the
highest over the seeds of the error (of images, or bits per character) and of the cross-entropy, and says whether the
mean cross-entropy lies within the range of float32's seeds. All of it follows from the seeds: averages that are delayed
land after a number of steps, so a busy machine changes nothing.

Needs: scikit-learn; about ten minutes on two cores for each example.
"""

import argparse
from collections.abc import Callable
from multiprocessing.connection import Connection
from statistics import mean
from typing import NamedTuple

import torch
from learning_rates import TASKS, Data, Digits, DigitsData, SmallGPT, text_data
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader
from workers import QUIET, ask, workers

from lightning_localsgd import LocalSGDStrategy, Mean

REFERENCE = "float32"


class Example(NamedTuple):
    """What is trained."""

    data: Callable[[], Data]
    model: Callable[[], LightningModule]
    batch: int  # of one worker
    epochs: int


def all_digits() -> Data:
    data = DigitsData()
    data.setup("fit")
    images, digits = data.test.tensors
    return Data(data.train, (images, digits))


EXAMPLES = {
    "digits": Example(all_digits, Digits, batch=32, epochs=20),
    "gpt": Example(text_data, lambda: SmallGPT(TASKS["gpt"].rate, warm_up=True), TASKS["gpt"].batch, epochs=2),
}


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


def train(pipe: Connection, rank: int, size: int, period: int) -> None:
    """For each example, way and seed that comes, train, and send back cross-entropy and error on what was held out."""
    while (asked := pipe.recv()) is not None:
        name, how, seed = asked
        example, task = EXAMPLES[name], TASKS[name]
        seed_everything(seed, verbose=False)
        model, data = example.model(), example.data()
        strategy = LocalSGDStrategy(period, mean=how)
        trainer = Trainer(devices=size, strategy=strategy, max_epochs=example.epochs, **QUIET)
        trainer.fit(model, DataLoader(data.train, example.batch, shuffle=True, drop_last=True))
        inputs, targets = data.test
        with torch.no_grad():
            scores = model.eval()(inputs)
            pipe.send((float(task.loss(scores, targets)), task.shown(scores, targets)))


def spread(values: list[float], digits: int) -> str:
    """Return their mean, the lowest and the highest in words."""
    return f"{mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("examples", nargs="*", default=list(EXAMPLES))
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--period", type=int, default=4)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--ways", nargs="+", help="names of the table's rows")
    args = options.parse_args()

    asked = [REFERENCE, *(args.ways or [way for way in ways(args.period) if way != REFERENCE])]
    with workers(args.workers, train, args.workers, args.period) as pipes:
        for name in args.examples:
            print(f"| average | {TASKS[name].column} | cross-entropy | within float32's range |")
            print("|---|---|---|---|", flush=True)
            reference: list[float] = []
            for way in asked:
                found = [ask(pipes, (name, ways(args.period)[way], seed), timeout=1800)[0] for seed in args.seeds]
                losses, errors = ([one[i] for one in found] for i in range(2))
                reference = reference or losses
                more = mean(losses) - mean(reference)
                within = "yes" if mean(losses) <= max(reference) else f"no, {more:+.4f}"
                print(f"| {way} | {spread(errors, 3)} | {spread(losses, 4)} | {within} |", flush=True)
        for pipe in pipes:
            pipe.send(None)


if __name__ == "__main__":
    main()
