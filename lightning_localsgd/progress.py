"""WHAT IS KNOWN at the start of a round: what each worker measures in one, and what all of them know after a header."""

import math
import statistics
import time
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from torch import Tensor

Need = Literal["epoch", "learning_rate", "loss", "steps_left", "seconds", "drift"]
_KEPT = 10  # measurements of time; short averages often take one of two times, so fewer would say too little


@dataclass(frozen=True)
class Progress:
    r"""What a schedule may know at the start of a round; equal on all workers.

    What is measured or looked up is None until it is known, and always None where no part of the schedule
    ``needs`` it.

    Args:
        step: steps taken since the start of the run, at least 0.
        round: rounds completed since the start of the run, at least 0.
        workers: number of workers N, at least 1.
        epoch: passes over the data completed by ``Trainer``'s count at the first step of the round, at least 0.
        averages_models: whether models are averaged already, because a round was longer than one step.
        last_length: the length of the last round as it was planned, or None before the first.
        last_start: the step at which the last round started, or None before the first.
        steps_left: steps until ``fit`` ends, of the worker with the most; None also where Lightning cannot know it.
        learning_rate: of the first step of the round: the largest of all parameter groups and workers, at least 0.
        last_learning_rate: the same of the last round, or None before the first.
        peak_learning_rate: the largest of these so far.
        loss: mean over the workers and steps of the last round of the loss that ``training_step`` returned.
        first_loss: the same of the first round.
        seconds_per_step: wall time of a local step; median over the workers (with ``pace="proportional"``: of the
            fastest), and over the last 10 rounds the mean without the shortest and the longest.
        seconds_per_average: wall time of an average from when the last worker has come until it has landed; median over
            the workers, and the same mean over the last 10 averages.
        seconds_waiting: wall time that the first worker at the end of a round waits for the last, which is no part of
            the average; the same mean over the last 10 averages.
        drift: how far the replicas had moved apart when they were averaged last, relative to how far they had moved
            together, :math:`\sqrt{\frac{1}{N} \sum_i \lVert x_i - \bar x \rVert^2} \, / \, \lVert \bar x - a \rVert`
            with the anchor a.
        drift_length: steps of the round at whose end that was.
        distances: at a check inside a round, each worker's own distance from the anchor; else empty.
    """

    step: int
    round: int
    workers: int
    epoch: int | None = None
    averages_models: bool = False
    last_length: float | None = None
    last_start: int | None = None
    steps_left: int | None = None
    learning_rate: float | None = None
    last_learning_rate: float | None = None
    peak_learning_rate: float | None = None
    loss: float | None = None
    first_loss: float | None = None
    seconds_per_step: float | None = None
    seconds_per_average: float | None = None
    seconds_waiting: float | None = None
    drift: float | None = None
    drift_length: int | None = None
    distances: tuple[float, ...] = ()


@dataclass(frozen=True)
class Report:
    """What one worker has measured, as it travels in a header; NaN is "nothing".

    Args:
        learning_rate: largest of its parameter groups now.
        loss: mean over its steps of this round.
        steps: that it expects in the whole run.
        step_seconds: mean over its steps of this round.
        average_seconds: of the last average.
        wait_seconds: for the others before it.
        apart: squared distance of its replica from the mean at the last average.
        together: squared distance of that mean from the anchor.
        moved: squared distance of its replica from the anchor then.
        distance: of its replica from the anchor now.
    """

    learning_rate: float = math.nan
    loss: float = math.nan
    steps: float = math.nan
    step_seconds: float = math.nan
    average_seconds: float = math.nan
    wait_seconds: float = math.nan
    apart: float = math.nan
    together: float = math.nan
    moved: float = math.nan
    distance: float = math.nan


class Squares(NamedTuple):
    """What one worker measures in an average, as in :class:`Report`; NaN is "nothing"."""

    apart: float = math.nan
    together: float = math.nan
    moved: float = math.nan


class Measured:
    """What one worker measures, and what all have told each other; the latter is equal on all of them.

    Args:
        needs: what the schedule and the pace want to know.
        watched: what others want to know beside them, of whom the schedule learns nothing. Nothing else is measured.
        fastest: whether the seconds per step are those of the fastest worker, whose steps a round counts.
        state: what :meth:`state_dict` returned, to know what was known.
    """

    def __init__(
        self,
        needs: frozenset[Need],
        state: dict[str, Any] | None = None,
        *,
        fastest: bool = False,
        watched: frozenset[Need] = frozenset(),
    ) -> None:
        self.needs, self.watched = needs, watched
        self._typical_step = min if fastest else statistics.median_low
        self._own = Report()  # of the last average
        self._own_length = 0  # steps of the round that it ended
        self._losses: list[Tensor | float] = []  # of this round; their sum, and how many, once there are two
        self._steps = 0
        self._busy_since: float | None = None  # when this stretch of local steps began
        self._busy = 0.0  # seconds of this round before it
        self._pauses = 0
        state = {"known": {}, "step_seconds": [], "average_seconds": [], "wait_seconds": []} | (state or {})
        self._step_seconds: deque[float] = deque(state["step_seconds"], maxlen=_KEPT)
        self._average_seconds: deque[float] = deque(state["average_seconds"], maxlen=_KEPT)
        self._wait_seconds: deque[float] = deque(state["wait_seconds"], maxlen=_KEPT)
        self._known: dict[str, Any] = dict(state["known"])  # by the names of `Progress`, and the steps of the whole run

    # ------------------------------------------------------------------------------------------------- of this worker

    def note_step(self) -> None:
        """A local step has been taken."""
        self._steps += 1
        if self._busy_since is None and not self._pauses:
            self._busy_since = time.perf_counter()

    def note_loss(self, loss: Tensor | float) -> None:
        """The loss of a batch."""
        if "loss" in self.needs:
            loss = loss.detach().float() if isinstance(loss, Tensor) else loss
            self._losses = [self._losses[0] + loss, self._losses[1] + 1] if self._losses else [loss, 1]

    @contextmanager
    def pause(self) -> Generator[None, None, None]:
        """What happens in it is no part of a local step: waiting for others, validation, saving."""
        if self._busy_since is not None:
            self._busy += time.perf_counter() - self._busy_since
            self._busy_since = None
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            if not self._pauses:
                self._busy_since = time.perf_counter()

    @property
    def measures(self) -> frozenset[Need]:
        """What is measured."""
        return self.needs | self.watched

    def note_average(self, steps: int, seconds: float, waited: float, squares: Squares) -> None:
        """An average has landed after a round of so many steps."""
        self._own = Report(average_seconds=seconds, wait_seconds=waited, **squares._asdict())
        self._own_length = steps

    def start_round(self) -> None:
        """What is measured from here on belongs to the next round."""
        self._losses, self._steps, self._busy = [], 0, 0.0

    def report(self, learning_rate: float, steps: float, distance: float) -> Report:
        """Return what this worker tells the others."""
        losses = [float(part) for part in self._losses]
        return replace(
            self._own,
            learning_rate=learning_rate,
            steps=steps,
            distance=distance,
            loss=losses[0] / losses[1] if losses else math.nan,
            step_seconds=self._busy / self._steps if self._steps and "seconds" in self.measures else math.nan,
        )

    # ---------------------------------------------------------------------------------------------- of all the workers

    def hear(self, reports: Sequence[Report], ends_round: bool) -> None:
        """Take what all have told, in a header; the times and losses of a round count once, when it ends."""
        know = self._known
        rates = _numbers(report.learning_rate for report in reports)
        if rates:
            know["learning_rate"] = max(rates)
            know["peak_learning_rate"] = max([*rates, know.get("peak_learning_rate", 0.0)])
        steps = _numbers(report.steps for report in reports)
        if steps:
            know["steps"] = max(steps)
        apart, together = (_numbers(getattr(report, of) for report in reports) for of in ("apart", "together"))
        if "drift" in self.needs and apart and max(together) > 0:
            know["drift"] = math.sqrt(sum(apart) / len(apart) / max(together))
            know["drift_length"] = self._own_length
        if ends_round:
            losses = _numbers(report.loss for report in reports)
            if losses:
                know["loss"] = sum(losses) / len(losses)
                know.setdefault("first_loss", know["loss"])
        if ends_round and "seconds" in self.needs:
            if step := _numbers(report.step_seconds for report in reports):
                self._step_seconds.append(self._typical_step(step))
            if average := _numbers(report.average_seconds for report in reports):
                self._average_seconds.append(statistics.median_low(average))
            if waits := _numbers(report.wait_seconds for report in reports):
                self._wait_seconds.append(max(waits))

    def planned(self) -> None:
        """A round has been planned from what is known."""
        if "learning_rate" in self._known:
            self._known["last_learning_rate"] = self._known["learning_rate"]

    def progress(self, step: int, round: int, workers: int, **more: Any) -> Progress:  # noqa: A002
        """Return what a schedule may know now."""
        know: dict[str, Any] = {name: value for name, value in self._known.items() if name != "steps"}
        if "steps" in self._known:
            know["steps_left"] = max(0, int(self._known["steps"]) - step)
        if self._step_seconds:
            know["seconds_per_step"] = _typical(self._step_seconds)
        if self._average_seconds:
            know["seconds_per_average"] = _typical(self._average_seconds)
        if self._wait_seconds:
            know["seconds_waiting"] = _typical(self._wait_seconds)
        return Progress(step, round, workers, **know, **more)

    def state_dict(self) -> dict[str, Any]:
        """Return what all know; equal on all workers."""
        return {
            "known": dict(self._known),
            "step_seconds": list(self._step_seconds),
            "average_seconds": list(self._average_seconds),
            "wait_seconds": list(self._wait_seconds),
        }

    def own_state(self) -> list[float]:
        """Return what this worker alone has measured, for an exact resume."""
        losses = [float(part) for part in self._losses] or [0.0, 0.0]
        own = self._own
        squares = [own.apart, own.together, own.moved]
        of_average = [float(self._own_length), own.average_seconds, own.wait_seconds, *squares]
        return [*losses, float(self._steps), self._busy, *of_average]

    def load_own_state(self, state: list[float]) -> None:
        """Go on from there."""
        loss, count, steps, self._busy, length, *own = state
        self._losses = [loss, count] if count else []
        self._steps = int(steps)
        average, wait, *squares = own
        self._own = Report(average_seconds=average, wait_seconds=wait, **Squares(*squares)._asdict())
        self._own_length = int(length)


def _numbers(values: Any) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _typical(values: Sequence[float]) -> float:
    """Return the mean without the smallest and the largest: what all take together, but for one swapped page."""
    middle = sorted(values)[1:-1] if len(values) > 2 else values
    return statistics.fmean(middle)
