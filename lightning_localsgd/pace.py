"""HOW MUCH each worker does: rounds of equal length, or in proportion to the workers' speeds."""

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from lightning_localsgd.clock import Clock
from lightning_localsgd.header import Header
from lightning_localsgd.progress import Need
from lightning_localsgd.schedule import Length

_KEPT = 5  # rounds whose median speed counts
_EQUAL = 0.1  # speeds that differ by less count as equal
_EARLY = 0.2  # of a step, by which a worker may be late that is given it in a round


@dataclass(frozen=True)
class Proportional:
    r"""Let faster workers take more steps in a round, so that all arrive together: Algorithm 3.

    In a round of :math:`I` steps, which the fastest worker takes, worker i takes

    .. math:: I_i = \lfloor I \, v_i / \max_j v_j \rfloor

    up to what earlier rounds of the epoch have left over, with the speeds v. The data of an epoch are dealt out in the
    same proportion, each sample once, so that epochs end together too. A worker that has no step in a round does not
    count in its average.

    The mean over the workers is uniform in the paper. With data of one distribution all three kinds converge to the
    same; where the workers' objectives :math:`f_i` differ they go where the gradient is zero of

    .. math::

        \text{uniform: } \sum_i I_i f_i \qquad \text{steps: } \sum_i I_i^2 f_i \qquad \text{fednova: } \sum_i f_i

    Args:
        speeds: of each rank, in steps per unit of time, in any unit; numbers above 0. Without, they are measured: equal
            in the first epoch, then the median of each worker's last 5 rounds, where differences under 10 % count as
            equal, and cut to whole steps in a round, so that nobody waits for a slow worker's last one. They change
            only between epochs, since loaders fetch ahead.
        average: ``"uniform"``, x̄ = 1/N Σ x_i; ``"steps"``, weighted by the steps of each worker, a + Σ I_i (x_i - a)
            / Σ I_j from the anchor a; ``"fednova"``, each worker's movement counted per step, a + (Σ I_j / N) 1/N Σ
            (x_i - a) / I_i. The last two keep a copy of the model.

    Raises:
        ValueError: if ``speeds`` or ``average`` is something else; at the start of ``fit``, if there is not one speed
            for each worker, and where the data are not dealt by Lightning's own sampler.

    Example:
        >>> Proportional(speeds=(1, 1, 1, 0.25)).average
        'uniform'

    Paper: Yu, Yang, Zhu, *Parallel Restarted SGD with Faster Convergence and Less Communication*, AAAI 2019
    (arXiv 1807.06629); FedNova: Wang, Liu, Liang, Joshi, Poor, *Tackling the Objective Inconsistency Problem in
    Heterogeneous Federated Optimization*, NeurIPS 2020 (arXiv 2007.07481).
    """

    speeds: Sequence[float] | None = None
    average: Literal["uniform", "steps", "fednova"] = "uniform"

    def __post_init__(self) -> None:
        if self.average not in ("uniform", "steps", "fednova"):
            raise ValueError(f'`average` must be "uniform", "steps" or "fednova", got {self.average!r}.')
        if self.speeds is not None:
            speeds = tuple(self.speeds) if isinstance(self.speeds, list | tuple) else ()
            if not speeds or not all(_is_speed(speed) for speed in speeds):
                raise ValueError(f"`speeds` must be a number above 0 for each rank, got {self.speeds!r}.")
            object.__setattr__(self, "speeds", speeds)

    @property
    def needs(self) -> frozenset[Need]:
        """What is to be measured."""
        return frozenset() if self.speeds is not None else frozenset({"seconds"})

    @property
    def needs_anchor(self) -> bool:
        """Whether the average starts from where the round did."""
        return self.average != "uniform"


def _is_speed(speed: Any) -> bool:
    return isinstance(speed, int | float) and not isinstance(speed, bool) and 0 < speed < math.inf


class Pace:
    """How many steps this worker takes, beside the fastest; all its numbers but ``taken`` are equal on all workers.

    Args:
        rule: what was asked for.
        rank: this worker's.
        workers: their number.

    Raises:
        ValueError: if there is not one speed for each worker.
    """

    def __init__(self, rule: Proportional, rank: int, workers: int) -> None:
        if rule.speeds is not None and len(rule.speeds) != workers:
            raise ValueError(f"`speeds` must have one for each of the {workers} workers, got {rule.speeds!r}.")
        self._rule = rule
        self._rank, self._workers = rank, workers
        self._seconds = [deque[float](maxlen=_KEPT) for _ in range(workers)]  # per step, of each worker's last rounds
        self.shares = self._equal()  # of the data of this epoch, of each worker; their largest is 1
        self._heeded: tuple[float, ...] = self.shares  # the measured speeds that they follow
        self._base = 0  # the fastest worker's step at which this epoch began, or was taken up in its midst ...
        self._offset = 0  # ... and the batches that it had then had, by Lightning's count
        self._taken = 0  # steps that this worker has taken since
        self._batches = 0  # of this epoch, of the fastest
        self._accumulate = 1  # batches in a step
        self._own = self._fastest = 1  # steps of this worker, and of the fastest, in the rest of this epoch
        self._last_step = math.inf  # of the run
        self.furthest = 0  # the fastest worker's step at the end of the last epoch
        self.resumed: int | None = None  # batches of the epoch that the fastest had had in the run that is resumed

    def _equal(self) -> tuple[float, ...]:
        return (1.0,) * self._workers

    # -------------------------------------------------------------------------------------------------------- an epoch

    def share_out(self, averages_models: bool, length: Length | None) -> None:
        """Settle the shares of an epoch that is about to begin.

        Args:
            averages_models: otherwise gradients are, and shares are equal.
            length: of the round, if it is known.
        """
        before, speeds = self.shares, self._speeds()
        if not averages_models or speeds is None:
            self.shares = self._equal()
        elif self._rule.speeds is not None:
            self.shares = speeds
        else:
            now = in_groups(speeds)
            if any(abs(new / old - 1) >= _EQUAL for new, old in zip(now, self._heeded, strict=True)):
                self._heeded = now
            self.shares = whole_steps(self._heeded, length) if isinstance(length, int) else self._heeded
        if self.shares != before:
            words = ", ".join(f"{share:.2f}" for share in self.shares)
            rank_zero_info(f"From this epoch on the ranks 0, 1, ... take steps in proportion to {words}.")

    def _speeds(self) -> tuple[float, ...] | None:
        if self._rule.speeds is not None:
            speeds = [float(speed) for speed in self._rule.speeds]
        elif all(self._seconds):
            speeds = [1 / statistics.median(seconds) for seconds in self._seconds]
        else:
            return None
        return tuple(speed / max(speeds) for speed in speeds)

    def begin_epoch(self, step: int, offset: int = 0) -> None:
        """An epoch begins at this step of the fastest worker, or is taken up after so many of its batches."""
        self._base, self._offset, self._taken = step, offset, 0

    def begin_batches(self, batches: Sequence[int], limit: int, accumulate: int, last_step: float) -> int:
        """Its batches begin, or go on; return how many of them this worker is to have, by Lightning's count.

        Args:
            batches: that the data of this epoch are, of each worker.
            limit: what the fastest is to have of them.
            accumulate: batches in a step.
            last_step: of the run.
        """
        self._batches, self._accumulate, self._last_step = limit, accumulate, last_step
        left = max(1, limit - self._offset)
        own = max(1, left * batches[self._rank] // max(batches))
        self._own, self._fastest = math.ceil(own / accumulate), math.ceil(left / accumulate)
        return self._offset + own

    def position(self, step: int) -> int:
        """Return how many batches of this epoch the fastest worker has had after this step."""
        return min(self._offset + max(0, step - self._base) * self._accumulate, self._batches)

    # --------------------------------------------------------------------------------------------------------- a round

    def tick(self) -> None:
        """Count a step of this worker."""
        self._taken += 1

    def is_over(self, clock: Clock) -> bool:
        """Whether this worker has done its part of the round; not if that goes on in the next epoch."""
        end = min(clock.start + clock.length if isinstance(clock.length, int) else math.inf, self._last_step)
        end -= self._base
        return end <= self._fastest and self._taken >= int(end) * self._own // self._fastest

    def hear(self, seconds_per_step: Sequence[float]) -> None:
        """Take what each worker has measured in a round; NaN is nothing."""
        if self._rule.speeds is None:
            for kept, seconds in zip(self._seconds, seconds_per_step, strict=True):
                if seconds > 0:
                    kept.append(seconds)

    def factor(self, steps: Sequence[int], weights: Sequence[int]) -> float:
        """Return by what this worker's movement since the anchor is multiplied before the uniform mean.

        Args:
            steps: of each worker in this round.
            weights: for each worker whether it counts.
        """
        counted = [count for count, weight in zip(steps, weights, strict=True) if weight]
        mean, own = sum(counted) / len(counted), steps[self._rank]
        if self._rule.average == "uniform" or not (weights[self._rank] and own and mean):
            return 1.0
        return own / mean if self._rule.average == "steps" else mean / own

    # -------------------------------------------------------------------------------------------------------- the data

    def deal(self, loader: Any, header: Header, undo: ExitStack) -> None:
        """Deal the data of a training loader out by the shares, until ``undo`` is closed.

        Raises:
            ValueError: on all ranks, if the loader's samples are not dealt by Lightning's own sampler.
        """
        header.agree(self._why_not_dealt(loader))  # none may wait for one that has raised
        sampler = loader.sampler
        batch = loader.batch_size if loader.batch_sampler is not None else 1
        facts = (len(loader.dataset), batch, loader.drop_last, sampler.shuffle, sampler.seed)
        told = header.gather(facts)
        if len(set(told)) > 1:
            raise ValueError(
                "`pace` must be 'equal' where the workers' loaders differ in (samples, batch size, drop_last, shuffle, "
                f"seed), got on the ranks 0, 1, ...: {', '.join(map(str, told))}."
            )
        put_sampler(loader, Dealt(sampler, lambda: self.shares, batch, loader.drop_last))
        undo.callback(put_sampler, loader, sampler)  # which may be the user's own

    def _why_not_dealt(self, loader: Any) -> ValueError | None:
        map_style = isinstance(loader, DataLoader) and type(loader.sampler) in (DistributedSampler, Dealt)
        if map_style and type(loader.batch_sampler) in (BatchSampler, type(None)):
            sampler = loader.sampler
            if (sampler.num_replicas, sampler.rank, sampler.drop_last) == (self._workers, self._rank, False):
                return None
            return ValueError(
                "`pace` must be 'equal' with a `DistributedSampler` of one's own that drops samples or deals to others "
                f"than the {self._workers} workers, got drop_last={sampler.drop_last} and "
                f"num_replicas={sampler.num_replicas}."
            )
        what = type(loader).__name__
        if isinstance(loader, DataLoader):
            what += f" with `{type(loader.sampler).__name__}` and `{type(loader.batch_sampler).__name__}`"
        return ValueError(
            "`pace` must be 'equal' where the samples are not dealt to the ranks by a `DistributedSampler`, as "
            f"Lightning puts it in: with iterable data and with other samplers of one's own, got a {what}."
        )

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self, step: int) -> dict[str, Any]:
        """Return what is equal on all workers, at this step."""
        return {
            "shares": list(self.shares),
            "seconds": [list(kept) for kept in self._seconds],
            "heeded": list(self._heeded),
            "base": self._base,
            "offset": self._offset,
            "batches": self.position(step),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, if there are as many workers."""
        if len(state["shares"]) == self._workers:
            self.shares, self._heeded = tuple(state["shares"]), tuple(state["heeded"])
            self._seconds = [deque(kept, maxlen=_KEPT) for kept in state["seconds"]]
        self._base, self._offset, self.resumed = int(state["base"]), int(state["offset"]), int(state["batches"])

    def own_state(self) -> int:
        """Return where this worker alone is, for an exact resume."""
        return self._taken

    def load_own_state(self, taken: int) -> None:
        """Go on from there."""
        self._taken = taken


def put_sampler(loader: Any, sampler: Any) -> None:
    """Put an index sampler in the place of a loader's own."""
    if loader.batch_sampler is not None:
        loader.batch_sampler.sampler = sampler
    vars(loader)["sampler"] = sampler  # `DataLoader.__setattr__` would refuse


def in_groups(speeds: Sequence[float]) -> tuple[float, ...]:
    """Return the speeds with each that differs from a faster one by less than 10 % put level, relative to the largest.

    Args:
        speeds: above 0.

    Example:
        >>> in_groups([2.0, 1.0, 1.9, 1.05])
        (1.0, 0.5256410256410257, 1.0, 0.5256410256410257)
    """
    found = [0.0] * len(speeds)
    group: list[int] = []
    for place in [*sorted(range(len(speeds)), key=lambda place: -speeds[place]), None]:
        if place is None or (group and speeds[place] <= speeds[group[0]] * (1 - _EQUAL)):
            mean = math.fsum(speeds[one] for one in group) / len(group)
            for one in group:
                found[one] = mean
            group = []
        if place is not None:
            group.append(place)
    return tuple(speed / max(found) for speed in found)


def whole_steps(speeds: Sequence[float], length: int) -> tuple[float, ...]:
    """Return the speeds cut to whole steps in a round, relative to the largest.

    A step more would let all others wait for nearly a whole one of a slow worker; who has none in a round keeps its
    speed, and has one in some.

    Args:
        speeds: relative to the largest.
        length: of the round, in the fastest worker's steps.

    Example:
        >>> whole_steps([1.0, 0.3, 0.24, 0.05], 8)
        (1.0, 0.25, 0.25, 0.05)
    """
    steps = [math.floor(length * speed + _EARLY) for speed in speeds]
    return tuple(count / length if count else speed for count, speed in zip(steps, speeds, strict=True))


def counts(samples: int, shares: Sequence[float], at_least: int = 0) -> list[int]:
    """Share so many samples out in proportion, by largest remainders; who has more, and then who is first, gets more.

    Args:
        samples: to be shared out.
        shares: of each worker, above 0.
        at_least: what each gets, if there are enough.

    Example:
        >>> counts(10, [1, 1, 0.5])
        [4, 4, 2]
    """
    total = math.fsum(shares)
    exact = [samples * share / total for share in shares]
    found = [int(part) for part in exact]
    by_remainder = sorted(range(len(shares)), key=lambda place: (found[place] - exact[place], -shares[place], place))
    for place in by_remainder[: samples - sum(found)]:
        found[place] += 1
    for place in range(len(shares)):
        while found[place] < at_least and max(found) > at_least:
            largest = found.index(max(found))
            moved = min(at_least - found[place], found[largest] - at_least)
            found[place] += moved
            found[largest] -= moved
    return found


class Dealt(DistributedSampler[Any]):
    """Deals the samples of an epoch to the workers by their shares, each once.

    Its order is that of the ``DistributedSampler`` in whose place it is, with which it agrees where shares are equal
    and the workers' number divides the samples'. Its length is that of the worker with most, on every worker, since
    Lightning counts batches, limits and validations by it.

    Args:
        sampler: the one that Lightning has made.
        shares: returns the share of each worker, above 0.
        batch: samples in a batch.
        drop_last: whether an incomplete batch is dropped.

    Raises:
        ValueError: if there is not a batch for each worker.
    """

    def __init__(
        self,
        sampler: DistributedSampler[Any],
        shares: Callable[[], Sequence[float]],
        batch: int,
        drop_last: bool,
    ) -> None:
        super().__init__(
            sampler.dataset,
            num_replicas=sampler.num_replicas,
            rank=sampler.rank,
            shuffle=sampler.shuffle,
            seed=sampler.seed,
        )
        self.epoch = sampler.epoch
        self._shares, self._batch, self._drops = shares, batch, drop_last
        self._samples = len(sampler.dataset)  # type: ignore[arg-type]
        if self._samples < self.num_replicas * (batch if drop_last else 1):
            raise ValueError(
                f"There must be a batch for each of the {self.num_replicas} workers, got {self._samples} samples in "
                f"batches of {batch}."
            )

    def counts(self) -> list[int]:
        """Return how many samples of the epoch each worker gets."""
        return counts(self._samples, self._shares(), at_least=min(self._batch, self._samples // self.num_replicas))

    def batches(self) -> list[int]:
        """Return how many batches of the epoch each worker gets."""
        return [count // self._batch if self._drops else math.ceil(count / self._batch) for count in self.counts()]

    def __len__(self) -> int:
        return max(self.counts())

    def __iter__(self) -> Iterator[int]:
        everything: DistributedSampler[Any] = DistributedSampler(
            self.dataset, num_replicas=1, rank=0, shuffle=self.shuffle, seed=self.seed
        )
        everything.set_epoch(self.epoch)
        order = list(everything)
        return iter([order[place] for place in places(self.counts(), self.rank)])


def places(counts: Sequence[int], rank: int) -> list[int]:
    """Return where in the order of all samples those of a worker are, who get theirs in turns, evenly spread.

    Args:
        counts: of samples, of each worker.
        rank: the worker's.

    Example:
        >>> places([4, 2], 0), places([4, 2], 1)
        ([0, 2, 3, 5], [1, 4])
    """
    times = np.concatenate([(2 * np.arange(count) + 1) / (2 * max(1, count)) for count in counts])
    owners = np.repeat(np.arange(len(counts)), counts)
    turns = owners[np.lexsort((owners, times))]
    return np.flatnonzero(turns == rank).tolist()
