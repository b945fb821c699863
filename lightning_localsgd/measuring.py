"""WHAT IT COSTS HERE: steps and averages of the user's own run, measured in short fits that leave nothing behind."""

import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DDPStrategy

from lightning_localsgd import _lightning
from lightning_localsgd.cli import CLI
from lightning_localsgd.mean import Mean
from lightning_localsgd.plan import WIRES, Costs, bits, recommended, seconds
from lightning_localsgd.rounds import Round
from lightning_localsgd.schedule import AtEnd, Schedule
from lightning_localsgd.strategy import LocalSGD, LocalSGDStrategy
from lightning_localsgd.wire import WireName

_FITS = 18  # into which the time is divided
_PERIOD = 4  # of blocking averages that are measured
# Which wire, and whether its average is to be hidden; but for the first one, while there is time.
_ORDER: list[tuple[WireName, bool]] = [
    ("float32", False), ("int8", False), ("float32", True), ("int8", True), ("int4", False), ("bfloat16", False),
    ("int4", True), ("bfloat16", True), ("float16", False), ("float16", True),
]  # fmt: skip
_ALONE: dict[str, Any] = {
    "profiler": None,
    "fast_dev_run": False,
    "barebones": False,
    "min_epochs": None,
    "min_steps": None,
    "max_time": None,
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Run(CLI):
    """The user's run, as a command line describes it: nothing of it is run but what is measured.

    Args:
        words: after ``lightning-localsgd fit``.

    Raises:
        ValueError: if it has one worker only.
    """

    def __init__(self, words: Sequence[str]) -> None:
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        with warnings.catch_warnings():  # that the words of `plan` are others
            warnings.filterwarnings("ignore", "LightningCLI's args parameter")
            super().__init__(args=["fit", *words], save_config_callback=None)
        given = self.trainer.strategy  # a strategy of its own is made for each fit
        self._ours = given if isinstance(given, LocalSGD) else None
        if self._ours is not None and self._ours._pace_rule is not None:
            raise ValueError(f'`plan` needs the `pace` "equal", got {self._ours._pace_rule!r}.')
        self._replica = "device" if self._ours is None else self._ours._replica_rule
        self.workers = self.trainer.num_nodes * (1 if self._replica == "node" else self.trainer.num_devices)
        if self.workers < 2:
            raise ValueError(
                "`plan` needs at least 2 workers, since one has nothing to average, got a Trainer with "
                f"num_nodes={self.trainer.num_nodes} and num_devices={self.trainer.num_devices}, and "
                f"`replica={self._replica!r}`."
            )
        self._shared: dict[str, Any] = {}
        if isinstance(given, DDPStrategy):
            self._shared = {"process_group_backend": given._process_group_backend, "timeout": given._timeout}
        self.may_delay = self._ours is None or self._ours._state_rule in ("keep", "reset")

    def instantiate_trainer(self, **options: Any) -> Trainer:
        """Return the user's Trainer without what writes files, validates, or ends the run."""
        return super().instantiate_trainer(**(_ALONE | {"callbacks": [], "logger": DummyLogger()} | options))

    def fit(self, **_: Any) -> None:
        """Called by Lightning in place of the Trainer's, and does nothing."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, as is known once something was measured."""
        return dist.get_rank() == 0

    def strategy(self, period: int | Schedule, wire: WireName = "float32", delay: int = 0) -> LocalSGDStrategy:
        """Return the user's strategy with another period, wire and delay."""
        mean = Mean() if self._ours is None else self._ours.mean
        if wire not in ("int8", "int4"):
            mean = replace(mean, wire="float32", rounding="nearest", error_feedback=True)
        if period == 1:
            return LocalSGDStrategy(1, mean=Mean(mean.bucket_mb), **self._shared)
        rules: dict[str, Any] = {"replica": self._replica}
        if self._ours is not None:
            rules |= {"outer": self._ours.outer, "optimizer_state": self._ours._state_rule}
        return LocalSGDStrategy(period, mean=replace(mean, wire=wire, delay=delay), **rules, **self._shared)

    def train(self, strategy: LocalSGDStrategy, first: int, last: int) -> "Watch":
        """Train up to the end of step ``last``, without what writes files or validates."""
        watch = Watch(first, last)
        data = {} if self.datamodule is None else {"datamodule": self.datamodule}
        self.instantiate_trainer(strategy=strategy, callbacks=[watch]).fit(self.model, **data)
        return watch


class Watch(Callback):
    """Measures the seconds from the end of step ``first`` to that of step ``last``, where it ends the fit."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.start = self.end = math.nan
        self.rounds: list[Round] = []
        self.worker = 0  # which one this is
        self._batches = 0  # of this epoch

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(trainer.strategy, LocalSGD)
        trainer.strategy.listen(self.rounds.append)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The length that the user has set is what learning rates were made for; as many steps are taken as are needed.
        _lightning.train_on(trainer)
        assert isinstance(trainer.strategy, LocalSGD)
        self.worker = trainer.strategy.worker.links.worker
        if pl_module.automatic_optimization:  # some end with the run, others ask for what a validation has found
            trainer.strategy.lr_scheduler_configs = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._batches:  # nor will the next epoch have any
            trainer.should_stop = True
        self._batches = 0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._batches += 1
        assert isinstance(trainer.strategy, LocalSGD)
        step = trainer.strategy.worker.clock.step
        if step == self.first and math.isnan(self.start):
            self.start = _now(trainer)
        if step == self.last:
            self.end = _now(trainer)
            trainer.should_stop = True


def _now(trainer: Trainer) -> float:
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize(trainer.strategy.root_device)
    return time.perf_counter()


class _Seen(NamedTuple):
    """What one worker has seen in a fit."""

    seconds: float  # of a step, averages included
    own: float  # of a local step, as this worker has told the others
    average: float  # seconds of the last one
    wall: float  # of the whole fit


class _Bench:
    """Measures one thing after the other; all ranks know the same numbers, and decide alike what comes next."""

    def __init__(self, run: Run, duration: float, tell: Callable[[str], None]) -> None:
        self._run = run
        self._duration = duration
        self._tell = tell
        self.share = duration / _FITS
        self.used = 0.0  # seconds so far, on rank 0

    def measure(
        self, period: int | Schedule, first: int, last: int, wire: WireName = "float32", delay: int = 0
    ) -> list[_Seen]:
        """Return what each worker has seen from the end of step ``first`` to that of step ``last``."""
        start = time.perf_counter()
        strategy = self._run.strategy(period, wire, delay)
        watch = self._run.train(strategy, first, last)
        wall = time.perf_counter() - start
        rounds = [one for one in watch.rounds if one.averaged == "models"]
        own = rounds[-1].step_seconds[watch.worker] if rounds and rounds[-1].step_seconds else math.nan
        average = rounds[-1].average_seconds if rounds else math.nan
        found: list[Any] = [None] * strategy.world_size
        dist.all_gather_object(found, _Seen((watch.end - watch.start) / (last - first), own, average, wall))
        if any(math.isnan(seen.seconds) for seen in found):
            raise ValueError(f"The run must have data for {last} steps on each worker, which are to be measured.")
        self.used += found[0].wall
        return found

    def repeats(self, each: float, least: int, most: int) -> int:
        """Return how often something that takes ``each`` seconds is done."""
        return max(least, min(most, round(self.share / each)))

    def say(self, words: str) -> None:
        """Tell what was found."""
        if self._run.is_first:
            self._tell(words)

    def has(self, seconds: float) -> bool:
        """Whether there is time for what takes so long."""
        return self.used + seconds <= self._duration


def measure(run: Run, duration: float = 60, tell: Callable[[str], None] = lambda words: None) -> Costs:
    """Measure what steps and averages of a run cost, on all its workers together.

    Args:
        run: the run.
        duration: about how many seconds to take; what is left out then follows from what is measured.
        tell: called on rank 0 with what was found.

    Returns:
        The same on all workers.
    """
    bench = _Bench(run, duration, tell)
    probe = bench.measure(AtEnd(), 2, 6)  # it also warms up
    average = max(seen.average for seen in probe)
    local = bench.measure(AtEnd(), 4, 4 + bench.repeats(_slowest(probe) / 2, 16, 2000))
    step = _slowest(local)
    bench.say(f"a local step: {1000 * step:.4g} ms")
    ddp = _slowest(bench.measure(1, 2, 2 + bench.repeats(step + average, 2, 200)))
    bench.say(f"a step of DDP: {1000 * ddp:.4g} ms")

    found: dict[tuple[WireName, bool], tuple[int, float]] = {}  # period, and a step
    costs, overhead = Costs((step,), ddp, {}, {}), 0.0
    for wire, hides in _ORDER:
        known = costs.blocking.get(wire, costs.blocking.get("float32", average) * bits(wire) / 32)
        period = max(_PERIOD, math.ceil(1.5 * known / step) + 2) if hides else _PERIOD
        each = period * step + (0 if hides else known)
        count = 1 + bench.repeats(each, 2, 50)  # one to warm up
        after = overhead + bench.share  # for `check`
        if (hides and not run.may_delay) or (found and not bench.has(overhead + count * each + after)):
            continue
        seen = bench.measure(period, period, count * period, wire, (period - 1) * hides)
        found[wire, hides] = period, _slowest(seen)
        overhead = max(overhead, seen[0].wall - count * period * _slowest(seen))
        costs = solved(local, ddp, found)
        cost = (costs.hidden if hides else costs.blocking)[wire]
        bench.say(f"an average in {wire}{', beside local steps,' if hides else ''} costs {1000 * cost:.4g} ms")
    if bench.has(overhead + 20 * step):
        again = bench.measure(AtEnd(), 4, 4 + bench.repeats(step / 2, 16, 2000))
        local = min(local, again, key=_slowest)
    return check(completed(solved(local, ddp, found), run.may_delay), bench, overhead)


def check(costs: Costs, bench: _Bench, overhead: float) -> Costs:
    """Return it with the recommended setting measured itself; if that is slower than computed, with the next, too.

    Args:
        costs: what was found.
        bench: which measures while there is time.
        overhead: seconds of a fit beside its steps.
    """
    while (best := recommended(costs)).period > 1 and best not in costs.checked:
        expected = seconds(costs, best)
        count = bench.repeats(best.period * expected, 2, 50)
        if not bench.has(overhead + (2 + count) * best.period * expected):
            break
        first = 2 * best.period  # where the first delayed average has landed
        step = _slowest(bench.measure(best.period, first, first + count * best.period, best.wire, best.delay))
        costs = replace(costs, checked={**costs.checked, best: step})
        bench.say(f"{best}: {1000 * step:.4g} ms a step, {1000 * expected:.4g} ms expected")
    return costs


def _slowest(seen: Sequence[_Seen]) -> float:
    return max(one.seconds for one in seen)


def solved(local: Sequence[_Seen], ddp: float, found: Mapping[tuple[WireName, bool], tuple[int, float]]) -> Costs:
    """Return what follows from steps with averages and without.

    Whatever else the machine does slows some of it down: the fastest step of all is the one without averages.
    """
    step = min(_slowest(local), ddp, *(value for _, value in found.values()))
    own = max(seen.own for seen in local)
    costs = {key: period * (value - step) for key, (period, value) in found.items()}
    blocking, hidden = ({wire: cost for (wire, hides), cost in costs.items() if hides is of} for of in (False, True))
    steps = tuple(step * seen.own / own for seen in local)
    return Costs(steps, ddp, blocking, hidden, noise=_slowest(local) / step - 1)


def completed(costs: Costs, may_delay: bool) -> Costs:
    """Return it with what was not measured, from the wire whose bits are nearest."""
    blocking = {wire: _nearest(costs.blocking, wire) for wire in WIRES}
    hidden = {wire: _nearest(costs.hidden, wire) for wire in WIRES if may_delay}
    scaled = {wire for wire in WIRES if wire not in costs.blocking or (may_delay and wire not in costs.hidden)}
    return replace(costs, blocking=blocking, hidden=hidden, scaled=frozenset(scaled))


def _nearest(known: Mapping[WireName, float], wire: WireName) -> float:
    if not known:
        return 0.0
    nearest = min(known, key=lambda one: abs(math.log(bits(one) / bits(wire))))
    return known[nearest] * bits(wire) / bits(nearest)
