"""Settings of each algorithm, real runs of them, and the serial reference that these are held equal to."""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from lightning_localsgd import (
    QSR,
    AdaComm,
    AtEnd,
    AverageState,
    CommBudget,
    Corollary,
    DiLoCo,
    DriftLimit,
    EveryEpoch,
    Listed,
    LocalSGDStrategy,
    Mean,
    Outer,
    PostLocal,
    Proportional,
    RoundLR,
    SlowMo,
    Stages,
    TimeVarying,
)
from tests import reference
from tests.models import Regression, batch, loader, network, optimizer, state_of, trainer

EPOCH = 8  # steps
RATES = {"sgd": 0.1, "momentum": 0.05, "adamw": 0.01}


def constant(t: int) -> float:
    return 1.0


def falling(t: int) -> float:
    """A warm-up of 4 steps, a plateau, and stairs down to 0."""
    return min(1.0, t / 4) if t <= 8 else (0.5, 0.25, 0.1, 0.0)[min(3, (t - 9) // 4)]


@dataclass
class Algorithm:
    """A setting, and its rule in the paper's words.

    Args:
        period: the strategy's, as are ``outer`` and ``optimizer_state``.
        optimizer: the inner one's name.
        steps: of the run.
        factor: the learning rate of step t, from 1, as a multiple of the inner optimizer's own.
        sequences: whose `RoundLR` gives the learning rate instead.
        lengths: the rule: given the number of workers, the learning rate of each step, from 0, and the numbers of
            rounds and of steps before; None takes the lengths as they were in the run.
        warmup: steps in which gradients are averaged.
        begin: the reference's restart.
        state: the reference's optimizer state.
        mean: how workers agree.
    """

    period: Any
    lengths: Callable[[int, list[float], int, int], int] | None
    outer: Any = None
    optimizer_state: Any = "keep"
    optimizer: str = "momentum"
    steps: int = 24
    factor: Callable[[int], float] = constant
    sequences: Any = None
    warmup: int = 0
    begin: Callable[[nn.Module], reference.Restart] = reference.plain
    state: str = "keep"
    mean: Mean = field(default_factory=Mean)


def every(period: int, start: int = 0) -> Callable[..., int]:
    return lambda N, lr, s, t: period


def cube_root_sequence(N: int, lr: list[float], s: int, t: int) -> int:
    return next(k for k in range(1, 999) if (k * N) ** 3 >= s + 1)


def qsr(alpha: float, base: int, warmup: int, T: int) -> Callable[..., int]:
    def length(N: int, lr: list[float], s: int, t: int) -> int:
        if t < warmup:
            return base
        return T - t if lr[t] == 0 else min(T - t, max(base, int((alpha / lr[t]) ** 2 + 1e-9)))

    return length


def nesterov(lr: float = 0.7) -> Callable[[nn.Module], reference.Restart]:
    sgd = partial(torch.optim.SGD, lr=lr, momentum=0.9, nesterov=True)
    return lambda x: reference.OuterOptimizer(x, sgd)


def slow(alpha: float, beta: float) -> Callable[[nn.Module], reference.Restart]:
    return lambda x: reference.SlowMomentum(x, alpha, beta)


def with_optimizer(make: Callable[..., torch.optim.Optimizer]) -> dict[str, Any]:
    return {"outer": Outer(make), "begin": lambda x: reference.OuterOptimizer(x, make)}


def algorithms() -> dict[str, Algorithm]:
    """Return each algorithm alone, and combinations."""
    four = {"period": 4, "lengths": every(4)}
    adam = partial(torch.optim.Adam, lr=0.02, eps=0.1)
    adafactor = partial(torch.optim.Adafactor, lr=0.05)
    adagrad = partial(torch.optim.Adagrad, lr=0.02)
    bmuf = partial(torch.optim.SGD, lr=1.0, momentum=0.5)
    return {
        # when
        "EveryEpoch": Algorithm(EveryEpoch(), every(EPOCH)),
        "EveryEpoch(2)": Algorithm(EveryEpoch(2), every(2 * EPOCH), steps=40),
        "AtEnd": Algorithm(AtEnd(), every(99)),
        "PostLocal": Algorithm(
            PostLocal(6, then=4), lambda N, lr, s, t: 1 if t < 6 else 4, warmup=6, optimizer="adamw", steps=28
        ),
        "PostLocal until the decay": Algorithm(
            PostLocal("decay", then=4), lambda N, lr, s, t: 1 if t < 8 else 4, warmup=8, factor=falling, steps=28
        ),
        "Stages": Algorithm(Stages({0: 2, 5: 3, 12: 5}), lambda N, lr, s, t: 2 if t < 5 else 3 if t < 12 else 5),
        "Stages by epochs": Algorithm(
            Stages({0: 2, 1: 4, 2: 8}, unit="epoch"), lambda N, lr, s, t: 2 ** (1 + t // EPOCH)
        ),
        "TimeVarying": Algorithm(
            TimeVarying(), cube_root_sequence, sequences=TimeVarying(), optimizer="sgd", steps=40, warmup=1
        ),
        "Listed": Algorithm(
            Listed((3, 4, 5), (1.0, 0.5)),
            lambda N, lr, s, t: (3, 4, 5)[min(s, 2)],
            sequences=Listed((3, 4, 5), (1.0, 0.5)),
        ),
        "Corollary": Algorithm(
            Corollary(2_000), lambda N, lr, s, t: max(i for i in range(1, 99) if i**4 * N**3 <= 2_000), steps=40
        ),
        "QSR": Algorithm(QSR(0.06, 2, warmup=4), qsr(0.06, 2, 4, 24), factor=falling),
        "AdaComm": Algorithm(AdaComm(6, every=6), None),
        "CommBudget": Algorithm(CommBudget(0.3, at_least=3, at_most=6, first=4), None, steps=32),
        "DriftLimit": Algorithm(DriftLimit(0.5, first=4, check=2), None, steps=40),
        # then what
        "DiLoCo": Algorithm(**four, outer=DiLoCo(), begin=nesterov(), optimizer="adamw"),
        "DiLoCo without momentum": Algorithm(
            **four, **{**with_optimizer(partial(torch.optim.SGD, lr=0.5)), "outer": DiLoCo(0.5, momentum=0.0)}
        ),
        "Outer(Adam)": Algorithm(**four, **with_optimizer(adam)),
        "Outer(Adagrad)": Algorithm(**four, **with_optimizer(adagrad)),
        "Outer(Adafactor)": Algorithm(**four, **with_optimizer(adafactor)),
        "BMUF": Algorithm(**four, **with_optimizer(bmuf)),
        "SlowMo": Algorithm(**four, outer=SlowMo(0.9, 0.5), begin=slow(0.9, 0.5), factor=falling, steps=28),
        # optimizer state
        "average momentum": Algorithm(**four, optimizer_state="average", state="average"),
        "average Adam's": Algorithm(**four, optimizer_state="average", state="average", optimizer="adamw"),
        "reset": Algorithm(**four, optimizer_state="reset", state="reset"),
        # combinations
        "PostLocal x DiLoCo": Algorithm(
            PostLocal(6, then=4),
            lambda N, lr, s, t: 1 if t < 6 else 4,
            outer=DiLoCo(),
            begin=nesterov(),
            warmup=6,
            optimizer="adamw",
            steps=28,
        ),
        "QSR x SlowMo": Algorithm(
            QSR(0.1, 2, warmup=4),
            qsr(0.1, 2, 4, 28),
            outer=SlowMo(1.0, 0.4),
            begin=slow(1.0, 0.4),
            factor=falling,
            steps=28,
        ),
        "Stages x average": Algorithm(
            Stages({0: 2, 8: 4}), lambda N, lr, s, t: 2 if t < 8 else 4, optimizer_state=AverageState(), state="average"
        ),
        "CommBudget x DiLoCo": Algorithm(
            CommBudget(0.3, at_least=3, at_most=6, first=4), None, outer=DiLoCo(), begin=nesterov(), steps=32
        ),
        "SlowMo x reset": Algorithm(
            **four, outer=SlowMo(1.0, 0.6), begin=slow(1.0, 0.6), optimizer_state="reset", state="reset"
        ),
        # delays
        "delay 1": Algorithm(**four, mean=Mean(delay=1)),
        "delay of a round": Algorithm(**four, mean=Mean(delay=4), optimizer="adamw"),
        "delay that ends in the midst of the last round": Algorithm(**four, mean=Mean(delay=3), steps=26),
        "delay x EveryEpoch": Algorithm(EveryEpoch(), every(EPOCH), mean=Mean(delay=3), steps=44),
        "delay x Stages": Algorithm(
            Stages({0: 2, 8: 6}), lambda N, lr, s, t: 2 if t < 8 else 6, mean=Mean(delay=4), steps=44
        ),
        "delay x PostLocal x DiLoCo": Algorithm(
            PostLocal(6, then=4),
            lambda N, lr, s, t: 1 if t < 6 else 4,
            mean=Mean(delay=2),
            outer=DiLoCo(),
            begin=nesterov(),
            warmup=6,
            steps=34,
        ),
        "delay x SlowMo x reset": Algorithm(
            **four,
            mean=Mean(delay=3),
            outer=SlowMo(0.9, 0.5),
            begin=slow(0.9, 0.5),
            optimizer_state="reset",
            state="reset",
            factor=falling,
        ),
        "delay x Outer(Adafactor)": Algorithm(**four, mean=Mean(delay=2), **with_optimizer(adafactor)),
        "delay x DriftLimit": Algorithm(DriftLimit(0.5, first=4, check=2), None, mean=Mean(delay=2), steps=40),
        "delay x CommBudget": Algorithm(
            CommBudget(0.3, at_least=3, at_most=6, first=4), None, mean=Mean(delay=2), steps=32
        ),
    }


class Model(Regression):
    def __init__(self, algorithm: Algorithm) -> None:
        super().__init__(algorithm.optimizer)
        self.algorithm = algorithm
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        made = optimizer(self.name, self.parameters())
        if self.algorithm.sequences is not None:
            scheduler: Any = RoundLR(made, self.algorithm.sequences)
        else:
            scheduler = LambdaLR(made, lambda step: self.algorithm.factor(step + 1))
        return {"optimizer": made, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Watch(Callback):
    """Keeps the model after each step, the steps after which rounds had ended, and the drift as it was known."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []
        self.starts: list[int] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.states.append(state_of(pl_module))
        self.starts.append(trainer.strategy.worker.clock.start)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.starts.append(trainer.strategy.worker.clock.start)
        self.states[-1] = state_of(pl_module)


def run(workers: int, names: list[str]) -> dict[str, Any]:
    """Train each; return the models after each step, the steps after which rounds ended, and the losses."""
    found = {}
    for name in names:
        algorithm, watch = algorithms()[name], Watch()
        model = Model(algorithm)
        strategy = LocalSGDStrategy(
            algorithm.period, mean=algorithm.mean, outer=algorithm.outer, optimizer_state=algorithm.optimizer_state
        )
        fit = trainer(workers, strategy, callbacks=[watch], max_epochs=-1, max_steps=algorithm.steps)
        fit.fit(model, loader([EPOCH] * workers))
        found[name] = watch.states, sorted({start for start in watch.starts if start}), model.losses
    return found


def rate_of(algorithm: Algorithm, workers: int) -> Callable[[int], float]:
    """Return the learning rate of step t, from 1."""

    def gamma(t: int) -> float:
        if algorithm.sequences is None:
            return RATES[algorithm.optimizer] * algorithm.factor(t)
        s, _ = algorithm.sequences.round_at(t - 1, workers)
        return RATES[algorithm.optimizer] * algorithm.sequences.rate(s, workers)

    return gamma


def ends_of(algorithm: Algorithm, workers: int) -> list[int]:
    """Return the steps after which rounds end, by the rule."""
    assert algorithm.lengths is not None
    gamma = rate_of(algorithm, workers)
    rates = [gamma(t) for t in range(1, algorithm.steps + 1)]
    ends, s = [0], 0
    while ends[-1] < algorithm.steps:
        length = algorithm.lengths(workers, rates, s, ends[-1])
        assert length == 1 or ends[-1] >= algorithm.warmup
        ends.append(min(algorithm.steps, ends[-1] + length))
        s += 1
    return ends[1:]


def loss_of(x: nn.Module, i: int, t: int) -> torch.Tensor:
    inputs, targets = batch(i, (t - 1) % EPOCH)
    return ((x(inputs) - targets) ** 2).mean()


def serial(algorithm: Algorithm, workers: int, ends: list[int]) -> Iterator[list[nn.Module]]:
    """Run the serial reference."""
    return reference.restarted_sgd(
        network(seed=0),
        workers,
        ends,
        algorithm.steps,
        lambda x_i: optimizer(algorithm.optimizer, x_i.parameters()),
        loss_of,
        algorithm.begin,
        gamma=rate_of(algorithm, workers),
        warmup=algorithm.warmup,
        state=algorithm.state,
        delay=algorithm.mean.delay,
    )


def mean_losses(losses: list[list[float]]) -> list[float]:
    """Return the mean loss over the workers of each step."""
    return [math.fsum(of_step) / len(of_step) for of_step in zip(*losses, strict=True)]


# ------------------------------------------------------------------------------------------------------------ from YAML

CONFIGS = sorted((Path(__file__).parent.parent / "configs" / "algorithms").glob("*.yaml"))


def as_in_yaml() -> dict[str, LocalSGDStrategy]:
    """Return in Python what each file in `configs/algorithms` says."""
    return {
        "at-end": LocalSGDStrategy(AtEnd()),
        "comm-budget-diloco": LocalSGDStrategy(CommBudget(0.05, at_most=64), outer=DiLoCo()),
        "ddp": LocalSGDStrategy(1),
        "every": LocalSGDStrategy(8),
        "every-epoch": LocalSGDStrategy(EveryEpoch()),
        "int4-delay-diloco": LocalSGDStrategy(8, mean=Mean(wire="int4", delay=4), outer=DiLoCo()),
        "int8": LocalSGDStrategy(8, mean=Mean(wire="int8", rounding="stochastic")),
        "outer-adam": LocalSGDStrategy(8, outer=Outer(partial(torch.optim.Adam, lr=0.003))),
        "post-local-diloco": LocalSGDStrategy(PostLocal(50, then=16), outer=DiLoCo()),
        "proportional": LocalSGDStrategy(8, pace=Proportional([1.0, 0.5])),
        "qsr-slowmo": LocalSGDStrategy(QSR(0.01, 4), outer=SlowMo(1.0, 0.4)),
        "stages-average": LocalSGDStrategy(Stages({0: 4, 48: 16}), optimizer_state="average"),
        "time-varying": LocalSGDStrategy(TimeVarying()),
    }


def said(strategy: LocalSGDStrategy) -> list[Any]:
    """Return what was asked for, in words; an outer optimizer by what it makes."""
    outer = strategy.outer
    if isinstance(outer, Outer):
        made = outer.optimizer([torch.zeros(1)])
        return [repr(strategy.schedule), repr(strategy._state_rule), type(made), made.defaults]
    return [
        repr(strategy.schedule),
        strategy.mean,
        repr(strategy._state_rule),
        repr(outer),
        repr(strategy._pace_rule),
    ]


def from_yaml() -> dict[str, Any]:
    """Train with each file by LightningCLI, and with the same in Python; return what they are, and both models."""
    os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"  # of what Lightning calls
    quiet = ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"]
    numbers = {"accelerator": "cpu", "devices": 2, "max_epochs": -1, "max_steps": 72}
    options = [f"--trainer.{name}=false" for name in quiet]
    options += [f"--trainer.{name}={value}" for name, value in numbers.items()]
    found = {}
    for path in CONFIGS:
        is_dealt = path.stem == "proportional"  # by Lightning's sampler, from the same samples
        args = ["--config", str(path), "--model.optimizer=momentum", *options]
        args.append(f"--trainer.use_distributed_sampler={str(is_dealt).lower()}")
        cli = LightningCLI(Regression, args=args, run=False, save_config_callback=None, seed_everything_default=0)
        points = [tuple(part[0] for part in batch(0, index, size=1)) for index in range(99)]
        cli.trainer.fit(cli.model, DataLoader(points, batch_size=4) if is_dealt else loader([EPOCH] * 2))
        strategy, model = as_in_yaml()[path.stem], Regression("momentum")
        run = trainer(2, strategy, max_epochs=-1, max_steps=72, use_distributed_sampler=is_dealt)
        run.fit(model, DataLoader(points, batch_size=4) if is_dealt else loader([EPOCH] * 2))
        found[path.stem] = said(cli.trainer.strategy), said(strategy), state_of(cli.model), state_of(model)
    return found
