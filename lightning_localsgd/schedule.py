"""WHEN a round ends: schedules, which say how long the next round is, and the clock that counts it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """What a schedule may know at the start of a round; equal on all workers.

    Args:
        step: steps taken since the start of the run, at least 0.
        round: rounds completed since the start of the run, at least 0.
        workers: number of workers N, at least 1.
    """

    step: int
    round: int
    workers: int


class Schedule(ABC):
    r"""Says how many steps the next round has.

    Workers that start round :math:`r` at step :math:`t_r` average their models at
    :math:`t_{r+1} = t_r + \mathrm{length}(t_r, r, N)`. A schedule is asked with the same numbers on every
    worker and must answer alike: write it as a frozen dataclass without random numbers or clocks.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Doubling(Schedule):
        ...     first: int = 1
        ...     def length(self, progress):
        ...         return self.first * 2**progress.round
        >>> Doubling(first=4).length(Progress(step=12, round=2, workers=2))
        16
    """

    @abstractmethod
    def length(self, progress: Progress) -> int:
        """Return the number of steps of the round that starts now, at least 1."""


@dataclass(frozen=True)
class Every(Schedule):
    r"""Average after every ``period`` steps: Algorithm 1 of Parallel Restarted SGD.

    .. math:: x_i^{t} = \frac{1}{N} \sum_{j=1}^{N} x_j^{t} \quad \text{whenever } t \bmod I = 0

    Args:
        period: the interval :math:`I`, an int of at least 1. With 1 the workers average *gradients*, as
            ``DDPStrategy`` does.

    Raises:
        ValueError: if ``period`` is not an int of at least 1.

    Example:
        >>> Every(8).length(Progress(step=16, round=2, workers=4))
        8

    Paper: Yu, Yang, Zhu, *Parallel Restarted SGD with Faster Convergence and Less Communication*, AAAI 2019
    (arXiv 1807.06629).
    """

    period: int

    def __post_init__(self) -> None:
        if not _is_count(self.period):
            raise ValueError(f"`period` must be an int of at least 1, got {self.period!r}.")

    def length(self, progress: Progress) -> int:
        return self.period


class Clock:
    """Counts the steps and rounds of one run; all its numbers are equal on all workers at the start of a round.

    Args:
        schedule: asked once at the start of each round.
        workers: number of workers.
        state: what :meth:`state_dict` returned, to go on from there.
    """

    def __init__(self, schedule: Schedule, workers: int, state: dict[str, int] | None = None) -> None:
        self._schedule = schedule
        self._workers = workers
        state = state or {"start": 0, "round": 0, "taken": 0, "averages_models": 0}
        self.start = state["start"]  # step at which this round started
        self.round = state["round"]
        self.taken = state["taken"]  # steps of this round that this worker has taken
        self.averages_models = bool(state["averages_models"])  # has any round had a length above 1?
        self.length = self._next_length()
        self.averages_models |= self.length > 1

    @property
    def step(self) -> int:
        """Steps that this worker has taken since the start of the run, put level with the others at each average."""
        return self.start + self.taken

    def tick(self) -> bool:
        """Count one step; return whether it was the last one of the round."""
        self.taken += 1
        return self.taken >= self.length

    def next_round(self, step: int) -> None:
        """Start the next round at ``step``."""
        self.start, self.taken, self.round = step, 0, self.round + 1
        self.length = self._next_length()
        self.averages_models |= self.length > 1

    def _next_length(self) -> int:
        length = self._schedule.length(Progress(step=self.start, round=self.round, workers=self._workers))
        if not _is_count(length):
            raise ValueError(
                f"`{type(self._schedule).__name__}.length` must return an int of at least 1, got {length!r}."
            )
        return length

    def state_dict(self) -> dict[str, int]:
        """Return the clock as plain numbers."""
        return {
            "start": self.start,
            "round": self.round,
            "taken": self.taken,
            "averages_models": int(self.averages_models),
        }

    @staticmethod
    def new_round(state: dict[str, int]) -> dict[str, int]:
        """Return the state in which the round that ``state`` is in has ended where it was."""
        step = state["start"] + state["taken"]
        return state | {"start": step, "round": state["round"] + (state["taken"] > 0), "taken": 0}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
