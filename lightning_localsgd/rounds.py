"""WHAT HAPPENED in a round: a record of it, told to those who listen."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_localsgd.progress import Need, Report
from lightning_localsgd.spread import Probe, Spread, known


@dataclass(frozen=True)
class Round:
    """One round that has ended, as one worker saw it.

    Args:
        number: rounds completed before it, since the start of the run.
        step: steps taken since the start of the run when it ended.
        steps: steps that it had, of the worker with the most: the period.
        averaged: at its end the models, or in each of its steps the gradients, as DDP does.
        seconds: wall time since the last round ended, or since the training began; validation and saving included.
        average_seconds: from when the last worker had come to the average until it had landed; NaN with gradients,
            whose average runs beside the backward pass.
        blocked_seconds: in which the training stood still for it: waiting for the others, and the average; NaN with
            gradients.
        sent: bytes that this worker sent, if all-reduces run in a ring: 2 (N - 1) / N of the payload, which is the
            model, and averaged moments or, with gradients, gradients and buffers. Headers are not counted.
        sent_by_ddp: bytes that averaging gradients and buffers in each of these steps sends, counted alike.
        step_seconds: wall time of a local step on each worker; NaN for one that had none, empty with gradients.
    """

    number: int
    step: int
    steps: int
    averaged: Literal["models", "gradients"]
    seconds: float
    average_seconds: float
    blocked_seconds: float
    sent: float
    sent_by_ddp: float
    step_seconds: tuple[float, ...] = ()

    @property
    def share(self) -> float:
        """The part of the wall time in which the training stood still for the average."""
        return self.blocked_seconds / self.seconds if self.seconds > 0 else math.nan

    @property
    def slowest(self) -> int | None:
        """The rank with the longest local steps, or None where that is not known."""
        known = [(seconds, -rank) for rank, seconds in enumerate(self.step_seconds) if seconds > 0]
        return -max(known)[1] if len(known) > 1 else None


@dataclass(frozen=True)
class Listener:
    """Who wants to hear what.

    Args:
        on_round: called with each round when it has ended.
        on_spread: called with how far the replicas had moved, one round late: each worker tells it in the next header.
        moves: whether that includes how far they moved from the anchor, which is a copy of the model.
        every: in how many steps that is measured once: in the first round that begins in each such stretch.
    """

    on_round: Callable[[Round], None]
    on_spread: Callable[[Spread], None] | None = None
    moves: bool = False
    every: int = 1


class Rounds:
    """Tells of the rounds of one fit.

    Args:
        listeners: who hears of them.
        workers: number of workers.
    """

    def __init__(self, listeners: Sequence[Listener], workers: int) -> None:
        self._listeners = tuple(listeners)
        self._hear_spread = [one for one in listeners if one.on_spread is not None and workers > 1]
        self._ring = 2 * (workers - 1) / workers
        self._begun: int | None = None  # step at which the last round began whose spread is measured
        self.begin()

    def begin(self) -> None:
        """The training begins, now."""
        self._since = time.perf_counter()
        self._last: tuple[int, tuple[int, ...]] | None = None  # the last round, and who counted in its mean

    @property
    def are_heard(self) -> bool:
        """Whether anybody listens."""
        return bool(self._listeners)

    @property
    def watched(self) -> frozenset[Need]:
        """What must be measured for them."""
        wanted: dict[Need, object] = {"seconds": self._listeners, "drift": self._hear_spread}
        return frozenset(need for need, listeners in wanted.items() if listeners)

    def probe(self) -> Probe | None:
        """Return what measures how far the replicas move, if anybody wants to hear of it."""
        return Probe(moves=any(one.moves for one in self._hear_spread)) if self._hear_spread else None

    def measures_spread(self, step: int) -> bool:
        """Whether somebody wants to hear how far the replicas move in the round that begins at this step."""
        if not self._hear_spread:
            return False
        every = min(one.every for one in self._hear_spread)
        if self._begun is not None and step != self._begun and step // every == self._begun // every:
            return False
        self._begun = step
        return True

    def end(
        self,
        number: int,
        *,
        step: int,
        steps: int,
        payload: int,
        payload_of_ddp: int,
        weights: tuple[int, ...] = (),
        average_seconds: float = math.nan,
        waited: float = math.nan,
        reports: Sequence[Report] = (),
    ) -> None:
        """A round has ended.

        Args:
            number: which.
            step: of the run.
            steps: that it had.
            payload: bytes of what was averaged in it.
            payload_of_ddp: bytes that DDP averages in a step.
            weights: for each worker whether it counted in the mean of the models; empty if gradients were averaged.
            average_seconds: that this worker measured.
            waited: seconds that it waited before, NaN if it had nothing else to do.
            reports: what each worker had measured when the round ended.
        """
        now = time.perf_counter()
        self.tell_spread(reports)
        self._last = (number, weights) if weights else None
        record = Round(
            number=number,
            step=step,
            steps=steps,
            averaged="models" if weights else "gradients",
            seconds=now - self._since,
            average_seconds=average_seconds,
            blocked_seconds=average_seconds if math.isnan(waited) else average_seconds + waited,
            sent=self._ring * payload,
            sent_by_ddp=self._ring * payload_of_ddp * steps,
            step_seconds=tuple(report.step_seconds for report in reports),
        )
        self._since = now
        for listener in self._listeners:
            listener.on_round(record)

    def tell_spread(self, reports: Sequence[Report]) -> None:
        """All have told what they measured at the last average."""
        if self._last is None:
            return
        (number, weights), self._last = self._last, None
        counted = [report if weight else Report() for report, weight in zip(reports, weights, strict=True)]
        together = known(report.together for report in counted)
        spread = Spread(
            number,
            apart=tuple(math.sqrt(report.apart) for report in counted),
            moved=tuple(math.sqrt(report.moved) for report in counted),
            together=math.sqrt(max(together)) if together else math.nan,
        )
        if known(spread.apart):
            for listener in self._hear_spread:
                assert listener.on_spread is not None
                listener.on_spread(spread)
