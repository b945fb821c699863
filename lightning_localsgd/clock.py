"""WHERE in its rounds a worker is: the clock, which counts steps, passes over the data and rounds."""

import math
from typing import Any

from lightning_localsgd.progress import Measured, Progress
from lightning_localsgd.schedule import Epochs, Length, Schedule, is_count


class Clock:
    """Counts the steps and rounds of one run; all its numbers but ``taken`` are equal on all workers.

    A round is planned by :meth:`plan`, when all workers know what the schedule wants to know, and until then has no
    length.

    Args:
        schedule: asked once for each round.
        workers: number of workers.
        state: what :meth:`state_dict` returned, to go on from there.
    """

    def __init__(self, schedule: Schedule, workers: int, state: dict[str, Any] | None = None) -> None:
        self.schedule = schedule
        self._workers = workers
        state = state or {"start": 0, "round": 0, "taken": 0, "averages_models": 0}
        self.start = int(state["start"])  # step at which this round started
        self.round = int(state["round"])
        self.taken = int(state["taken"])  # steps of this round that this worker has taken
        self.averages_models = bool(state["averages_models"])  # has any round had a length above 1?
        self.passes = int(state.get("passes", 0))  # passes over the data that have ended in this round
        self.length = _decoded(state.get("length", 0))  # None until it is planned
        self._last_length = _decoded(state.get("last_length", 0))
        self._last_start = int(state.get("last_start", 0))

    @property
    def step(self) -> int:
        """Steps that this worker has taken since the start of the run, put level with the others at each average."""
        return self.start + self.taken

    @property
    def is_planned(self) -> bool:
        """Whether this round has a length."""
        return self.length is not None

    @property
    def plans_late(self) -> bool:
        """Whether the schedule wants to know what only the first step of a round tells."""
        return bool(self.schedule.needs & {"learning_rate", "epoch"})

    def progress(self, measured: Measured, epoch: int, **more: Any) -> Progress:
        """Return what the schedule may know now."""
        last = self._last_length
        return measured.progress(
            self.start,
            self.round,
            self._workers,
            epoch=epoch if "epoch" in self.schedule.needs else None,
            averages_models=self.averages_models,
            last_length=last.count if isinstance(last, Epochs) else last,
            last_start=None if last is None else self._last_start,
            **more,
        )

    def will_average_models(self, measured: Measured | None) -> bool:
        """Whether the round that begins will average models, as far as can be known before it is planned."""
        if self.averages_models:
            return True
        try:
            return self.schedule.length(self.progress(measured or Measured(frozenset()), epoch=0)) != 1
        except Exception:  # it wants to know what is not known yet
            return True

    def plan(self, progress: Progress) -> None:
        """Ask the schedule for the length of this round.

        Raises:
            ValueError: if it answers with something else.
        """
        length = self.schedule.length(progress)
        if not (is_count(length) or isinstance(length, Epochs)):
            raise ValueError(
                f"`{type(self.schedule).__name__}.length` must return an int of at least 1 or `Epochs`, got {length!r}."
            )
        self.length = length
        self.averages_models |= length != 1

    def tick(self) -> bool:
        """Count one step; return whether it was the last one of the round."""
        assert self.length is not None
        self.taken += 1
        return isinstance(self.length, int) and self.taken >= self.length

    def is_at_check(self) -> bool:
        """Whether the schedule wants to be asked after this step whether the round ends."""
        return self.schedule.check > 0 and self.taken % self.schedule.check == 0

    def ends_with_pass(self) -> bool:
        """Whether the round ends with this pass over the data."""
        return isinstance(self.length, Epochs) and self.passes + 1 >= self.length.count

    def next_round(self, step: int) -> None:
        """End this round; the next one starts at ``step``, and is to be planned."""
        self._last_start, self._last_length = self.start, self.length
        self.start, self.taken, self.round, self.passes, self.length = step, 0, self.round + 1, 0, None

    def state_dict(self) -> dict[str, Any]:
        """Return the clock as plain numbers."""
        return {
            "start": self.start,
            "round": self.round,
            "taken": self.taken,
            "averages_models": int(self.averages_models),
            "passes": self.passes,
            "length": _encoded(self.length),
            "last_length": _encoded(self._last_length),
            "last_start": self._last_start,
        }

    @staticmethod
    def new_round(state: dict[str, Any]) -> dict[str, Any]:
        """Return the state in which the round that ``state`` is in has ended where it was."""
        step = state["start"] + state["taken"]
        return (
            state
            | {"passes": 0, "length": 0}
            | (
                {}
                if not state["taken"]
                else {
                    "start": step,
                    "round": state["round"] + 1,
                    "taken": 0,
                    "last_start": state["start"],
                    "last_length": state.get("length", 0),
                }
            )
        )


def _encoded(length: Length | None) -> float:
    """Return a length as a number: steps above 0, passes below 0, 0 for none."""
    if length is None:
        return 0
    return -length.count if isinstance(length, Epochs) else length


def _decoded(number: float) -> Length | None:
    if number == 0:
        return None
    if number > 0:
        return int(number)
    return Epochs(math.inf if number == -math.inf else -int(number))
