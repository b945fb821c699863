"""WHEN a round ends: schedules, which say how long the next round is."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from lightning_localsgd.progress import Need, Progress


@dataclass(frozen=True)
class Epochs:
    """The length of a round that ends with a pass over the data, whatever the number of its steps.

    Args:
        count: how many passes, at least 1; with ``math.inf`` only the end of ``fit`` ends the round.
    """

    count: float


Length = int | Epochs


class Schedule(ABC):
    r"""Says how many steps the next round has.

    Workers that start round :math:`r` at step :math:`t_r` average their models at
    :math:`t_{r+1} = t_r + \mathrm{length}(t_r, r, N, \ldots)`. A schedule is asked with the same numbers on every
    worker and must answer alike: write it as a frozen dataclass without random numbers or clocks.

    What is to be measured for it stands in ``needs``, as a class attribute or property: ``"learning_rate"`` and
    ``"epoch"`` (for which the workers exchange one more header in each round, at its first step), ``"loss"``,
    ``"steps_left"``, ``"seconds"`` and ``"drift"`` (which keeps a copy of the model). The rest of :class:`Progress` is
    always known.

    A schedule may also end a round early: with ``check`` above 0 the workers exchange a header, which costs a round
    trip, after each ``check`` steps inside a round, and ask :meth:`ends_round`.

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

    needs: ClassVar[frozenset[Need]] = frozenset()
    check: ClassVar[int] = 0

    @abstractmethod
    def length(self, progress: Progress) -> Length:
        """Return the number of steps of the round that starts now, at least 1, or :class:`Epochs`."""

    @property
    def averages_only_gradients(self) -> bool:
        """Whether it is known beforehand that no round is longer than one step."""
        return False

    def ends_round(self, progress: Progress) -> bool:
        """Return whether the round ends here, at a check."""
        return False

    def warms_up(self, progress: Progress) -> bool:
        """Return whether a round of length 1 is one in which gradients are averaged by intent, before outer steps."""
        return False


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
        require_count("period", self.period)

    @property
    def averages_only_gradients(self) -> bool:
        return self.period == 1

    def length(self, progress: Progress) -> int:
        return self.period


@dataclass(frozen=True)
class EveryEpoch(Schedule):
    r"""Average after every ``n`` passes over the data: iterative parameter mixing, and FedAvg's usual form.

    .. math:: x_i \leftarrow \frac{1}{N} \sum_{j=1}^{N} x_j \quad \text{after the passes } n, 2n, 3n, \ldots

    A pass ends when every worker's data has ended, also where they have different lengths.

    Args:
        n: passes in a round, an int of at least 1.

    Raises:
        ValueError: if ``n`` is not an int of at least 1.

    Example:
        >>> EveryEpoch(2).length(Progress(step=0, round=0, workers=4))
        Epochs(count=2)

    Paper: McDonald, Hall, Mann, *Distributed Training Strategies for the Structured Perceptron*, NAACL 2010; McMahan et
    al., *Communication-Efficient Learning of Deep Networks from Decentralized Data*, AISTATS 2017 (arXiv 1602.05629).
    """

    n: int = 1

    def __post_init__(self) -> None:
        require_count("n", self.n)

    def length(self, progress: Progress) -> Epochs:
        return Epochs(self.n)


@dataclass(frozen=True)
class AtEnd(Schedule):
    r"""Average once, when ``fit`` ends: one-shot averaging.

    .. math:: x = \frac{1}{N} \sum_{j=1}^{N} x_j^{T}

    Example:
        >>> AtEnd().length(Progress(step=0, round=0, workers=4))
        Epochs(count=inf)

    Paper: Zinkevich, Weimer, Li, Smola, *Parallelized Stochastic Gradient Descent*, NeurIPS 2010.
    """

    def length(self, progress: Progress) -> Epochs:
        return Epochs(math.inf)


@dataclass(frozen=True)
class PostLocal(Schedule):
    r"""Average gradients for the first steps, as DDP does, and models from then on: post-local SGD.

    .. math:: I(t) = \begin{cases} 1 & t < t' \\ I_\text{then}(t) & t \ge t' \end{cases}

    The reducer of the gradients goes with its memory at the switch and does not come back: a later round of length 1
    averages models.

    Args:
        warmup: :math:`t'`, an int of at least 0; or ``"decay"``: until the learning rate is lower than it has been,
            which with a schedule that first warms up is when it begins to fall.
        then: the schedule that follows, or its period; it is asked with the steps and rounds of the whole run.

    Raises:
        ValueError: if ``warmup`` or ``then`` is something else.

    Example:
        >>> schedule = PostLocal(warmup=500, then=16)
        >>> [schedule.length(Progress(step=step, round=step, workers=4)) for step in (0, 499, 500)]
        [1, 1, 16]

    Paper: Lin, Stich, Patel, Jaggi, *Don't Use Large Mini-Batches, Use Local SGD*, ICLR 2020 (arXiv 1808.07217).
    """

    warmup: int | Literal["decay"]
    then: int | Schedule

    def __post_init__(self) -> None:
        if self.warmup != "decay" and not (is_count(self.warmup) or is_zero(self.warmup)):
            raise ValueError(f'`warmup` must be an int of at least 0 or "decay", got {self.warmup!r}.')
        object.__setattr__(self, "then", as_schedule("then", self.then))

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        return self._then.needs | ({"learning_rate"} if self.warmup == "decay" else frozenset())

    @property
    def check(self) -> int:  # type: ignore[override]
        return self._then.check

    @property
    def averages_only_gradients(self) -> bool:
        return self._then.averages_only_gradients

    @property
    def _then(self) -> Schedule:
        assert isinstance(self.then, Schedule)
        return self.then

    def warms_up(self, progress: Progress) -> bool:
        if progress.averages_models:
            return False
        if self.warmup == "decay":
            return progress.learning_rate is None or progress.learning_rate >= (progress.peak_learning_rate or 0.0)
        return progress.step < self.warmup

    def length(self, progress: Progress) -> Length:
        return 1 if self.warms_up(progress) else self._then.length(progress)

    def ends_round(self, progress: Progress) -> bool:
        return self._then.ends_round(progress)


@dataclass(frozen=True)
class Stages(Schedule):
    r"""Another period from given steps, or epochs, on.

    .. math:: I(t) = I_k \quad \text{for } s_k \le t < s_{k+1}

    A stage begins with the first round that starts at its beginning or later. With the steps at which the learning rate
    changes it is Algorithm 2 of Parallel Restarted SGD for a learning rate that falls in steps.

    Args:
        periods: from a step (or epoch) of at least 0 to the period from there on, or another schedule; the first is
            from 0.
        unit: what the keys count: ``"step"`` or ``"epoch"``.

    Raises:
        ValueError: if ``periods`` has no key 0, or anything in it is something else.

    Example:
        >>> schedule = Stages({0: 4, 1000: 16})
        >>> [schedule.length(Progress(step=step, round=step // 4, workers=4)) for step in (0, 996, 1000)]
        [4, 4, 16]

    Paper: Yu, Yang, Zhu, *Parallel Restarted SGD with Faster Convergence and Less Communication*, AAAI 2019
    (arXiv 1807.06629).
    """

    periods: Mapping[int, int | Schedule]
    unit: Literal["step", "epoch"] = "step"

    def __post_init__(self) -> None:
        if self.unit not in ("step", "epoch"):
            raise ValueError(f'`unit` must be "step" or "epoch", got {self.unit!r}.')
        given = self.periods
        if not isinstance(given, Mapping) or not any(is_zero(start) for start in given):
            raise ValueError(f"`periods` must have a period from 0 on, got {given!r}.")
        if not all(is_count(start) or is_zero(start) for start in given):
            raise ValueError(f"The keys of `periods` must be ints of at least 0, got {given!r}.")
        stages = {start: as_schedule("periods", given[start]) for start in sorted(given)}
        object.__setattr__(self, "periods", stages)

    def __hash__(self) -> int:
        return hash((tuple(self.periods.items()), self.unit))

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        own: frozenset[Need] = frozenset({"epoch"}) if self.unit == "epoch" else frozenset()
        return own.union(*(stage.needs for stage in self._stages.values()))

    @property
    def check(self) -> int:  # type: ignore[override]
        checks = [stage.check for stage in self._stages.values() if stage.check]
        return math.gcd(*checks) if checks else 0

    @property
    def averages_only_gradients(self) -> bool:
        return all(stage.averages_only_gradients for stage in self._stages.values())

    @property
    def _stages(self) -> Mapping[int, Schedule]:
        stages: Any = self.periods
        return stages  # type: ignore[no-any-return]

    def _stage(self, progress: Progress) -> Schedule:
        now = progress.step if self.unit == "step" else progress.epoch
        assert now is not None
        return self._stages[max(start for start in self._stages if start <= now)]

    def length(self, progress: Progress) -> Length:
        return self._stage(progress).length(progress)

    def ends_round(self, progress: Progress) -> bool:
        return self._stage(progress).ends_round(progress)

    def warms_up(self, progress: Progress) -> bool:
        return self._stage(progress).warms_up(progress)


def require_known_needs(schedule: Schedule) -> None:
    """Raise a ``ValueError`` if a schedule needs something that nobody measures, or wants checks that cannot be."""
    unknown = sorted(set(schedule.needs) - set(get_args(Need)))
    if unknown:
        raise ValueError(
            f"`needs` of a schedule must be some of {', '.join(get_args(Need))}, got {', '.join(unknown)}."
        )
    if not (is_count(schedule.check) or is_zero(schedule.check)):
        raise ValueError(f"`check` of a schedule must be an int of at least 0, got {schedule.check!r}.")


def as_schedule(name: str, value: Any) -> Schedule:
    """Return a schedule as it is, and a period as ``Every``.

    Raises:
        ValueError: if ``value`` is neither.
    """
    if isinstance(value, Schedule):
        return value
    if not is_count(value):
        raise ValueError(f"`{name}` must be an int of at least 1 or a schedule, got {value!r}.")
    return Every(value)


def require_count(name: str, value: Any) -> None:
    """Raise a ``ValueError`` if ``value`` is not an int of at least 1."""
    if not is_count(value):
        raise ValueError(f"`{name}` must be an int of at least 1, got {value!r}.")


def require_number(name: str, value: Any, above: float = 0.0, below: float = math.inf) -> None:
    """Raise a ``ValueError`` if ``value`` is not a number between these two."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < below:
        limits = f"above {above:g}" + (f" and below {below:g}" if below < math.inf else "")
        raise ValueError(f"`{name}` must be a number {limits}, got {value!r}.")


def is_count(value: object) -> bool:
    """Whether this is an int of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_zero(value: object) -> bool:
    """Whether this is the int 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value == 0
