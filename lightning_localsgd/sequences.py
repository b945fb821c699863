"""WHEN, by the theory: rounds whose lengths and learning rates follow given sequences, or a given number of steps."""

import math
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_localsgd.progress import Need, Progress
from lightning_localsgd.schedule import Schedule, is_count, require_count, require_number


class Sequences(Schedule):
    r"""Rounds s = 1, 2, ... of :math:`K^s` steps with the step size :math:`\gamma^s`: Algorithm 2.

    .. math:: x_i^{s,k} = x_i^{s,k-1} - \gamma^s G_i^{s,k}, \quad k = 1 \ldots K^s, \qquad
        x_i^{s+1,0} = \frac{1}{N} \sum_j x_j^{s,K^s}

    Which round it is follows from the step alone, :math:`K^1 + \ldots + K^{s-1} \le t < K^1 + \ldots + K^s`, so that it
    is the same in the schedule and in :class:`RoundLR`, which gives the step sizes, and after a resume. A round that
    was cut short is followed by the rest of its steps.

    A pair of sequences of your own is a frozen dataclass with the two methods below.

    Paper: Yu, Yang, Zhu, *Parallel Restarted SGD with Faster Convergence and Less Communication*, AAAI 2019
    (arXiv 1807.06629).
    """

    @abstractmethod
    def interval(self, s: int, workers: int) -> int:
        """Return the number of steps of round ``s``, from 1."""

    @abstractmethod
    def rate(self, s: int, workers: int) -> float:
        """Return the step size of round ``s``, from 1, as a multiple of the optimizer's learning rate."""

    def round_at(self, step: int, workers: int) -> tuple[int, int]:
        """Return the round to which the step after ``step`` steps belongs, and how many steps of it are left.

        Example:
            >>> TimeVarying().round_at(step=10, workers=1)  # rounds of 1, then seven of 2 steps
            (6, 1)
        """
        ends = _ends(self, workers)
        while ends[-1] <= step:
            interval = self.interval(len(ends), workers)
            if not is_count(interval):
                raise ValueError(
                    f"`{type(self).__name__}.interval` must return an int of at least 1, got {interval!r}."
                )
            ends.append(ends[-1] + interval)
        s = bisect_right(ends, step)
        return s, int(ends[s] - step)

    def length(self, progress: Progress) -> int:
        return self.round_at(progress.step, progress.workers)[1]


@lru_cache(maxsize=16)
def _ends(sequences: Sequences, workers: int) -> list[int]:
    """Return where the rounds end, as far as is known; grows in use."""
    return [0]


@dataclass(frozen=True)
class TimeVarying(Sequences):
    r"""The paper's sequences, which need not know the number of steps in advance.

    .. math:: K^s = \left\lceil s^{1/3} / N \right\rceil, \qquad \gamma^s = N / s^{2/3}

    With step sizes of at most 1/L, which :class:`RoundLR` caps, the weighted mean of the squared gradient norms is
    :math:`O(\log(NT) / \sqrt{NT})` after :math:`O((NT)^{3/4})` rounds. The first rounds have one step, in which
    gradients are averaged.

    Example:
        >>> [TimeVarying().interval(s, workers=2) for s in (1, 8, 9, 64, 65)]
        [1, 1, 2, 2, 3]

    Paper: Yu, Yang, Zhu, *Parallel Restarted SGD with Faster Convergence and Less Communication*, AAAI 2019
    (arXiv 1807.06629), Algorithm 2.
    """

    def interval(self, s: int, workers: int) -> int:
        k: int = max(1, math.ceil(s ** (1 / 3) / workers) - 1)
        while (k * workers) ** 3 < s:  # in integers: a double's cube root of 27 is above 3
            k += 1
        return k

    def rate(self, s: int, workers: int) -> float:
        return float(workers / s ** (2 / 3))


@dataclass(frozen=True)
class Listed(Sequences):
    r"""Sequences that are written down: K^1, K^2, ... and the step sizes with them; the last of each holds on.

    Args:
        intervals: ints of at least 1, in steps.
        rates: numbers above 0, multiples of the optimizer's learning rate.

    Raises:
        ValueError: if one of them is empty or has something else in it.

    Example:
        >>> Listed(intervals=(2, 4, 8), rates=(1.0, 0.5)).round_at(step=5, workers=4)
        (2, 1)
    """

    intervals: tuple[int, ...]
    rates: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        for name in ("intervals", "rates"):
            given = tuple(getattr(self, name))
            if not given:
                raise ValueError(f"`{name}` must not be empty.")
            for value in given:
                require_count(name, value) if name == "intervals" else require_number(name, value)
            object.__setattr__(self, name, given)

    def interval(self, s: int, workers: int) -> int:
        return self.intervals[min(s, len(self.intervals)) - 1]

    def rate(self, s: int, workers: int) -> float:
        return self.rates[min(s, len(self.rates)) - 1]


class RoundLR(LRScheduler):
    r"""The learning rates that belong to rounds: of each parameter group its own times :math:`\gamma^s`.

    .. math:: \eta_t = \min(\eta_0 \, \gamma^{s(t)}, \; \eta_\text{max})

    In Lightning its interval must be ``"step"``, and the strategy's ``period`` the same ``sequences``; other than that
    the strategy refuses it. It is stepped once after each step, as Lightning does.

    Args:
        optimizer: whose learning rates are set; they are the constants :math:`\eta_0`.
        sequences: gives :math:`\gamma^s`.
        workers: their number; None takes that of the process group, or 1 where there is none.
        at_most: :math:`\eta_\text{max}`, above 0: the theory wants 1/L.
        last_epoch: as in every scheduler of torch: how many steps have been taken, less one.

    Raises:
        ValueError: if an argument is something else.

    Example:
        >>> import torch
        >>> sgd = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> RoundLR(sgd, TimeVarying(), workers=8, at_most=0.5).get_last_lr()
        [0.5]

    Paper: Yu, Yang, Zhu, *Parallel Restarted SGD with Faster Convergence and Less Communication*, AAAI 2019
    (arXiv 1807.06629), Algorithm 2.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        sequences: Sequences,
        workers: int | None = None,
        at_most: float = math.inf,
        last_epoch: int = -1,
    ) -> None:
        if not isinstance(sequences, Sequences):
            raise ValueError(f"`sequences` must be a `Sequences`, such as `TimeVarying()`, got {sequences!r}.")
        if at_most != math.inf:
            require_number("at_most", at_most)
        if workers is None:
            workers = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        require_count("workers", workers)
        self.sequences, self.workers, self.at_most = sequences, workers, at_most
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:  # type: ignore[override,unused-ignore]
        s, _ = self.sequences.round_at(max(0, self.last_epoch), self.workers)
        rate = self.sequences.rate(s, self.workers)
        return [min(base * rate, self.at_most) for base in map(float, self.base_lrs)]

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers: what was given to the constructor is not among them."""
        return {"last_epoch": self.last_epoch, "base_lrs": list(self.base_lrs), "_last_lr": list(self._last_lr)}


@dataclass(frozen=True)
class Corollary(Schedule):
    r"""The longest interval for which the paper proves a linear speed-up.

    .. math:: I = \max \left\{ I \ge 1 : I^4 N^3 \le T \right\}

    It says at the start which one that is. The condition is sufficient, and far from necessary: practice takes longer
    ones.

    Args:
        total_steps: T, the steps of one worker in the whole run, an int of at least 1; None takes Lightning's.

    Raises:
        ValueError: if ``total_steps`` is something else; at the start of ``fit``, if it is None and Lightning cannot
            know it.

    Example:
        >>> Corollary(total_steps=131072).length(Progress(step=0, round=0, workers=8))
        4

    Paper: Yu, Yang, Zhu, *Parallel Restarted SGD with Faster Convergence and Less Communication*, AAAI 2019
    (arXiv 1807.06629), Corollary 1.
    """

    total_steps: int | None = None
    needs: ClassVar[frozenset[Need]] = frozenset({"steps_left"})

    def __post_init__(self) -> None:
        if self.total_steps is not None:
            require_count("total_steps", self.total_steps)

    def length(self, progress: Progress) -> int:
        total = self.total_steps
        if total is None:
            if progress.steps_left is None:
                raise ValueError(
                    "`Corollary` needs the number of steps, which Lightning cannot know here: give `total_steps`."
                )
            total = progress.step + progress.steps_left
        interval = max(1, math.isqrt(math.isqrt(total // progress.workers**3)))
        if progress.round == 0:
            rank_zero_info(
                f"Corollary 1 of Parallel Restarted SGD: {total} steps of {progress.workers} workers allow rounds of "
                f"{interval}."
            )
        return interval


def require_step_by_step(configs: Iterable[Any], schedule: Schedule, workers: int) -> None:
    """Raise a ``ValueError`` if a `RoundLR` is not stepped with the steps, or is not of the schedule's rounds."""
    for config in configs:
        scheduler = config.scheduler
        if not isinstance(scheduler, RoundLR):
            continue
        if config.interval != "step" or config.frequency != 1:
            raise ValueError(
                'A `RoundLR` must have the interval "step" and the frequency 1 in `configure_optimizers`, got '
                f"{config.interval!r} and {config.frequency!r}."
            )
        if scheduler.sequences != schedule or scheduler.workers != workers:
            raise ValueError(
                f"A `RoundLR` must be of the strategy's `period` and its workers, {schedule!r} and {workers}, got "
                f"{scheduler.sequences!r} and `workers={scheduler.workers}`."
            )
