"""What to do with the learning rate: for N workers and rounds of I steps, with and without an outer optimizer.

    python benchmarks/learning_rates.py [digits] [gpt] [--keep FILE]

Two of the examples, made small: `digits` (8 channels, SGD with momentum 0.9) and `gpt` (width 32, pieces of 32, a
quarter of the text, AdamW). Each setting trains for the same passes over the data with 1 and 2 times a learning rate
near the best one of a single worker, and on by factors of 2 as long as the best is at an edge (1/16 to 16). The rate
rises in a line for the first tenth of the run and then falls to 0; some settings are also run without this warm-up.
N workers take an N-th of the steps, since each keeps its own batch size. Real Lightning runs with `LocalSGDStrategy` in
real processes; the score is that of the model on which all agree at the end, on held-out data: loss, and errors or bits
per character.

Rates are chosen, and scored, on the same held-out data: the table is about the choice, not about records. "As good" are
the rates whose mean loss is within twice the noise of a difference: the median, over all that was run, of the standard
deviation between seeds of the difference to multiple 1, divided by the square root of their number.

Needs: scikit-learn; up to four processes of one thread; about half an hour of one core (`--quick`: 2 minutes). With
`--keep` a run that was broken off goes on where it was.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache, partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from workers import QUIET, ask, workers

from lightning_localsgd import DiLoCo, LocalSGDStrategy, PostLocal, SlowMo

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # for the examples
from examples.digits import Digits, DigitsData  # noqa: E402
from examples.gpt import GPT, ReferenceData  # noqa: E402

MULTIPLES = (1 / 16, 16)  # as far as the search goes
WARM_UP = 0.1  # of the steps, where there is one
POST_LOCAL = 0.25  # of the steps average gradients


class Setting(NamedTuple):
    """Who trains, and how they come together: a row of the table."""

    workers: int
    period: int
    method: str  # "mean", "DiLoCo", "SlowMo", "post-local"


class Trial(NamedTuple):
    """One run."""

    task: str
    setting: Setting
    rate: float
    warm_up: bool
    seed: int
    epochs: int


class Score(NamedTuple):
    """What a run came to on held-out data."""

    loss: float
    shown: float  # error in percent, or bits per character


Scores = dict[float, list[Score]]  # of each multiple, one for each seed


class Data(NamedTuple):
    """Tensors of a task."""

    train: TensorDataset
    test: tuple[Tensor, Tensor]


class Task(NamedTuple):
    """An example, made small."""

    data: Callable[[], Data]
    model: Callable[[float, bool], LightningModule]
    loss: Callable[[Tensor, Tensor], Tensor]
    shown: Callable[[Tensor, Tensor], float]
    column: str
    batch: int  # of one worker
    epochs: int
    rate: float  # multiple 1: near the best one of a single worker
    seeds: int
    strategy: Mapping[str, Mapping[str, Any]]  # arguments, by method


# ------------------------------------------------------------------------------------------------------------ the tasks


def falling(module: LightningModule, optimizer: torch.optim.Optimizer, warm_up: bool) -> dict[str, Any]:
    """Let the learning rate fall to zero in a line, maybe after it has risen in one."""
    steps = module.trainer.estimated_stepping_batches

    def factor(step: int) -> float:
        rise = (step + 1) / (WARM_UP * steps) if warm_up else 1.0
        return min(rise, 1 - step / steps)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class SmallDigits(Digits):
    """The digits' network, narrow, by SGD."""

    def __init__(self, rate: float, warm_up: bool) -> None:
        super().__init__(width=8, lr=rate)
        self.warm_up = warm_up

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9, weight_decay=5e-4)
        return falling(self, optimizer, self.warm_up)


class SmallGPT(GPT):
    """The GPT, narrow, for shorter pieces."""

    def __init__(self, rate: float, warm_up: bool) -> None:
        super().__init__(width=32, heads=2, context=32, lr=rate)
        self.warm_up = warm_up

    def configure_optimizers(self) -> dict[str, Any]:
        decay = self.hparams.weight_decay
        # Fused, since most of the time of so small a model goes into calls.
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr, weight_decay=decay, fused=True)
        return falling(self, optimizer, self.warm_up)


@cache
def digits_data() -> Data:
    data = DigitsData()
    data.setup("fit")
    # Nothing is stopped early here, so that the images to validate on are held-out ones as well.
    held_out = (data.val, data.test)
    test = tuple(torch.cat([part.tensors[index] for part in held_out]) for index in (0, 1))
    return Data(data.train, (test[0], test[1]))


@cache
def text_data() -> Data:
    data = ReferenceData(context=32)
    data.setup("fit")
    characters, following = data.test.tensors
    return Data(TensorDataset(*(part[::4] for part in data.train.tensors)), (characters[::2], following[::2]))


TASKS = {
    "digits": Task(
        data=digits_data,
        model=SmallDigits,
        loss=nn.functional.cross_entropy,
        shown=lambda scores, digits: 100 * (scores.argmax(1) != digits).float().mean().item(),
        column="% wrong",
        batch=16,
        epochs=6,
        rate=0.1,
        seeds=2,
        strategy={"SlowMo": {"optimizer_state": "reset"}},
    ),
    "gpt": Task(
        data=text_data,
        model=SmallGPT,
        loss=lambda scores, following: nn.functional.cross_entropy(scores.flatten(0, 1), following.flatten()),
        shown=lambda scores, following: (
            nn.functional.cross_entropy(scores.flatten(0, 1), following.flatten()).item() / math.log(2)
        ),
        column="bits",
        batch=8,
        epochs=2,
        rate=0.016,
        seeds=2,
        strategy={},
    ),
}


def settings(quick: bool) -> list[Setting]:
    """Return the rows of the table; the first is the single worker to which the others are compared."""
    one = Setting(1, 1, "mean")
    if quick:
        return [one, Setting(4, 8, "mean"), Setting(4, 8, "DiLoCo")]
    return [
        one,
        *(Setting(n, i, "mean") for n in (2, 4) for i in (1, 8, 32)),
        *(Setting(n, i, "DiLoCo") for n in (1, 2, 4) for i in (8, 32)),
        *(Setting(4, 8, method) for method in ("SlowMo", "post-local")),
    ]


# ------------------------------------------------------------------------------------------------------------- the runs


def also_without_warm_up(setting: Setting) -> bool:
    """Whether a row is also run without a warm-up: a single worker, and four with rounds of 8 steps."""
    return setting == Setting(1, 1, "mean") or (setting[:2] == (4, 8) and setting.method in ("mean", "DiLoCo"))


def steps_of(samples: int, setting: Setting, batch: int, epochs: int) -> int:
    """Return how many steps each worker takes, its share rounded up and its last batch left out if not full."""
    return epochs * (math.ceil(samples / setting.workers) // batch)


def strategy(trial: Trial) -> LocalSGDStrategy:
    task, (_, period, method) = TASKS[trial.task], trial.setting
    arguments = dict(task.strategy.get(method, {}))
    if method == "post-local":
        steps = steps_of(len(task.data().train), trial.setting, task.batch, trial.epochs)
        return LocalSGDStrategy(PostLocal(round(POST_LOCAL * steps), then=period), **arguments)
    outer = {"mean": None, "DiLoCo": DiLoCo(), "SlowMo": SlowMo()}[method]
    return LocalSGDStrategy(period, outer=outer, **arguments)


def train(trial: Trial, rank: int) -> Score | None:
    """Train as one of the workers; rank 0 returns the score of the consensus."""
    task = TASKS[trial.task]
    seed_everything(trial.seed, verbose=False)
    model = task.model(trial.rate, trial.warm_up)
    torch.manual_seed(1000 * trial.seed + rank)  # so that dropout differs between workers
    data = task.data()
    trainer = Trainer(
        **QUIET,
        devices=trial.setting.workers,
        strategy=strategy(trial),
        max_epochs=trial.epochs,
        log_every_n_steps=10**6,
    )
    try:
        trainer.fit(model, DataLoader(data.train, task.batch, shuffle=True, drop_last=True))
    except RuntimeError as error:
        if "finite" not in str(error):
            raise
        return Score(math.inf, math.nan)  # all workers raise alike when one is no longer finite
    if rank:
        return None
    model.eval()
    inputs, targets = data.test
    with torch.no_grad():
        outputs = torch.cat([model(part) for part in inputs.split(512)])
        loss = task.loss(outputs, targets).item()
        return Score(loss if math.isfinite(loss) else math.inf, task.shown(outputs, targets))


def work(pipe: Connection, rank: int) -> None:
    while trial := pipe.recv():
        pipe.send(train(trial, rank))


# ----------------------------------------------------------------------------------------------------------- the search


def climb(losses: Callable[[float], Sequence[float]], limits: tuple[float, float]) -> float:
    """Try multiples 1 and 2, and on by factors of 2 while the best is at an edge; return the best.

    Args:
        losses: those of a multiple, one for each seed; asked once for each.
        limits: of the multiples, powers of 2.
    """
    found = {multiple: mean(losses(multiple)) for multiple in (1.0, 2.0)}
    while True:
        best = min(found, key=lambda multiple: found[multiple])
        further = best / 2 if best == min(found) else 2 * best if best == max(found) else None
        if further is None or not limits[0] <= further <= limits[1]:
            return best
        found[further] = mean(losses(further))


def noise(all_scores: Iterable[Scores]) -> float:
    """Return how well the difference of two rates is known: 0 with a single seed.

    What a seed does to all rates alike does not count: it is the differences to multiple 1 whose spread is taken.
    """
    spreads, seeds = [], 1
    for scores in all_scores:
        for multiple in scores:
            differences = [at.loss - one.loss for at, one in zip(scores[multiple], scores[1.0], strict=True)]
            seeds = len(differences)
            if multiple != 1 and seeds > 1 and all(map(math.isfinite, differences)):
                spreads.append(stdev(differences))
    return median(spreads) / math.sqrt(seeds) if spreads else 0.0


def choice(scores: Scores, within: float) -> tuple[float, float, float]:
    """Return the best multiple, and the lowest and highest of those around it that are worse by at most ``within``."""
    losses = {multiple: mean(score.loss for score in scores[multiple]) for multiple in sorted(scores)}
    best = min(losses, key=lambda multiple: losses[multiple])
    low = high = best
    while low / 2 in losses and losses[low / 2] <= losses[best] + within:
        low /= 2
    while 2 * high in losses and losses[2 * high] <= losses[best] + within:
        high *= 2
    return best, low, high


def number(multiple: float) -> str:
    return f"{multiple:g}" if multiple >= 1 else f"1/{1 / multiple:g}"


def cells(scores: Scores, within: float) -> list[str]:
    """Return a row's cells for runs with, or without, a warm-up."""
    if not scores:
        return 3 * ["-"]
    best, low, high = choice(scores, within)
    as_good = f" ({number(low)} to {number(high)})" if low < high else ""
    return [f"{number(best)}{as_good}", *(_shown(scores[multiple]) for multiple in (1.0, best))]


def _shown(scores: Sequence[Score]) -> str:
    if not all(math.isfinite(score.loss) for score in scores):
        return "diverged"
    return f"{mean(score.loss for score in scores):.3f}; {mean(score.shown for score in scores):.2f}"


def table(task: Task, found: Mapping[tuple[Setting, bool], Scores]) -> str:
    """Return the table of a task in Markdown."""
    within = 2 * noise(found.values())
    head = ["best multiple (as good)", f"loss; {task.column}, at 1", "at the best"]
    lines = ["| workers | period | method |" + "".join(f" {title} |" for title in (*head, *head))]
    lines.append("|---" * 9 + "|")
    for setting in dict.fromkeys(setting for setting, _ in found):
        method = "alone" if setting == Setting(1, 1, "mean") else setting.method
        both = [cell for warm_up in (True, False) for cell in cells(found.get((setting, warm_up), {}), within)]
        lines.append("| " + " | ".join([str(setting.workers), str(setting.period), method, *both]) + " |")
    return "\n".join(lines)


class Kept:
    """The scores of what has been run, in a file of a line of JSON each, if there is to be one."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path and path.exists() else []
        self._scores = {json.dumps(trial): Score(*score) for trial, score in map(json.loads, lines)}

    def get(self, trial: Trial) -> Score | None:
        return self._scores.get(json.dumps(trial))

    def add(self, trial: Trial, score: Score) -> None:
        if self._path:
            with self._path.open("a") as file:
                file.write(json.dumps([trial, score]) + "\n")


def search(name: str, quick: bool, run: Callable[[Trial], Score]) -> dict[tuple[Setting, bool], Scores]:
    """Run all settings of a task, first with a warm-up and then some without."""
    task, found = TASKS[name], dict[tuple[Setting, bool], Scores]()
    epochs, seeds = (1, 1) if quick else (task.epochs, task.seeds)

    def losses(setting: Setting, warm_up: bool, multiple: float) -> list[float]:
        trials = [Trial(name, setting, multiple * task.rate, warm_up, seed, epochs) for seed in range(seeds)]
        found[setting, warm_up][multiple] = [run(trial) for trial in trials]
        return [score.loss for score in found[setting, warm_up][multiple]]

    rows = settings(quick)
    for row in [*((row, True) for row in rows), *((row, False) for row in rows if also_without_warm_up(row))]:
        found[row] = {}
        climb(partial(losses, *row), (1 / 2, 2) if quick else MULTIPLES)
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("tasks", nargs="*", choices=[*TASKS, []], help="which; by default all")
    options.add_argument("--quick", action="store_true", help="three settings, one seed, one pass")
    options.add_argument(
        "--keep", type=Path, metavar="FILE", help="write each run's score here; what is there is not run"
    )
    args = options.parse_args()
    kept = Kept(args.keep)
    with ExitStack() as stack:
        sizes = {setting.workers for setting in settings(args.quick)}
        pools = {size: stack.enter_context(workers(size, work)) for size in sizes}

        def run(trial: Trial) -> Score:
            score = kept.get(trial)
            if score is None:
                start = time.perf_counter()
                score = ask(pools[trial.setting.workers], trial)[0]
                kept.add(trial, score)
                print(*trial, *score, f"{time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
            return score

        for name in args.tasks or TASKS:
            found = search(name, args.quick, run)
            print(f"\n{name}: multiple 1 is a rate of {TASKS[name].rate:g}, the noise of a difference", end=" ")
            print(f"{noise(found.values()):.2g}. On the left with a warm-up, on the right without.\n")
            print(table(TASKS[name], found), flush=True)
        for pipe in [pipe for pool in pools.values() for pipe in pool]:
            pipe.send(None)


if __name__ == "__main__":
    main()
