"""WHEN, by what is measured: the learning rate, the loss, the time that averaging takes, how far replicas drift."""

import math
from dataclasses import dataclass
from typing import ClassVar

from lightning_localsgd.progress import Need, Progress
from lightning_localsgd.schedule import Schedule, is_count, is_zero, require_count, require_number

_ABOUT = 1 + 1e-9  # what is as good as a whole number is one: 0.3 / 0.1 is 3


@dataclass(frozen=True)
class QSR(Schedule):
    r"""The quadratic synchronization rule: rounds grow as the learning rate falls.

    .. math:: I = \max\left(I_\text{base}, \; \left\lfloor (\alpha / \eta)^2 \right\rfloor\right)

    with the learning rate of the round's first step, and never beyond the steps left. While the learning rate warms up
    the round has its base length.

    Args:
        alpha: :math:`\alpha`, in units of the learning rate, above 0. The paper took about twice the peak learning
            rate, so that rounds begin to grow when it has fallen.
        base: :math:`I_\text{base}`, an int of at least 1.
        warmup: steps of the learning rate's warm-up, at least 0; None finds out: it lasts while the learning rate at
            the start of a round is higher than at the start of the one before. Give it where it rises in stairs.

    Raises:
        ValueError: if an argument is something else; in training, if the learning rate is 0 and Lightning cannot know
            how many steps are left.

    Example:
        >>> QSR(alpha=0.02, base=4, warmup=0).length(Progress(step=0, round=0, workers=8, learning_rate=0.002))
        100

    Paper: Gu, Lyu, Arora, Zhang, Huang, *A Quadratic Synchronization Rule for Distributed Deep Learning*, ICLR 2024
    (arXiv 2310.14423).
    """

    alpha: float
    base: int
    warmup: int | None = None
    needs: ClassVar[frozenset[Need]] = frozenset({"learning_rate", "steps_left"})

    def __post_init__(self) -> None:
        require_number("alpha", self.alpha)
        require_count("base", self.base)
        if not (self.warmup is None or is_count(self.warmup) or is_zero(self.warmup)):
            raise ValueError(f"`warmup` must be an int of at least 0 or None, got {self.warmup!r}.")

    def length(self, progress: Progress) -> int:
        rate, left = progress.learning_rate, progress.steps_left
        assert rate is not None
        if self._warms_up(progress):
            length: float = self.base
        elif rate > 0:
            length = max(self.base, math.floor((self.alpha / rate) ** 2 * _ABOUT))
        elif left is None:
            raise ValueError(
                "`QSR` at a learning rate of 0 needs the number of steps left, which Lightning cannot know here: set "
                "`max_steps`."
            )
        else:
            length = left
        return int(length) if left is None else max(1, min(int(length), left))

    def _warms_up(self, progress: Progress) -> bool:
        if self.warmup is not None:
            return progress.step < self.warmup
        last = progress.last_learning_rate
        assert progress.learning_rate is not None
        return last is None or progress.learning_rate > last


@dataclass(frozen=True)
class AdaComm(Schedule):
    r"""Rounds shrink as the loss falls, and grow as the learning rate does.

    .. math:: I_l = \left\lceil \sqrt{\frac{F(x_l)}{F(x_0)}} \, I_0 \right\rceil
        \quad \text{or, with the learning rate,} \quad
        I_l = \left\lceil \sqrt{\frac{\eta_0}{\eta_l} \frac{F(x_l)}{F(x_0)}} \, I_0 \right\rceil

    once in ``every`` steps, and half of the last length (rounded up) where the first form is not shorter than that.
    F is the mean over workers and steps of the last round of the loss that ``training_step`` returns, in place of that
    of the whole data; :math:`\eta_0` is the largest learning rate so far.

    Args:
        period: :math:`I_0`, an int of at least 2.
        every: steps between two decisions, an int of at least 1; the paper takes a fixed wall time.
        learning_rate: whether to take the second form.

    Raises:
        ValueError: if an argument is something else; in training, if ``training_step`` returns no loss, or one below 0.

    Example:
        >>> AdaComm(16, every=100).length(
        ...     Progress(
        ...         step=112, round=7, workers=4, averages_models=True, last_length=16, last_start=96,
        ...         loss=0.25, first_loss=1.0,
        ...     )
        ... )
        8

    Paper: Wang, Joshi, *Adaptive Communication Strategies to Achieve the Best Error-Runtime Trade-off in Local-Update
    SGD*, SysML 2019 (arXiv 1810.08313).
    """

    period: int
    every: int
    learning_rate: bool = False

    def __post_init__(self) -> None:
        require_count("every", self.every)
        if not is_count(self.period) or self.period < 2:
            raise ValueError(f"`period` must be an int of at least 2, got {self.period!r}.")

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        return frozenset({"loss", "learning_rate"}) if self.learning_rate else frozenset({"loss"})

    def length(self, progress: Progress) -> int:
        last, start = progress.last_length, progress.last_start
        if last is None or start is None or not progress.averages_models:
            return self.period
        if progress.loss is None or progress.first_loss is None or not min(progress.loss, progress.first_loss) >= 0:
            raise ValueError(
                "`AdaComm` needs a `training_step` that returns the loss, at least 0, got a mean of "
                f"{progress.loss!r} in the last round."
            )
        if progress.step // self.every == start // self.every:
            return int(last)
        ratio = progress.loss / progress.first_loss if progress.first_loss else 1.0
        if self.learning_rate:
            rate, peak = progress.learning_rate, progress.peak_learning_rate
            assert rate is not None
            assert peak is not None
            if not rate:  # nothing moves: the longest round that there was reason for
                return int(last)
            return self._rounded(math.sqrt(peak / rate * ratio) * self.period)
        length = self._rounded(math.sqrt(ratio) * self.period)
        return length if length < last else max(1, math.ceil(last / 2))

    @staticmethod
    def _rounded(length: float) -> int:
        return max(1, math.ceil(length / _ABOUT))


@dataclass(frozen=True)
class CommBudget(Schedule):
    r"""The shortest round for which averaging takes at most a given share of the wall time.

    .. math:: I = \min \left\{ I : \frac{c}{c + I s} \le \rho \right\}
        = \left\lceil \frac{c}{s} \cdot \frac{1 - \rho}{\rho} \right\rceil

    with the time c of an average and s of a local step, both as measured over the last ten rounds on all workers (see
    :class:`Progress`). An average is timed from when the last worker has come: waiting for a slower one does not
    lengthen the rounds. From one round to the next the length changes by a factor of 2 at most.

    Args:
        share: :math:`\rho`, above 0 and below 1.
        at_least: the shortest round, an int of at least 1.
        at_most: the longest round, an int of at least ``at_least`` and 2, or None.
        first: the first round's length, before anything is known, an int of at least 2.

    Raises:
        ValueError: if an argument is something else.

    Example:
        >>> known = dict(averages_models=True, last_length=8, seconds_per_step=0.01, seconds_per_average=0.005)
        >>> CommBudget(share=0.05).length(Progress(step=80, round=10, workers=2, **known))
        10

    The rule is ours; no paper.
    """

    share: float = 0.05
    at_least: int = 1
    at_most: int | None = None
    first: int = 8
    needs: ClassVar[frozenset[Need]] = frozenset({"seconds"})

    def __post_init__(self) -> None:
        require_number("share", self.share, below=1.0)
        _require_range(self.at_least, self.at_most, self.first)

    def length(self, progress: Progress) -> int:
        step, average, last = progress.seconds_per_step, progress.seconds_per_average, progress.last_length
        if not progress.averages_models or step is None or average is None or last is None:
            return _within(self.first, self.at_least, self.at_most, shortest=2)
        wanted = math.ceil(average / step * (1 - self.share) / self.share / _ABOUT)
        return _within(_near(wanted, last), self.at_least, self.at_most)


@dataclass(frozen=True)
class DriftLimit(Schedule):
    r"""Rounds as long as the replicas stay together: averages more often where they drift apart.

    .. math:: I_{r+2} = \left\lfloor I_r \, \frac{\text{limit}}{d_r} \right\rfloor, \qquad
        d_r = \frac{\sqrt{\frac{1}{N} \sum_i \lVert x_i - \bar x \rVert^2}}{\lVert \bar x - a \rVert}

    and between half and twice the last length. :math:`d_r` is the drift at the end of round r: how far the replicas had
    moved apart, relative to how far they had moved together from the anchor a; it travels in the header of the next
    average, and so acts one round late. Where gradients are mostly noise the drift is near :math:`\sqrt{N - 1}`,
    whatever the length: choose a limit above what your task shows in its first rounds.

    With ``check`` the workers also exchange a header every so many steps inside a round, with each one's own distance
    from the anchor, and end the round where these alone prove a drift above the limit: their standard deviation is at
    most the numerator above, and their mean at least the denominator.

    Costs a copy of the model, the anchor.

    Args:
        limit: of the drift, above 0.
        at_least: the shortest round, an int of at least 1.
        at_most: the longest round, an int of at least ``at_least`` and 2, or None.
        first: the first round's length, before anything is known, an int of at least 2.
        check: steps between two checks, an int of at least 1 and below ``at_most``, or 0 for none.

    Raises:
        ValueError: if an argument is something else.

    Example:
        >>> known = dict(averages_models=True, last_length=8, drift=0.5, drift_length=8)
        >>> DriftLimit(limit=1.0).length(Progress(step=80, round=10, workers=2, **known))
        16

    The rule is ours; no paper.
    """

    limit: float
    at_least: int = 1
    at_most: int | None = None
    first: int = 8
    check: int = 0  # type: ignore[misc]
    needs: ClassVar[frozenset[Need]] = frozenset({"drift"})

    def __post_init__(self) -> None:
        require_number("limit", self.limit)
        _require_range(self.at_least, self.at_most, self.first)
        if not (is_count(self.check) or is_zero(self.check)):
            raise ValueError(f"`check` must be an int of at least 0, got {self.check!r}.")
        if self.at_most is not None and self.check >= self.at_most:
            raise ValueError(f"`check` must be below `at_most`, got {self.check!r} and {self.at_most!r}.")

    def length(self, progress: Progress) -> int:
        drift, steps, last = progress.drift, progress.drift_length, progress.last_length
        if not progress.averages_models or drift is None or steps is None or last is None:
            return _within(self.first, self.at_least, self.at_most, shortest=2)
        wanted = steps * self.limit / drift if drift else math.inf
        return _within(math.floor(_near(wanted, last) * _ABOUT), self.at_least, self.at_most)

    def ends_round(self, progress: Progress) -> bool:
        distances = progress.distances
        if len(distances) < 2:
            return False
        mean = sum(distances) / len(distances)
        spread = math.sqrt(sum((distance - mean) ** 2 for distance in distances) / len(distances))
        return spread > self.limit * mean


def _near(wanted: float, last: float) -> float:
    """Return the number nearest to ``wanted`` from half to twice ``last``."""
    return min(max(wanted, math.ceil(last / 2)), 2 * last)


def _within(length: float, at_least: int, at_most: int | None, shortest: int = 1) -> int:
    return int(max(min(length, at_most or length), at_least, shortest))


def _require_range(at_least: int, at_most: int | None, first: int) -> None:
    require_count("at_least", at_least)
    if at_most is not None and (not is_count(at_most) or at_most < max(2, at_least)):
        raise ValueError(f"`at_most` must be an int of at least `at_least` and 2, or None, got {at_most!r}.")
    if not is_count(first) or first < 2:
        raise ValueError(f"`first` must be an int of at least 2, got {first!r}.")
