"""WHAT IS LEFT of an epoch's data where a run goes on in the midst of it, and who gets it, with any number of workers.

A ``DistributedSampler`` deals one permutation of the samples in turns. A checkpoint keeps, for each deal of this epoch,
how many samples each worker had had of its share: a *cut*. What the cuts leave is dealt anew, in the same order, to
whoever is there. Lightning's count of the batches of the epoch is set to what is missing from a whole one, so that its
limits, validations and progress bars mean what they mean in any epoch, and the next epoch is an ordinary one.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from lightning_localsgd import _lightning
from lightning_localsgd.pace import Dealt, put_sampler

Cut = Sequence[int]  # samples that each worker of one deal has had of its share
State = dict[str, Any]  # plain: loads with `weights_only=True`


def left_over(order: Sequence[int], cuts: Sequence[Cut]) -> list[int]:
    """Return what is left of ``order``, still in order, after it and then each rest have been dealt in turns and cut.

    Args:
        order: sample ids.
        cuts: of each deal, the first first; at least 0.

    Example:
        Ten samples for two workers, who have had 3 and 2; then for three, who have had one each.

        >>> left_over(range(10), [[3, 2]]), left_over(range(10), [[3, 2], [1, 1, 1]])
        ([5, 6, 7, 8, 9], [8, 9])
    """
    left = np.asarray(order, dtype=np.int64)
    for cut in cuts:
        places = np.arange(len(left))
        left = left[places // len(cut) >= np.asarray(cut)[places % len(cut)]]
    found: list[int] = left.tolist()
    return found


def count_left(samples: int, cuts: Sequence[Cut]) -> int:
    """Return the length of what :func:`left_over` returns of so many samples."""
    for cut in cuts:
        samples = sum(max(0, len(range(worker, samples, len(cut))) - had) for worker, had in enumerate(cut))
    return samples


@dataclass(frozen=True)
class Deal:
    """How samples are dealt to workers in turns and in batches, each worker as many, as a ``DistributedSampler`` does.

    Args:
        workers: their number, at least 1.
        batch: samples in a batch, at least 1.
        drops_samples: whether samples that are too many are left out; else the first ones are dealt twice.
        drops_batch: whether a last batch that is not full is left out.

    Example:
        >>> deal = Deal(workers=2, batch=2)
        >>> deal.share([5, 6, 7, 8, 9], worker=1), deal.size(5), deal.batches(5)
        ([6, 8, 5], 3, 2)
    """

    workers: int
    batch: int
    drops_samples: bool = False
    drops_batch: bool = False

    def size(self, samples: int) -> int:
        """Return how many of so many samples each worker gets."""
        return samples // self.workers if self.drops_samples else math.ceil(samples / self.workers)

    def batches(self, samples: int) -> int:
        """Return how many batches each worker gets of so many samples."""
        size = self.size(samples)
        return size // self.batch if self.drops_batch else math.ceil(size / self.batch)

    def share(self, order: Sequence[int], worker: int) -> list[int]:
        """Return what a worker gets of ``order``."""
        total = self.size(len(order)) * self.workers
        return [order[place % len(order)] for place in range(worker, total, self.workers)]


class RestSampler(DistributedSampler[Any]):
    """Deals what is left of one epoch, and all other epochs as the ``DistributedSampler`` in whose place it is.

    Its length is always that of a whole epoch, by which Lightning counts.

    Args:
        sampler: the one in whose place it is.
        deal: how it deals.
        state: of the epoch that is gone on with.
        cuts: of this epoch.
    """

    def __init__(self, sampler: DistributedSampler[Any], deal: Deal, state: State, cuts: Sequence[Cut]) -> None:
        super().__init__(
            sampler.dataset,
            num_replicas=sampler.num_replicas,
            rank=sampler.rank,
            shuffle=sampler.shuffle,
            seed=sampler.seed,
            drop_last=sampler.drop_last,
        )
        self._own, self._deal, self._cuts, self._state = sampler, deal, cuts, state
        self.epoch = sampler.epoch

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self._own.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        state = self._state
        if self.epoch != state["epoch"]:
            return super().__iter__()
        # The order of the run that began the epoch, whatever the seed of this one.
        everything: DistributedSampler[Any] = DistributedSampler(
            self.dataset, num_replicas=1, rank=0, shuffle=bool(state["shuffle"]), seed=state["seed"]
        )
        everything.set_epoch(self.epoch)
        return iter(self._deal.share(left_over(list(everything), self._cuts), self.rank))


class Rest:
    """Follows what this worker has had of an epoch's data, and takes up an epoch where all workers had left it.

    Args:
        trainer: whose fit it is.
        rank: this worker's.
        workers: their number.
        state: what :meth:`together` returned in the run that is gone on from.
        stepped: what :meth:`own_state` returned, if this worker goes on exactly, within its own share.
    """

    def __init__(
        self, trainer: Trainer, rank: int, workers: int, state: State | None = None, stepped: int | None = None
    ) -> None:
        self._trainer, self._rank, self._workers = trainer, rank, workers
        self._state, self._exact = state or {}, stepped
        self._cuts: list[Cut] = []  # earlier ones of this epoch
        self._base = 0  # Lightning's count of the batches of this epoch, when its data were dealt last ...
        self._stepped = 0  # ... and when this worker's optimizers have stepped last
        self._in_batch = False  # it has been begun, and not been counted for the loggers yet
        self.ahead = int(self._state.get("ahead", 0))  # steps, as :func:`_lightning.steps_ahead` counts them
        self._is_first = True  # no epoch has begun in this fit
        self._resumes = False  # an epoch is being taken up, and has had no batch since
        self._ends = False  # an epoch is being taken up at its end
        self._source: _Source | str = "no loader is known"  # or why the rest of its epochs cannot be dealt
        self._why_not: str | None = None  # why that of this epoch cannot

    # ----------------------------------------------------------------------------------------------------- the loader

    def follow(self) -> None:
        """The loaders are known, and their iterators not made yet."""
        self.leave()
        state, loaders = self._state, _lightning.loaders(self._trainer)
        if "epoch" in state and self._is_first:
            # Processes that load ahead begin before Lightning tells the samplers their epoch.
            _lightning.set_sampler_epochs(self._trainer, state["epoch"] + self._is_over)
        if len(loaders) != 1:
            self._source = f"there are {len(loaders)} training loaders"
        elif (why := why_not(loaders[0], self._rank, self._workers)) is not None:
            self._source = why
        else:
            self._source = source = _Source.of(loaders[0])
            cuts = self._earlier_cuts()
            if cuts and not self._is_over and not source.is_another(state):
                put_sampler(source.loader, RestSampler(source.sampler, source.deal, state, cuts))

    def leave(self) -> None:
        """Give the loader its own sampler back."""
        if isinstance(self._source, _Source):
            put_sampler(self._source.loader, self._source.sampler)
        self._source = "no loader is known"

    @property
    def _is_over(self) -> bool:
        """Whether nothing is to be done in the epoch that is in the checkpoint, and the next one comes."""
        return self._exact is None and bool(self._state.get("over"))

    def _earlier_cuts(self) -> list[Cut]:
        """Return the cuts of the epoch that is taken up before the deal that goes on."""
        cuts: list[Cut] = self._state.get("cuts", [])
        return cuts if self._exact is None else cuts[:-1]

    # ------------------------------------------------------------------------------------------------------ an epoch

    @property
    def goes_on(self) -> bool:
        """Whether an epoch is gone on with what is left of it, or it is said here why not."""
        return self._exact is None and bool({"cuts", "why_not"} & self._state.keys())

    def restart(self) -> None:
        """What has been since the fit began does not count: the epoch that comes is the first."""
        self._is_first = True

    def starts_epoch(self) -> bool:
        """An epoch begins or is taken up; its hooks have not been called. Return whether there is one."""
        first, self._is_first = self._is_first, False
        there_is_one = self._takes_up() if first else self._begins()
        if first and self._state and self._exact is None and isinstance(self._source, _Source):
            self.ahead = _lightning.steps_ahead(self._trainer)
        return there_is_one

    def _begins(self) -> bool:
        self._cuts, self._base, self._stepped, self._in_batch, self._why_not = [], 0, 0, False, None
        return True

    def _takes_up(self) -> bool:
        self._begins()
        trainer, state, source = self._trainer, self._state, self._source
        if self._is_over:
            if not state["validated"]:
                return _lightning.begins_next_epoch(trainer, steps_schedulers=False)
            size = trainer.num_training_batches
            self._stepped = int(size) if math.isfinite(size) else _lightning.batches(trainer)
            _lightning.set_batches(trainer, self._stepped)
            self._ends = True
            return True
        if not _lightning.in_epoch(trainer):
            return True
        self._resumes = "cuts" in state and self._exact is None
        if isinstance(source, str) or source.is_another(state):
            why = self._why_not = state.get("why_not", source if isinstance(source, str) else source.why_another(state))
            if self.goes_on:
                rank_zero_warn(
                    f"In the epoch that is gone on with, samples may be repeated and as many left out, because {why}.",
                    category=PossibleUserWarning,  # as Lightning's own, which knows no reason and is left out
                )
            return True
        self._cuts = self._earlier_cuts()
        self._base = source.whole - source.batches(self._cuts) if self._cuts else 0
        if self._exact is not None:
            self._stepped = self._exact
            return True
        self._stepped = self._base
        if self._base >= trainer.num_training_batches:  # too little is left for a batch of each worker
            self._resumes = False
            return _lightning.begins_next_epoch(trainer, steps_schedulers=True)
        _lightning.set_batches(trainer, self._base)
        return True

    def before_batch(self) -> None:
        """Before a batch, which may not come.

        Raises:
            StopIteration: if nothing is left to do in this epoch but its end.
        """
        self._in_batch = False
        if self._ends:
            self._ends = False
            raise StopIteration
        if self._resumes:
            self._resumes = False
            _lightning.forget_resuming(self._trainer)

    def begins_batch(self) -> None:
        """A batch is fetched next."""
        self._in_batch = True

    def note_step(self) -> None:
        """This worker has taken a step, with all samples that it has had so far."""
        self._stepped = _lightning.batches(self._trainer)

    def ends_epoch(self) -> None:
        """The batches of an epoch are over."""
        self._in_batch = False

    # -------------------------------------------------------------------------------------------------- checkpoints

    def own_state(self) -> int:
        """Return where this worker alone is, for an exact resume."""
        return self._stepped

    def state(self) -> State:
        """Return what this worker tells the others when a checkpoint is saved."""
        trainer, source = self._trainer, self._source
        epoch, done = _lightning.epoch(trainer), _lightning.batches(trainer)
        if not _lightning.in_epoch(trainer):
            return {"epoch": epoch, "ahead": self.ahead}
        if isinstance(source, str) or self._why_not is not None:
            return {"epoch": epoch, "ahead": self.ahead, "why_not": self._why_not or source}
        sampler = source.sampler
        order = {"epoch": sampler.epoch, "seed": sampler.seed, "shuffle": int(sampler.shuffle)}
        if self._cuts:  # the order is that of the run that began the epoch
            order = {name: self._state[name] for name in order}
        return order | {
            "ahead": self.ahead,
            "samples": source.samples,
            "cuts": [list(cut) for cut in self._cuts],
            "had": source.had(self._stepped - self._base, self._cuts),
            "over": int(_lightning.is_last_batch(trainer) and self._stepped == done),
            "validated": int(_lightning.is_validated(trainer)),
            "back": done - self._stepped,
            "logged": _lightning.logged_step(trainer) + int(self._in_batch and self._stepped == done),
        }

    @staticmethod
    def together(states: Sequence[State], source: int) -> State:
        """Return what a checkpoint keeps: the epoch that comes next, or how far all workers are in this one.

        Args:
            states: of all workers.
            source: the rank whose loops are in the checkpoint.
        """
        kept = dict(states[source])
        for state in states:
            if "had" not in state:  # if it has no place in an epoch, or none that can be kept, there is none
                why = {"why_not": state["why_not"]} if "why_not" in state else {}
                return {"epoch": kept["epoch"], "ahead": kept["ahead"]} | why
        had = [state["had"] for state in states]
        del kept["had"]
        return kept | {"cuts": [*kept["cuts"], had], "over": min(state["over"] for state in states)}


@dataclass(frozen=True)
class _Source:
    """A loader the rest of whose epoch can be dealt."""

    loader: Any
    sampler: DistributedSampler[Any]  # its own
    deal: Deal
    samples: int

    @classmethod
    def of(cls, loader: Any) -> "_Source":
        sampler, batches = loader.sampler, loader.batch_sampler is not None
        batch, drops = (loader.batch_size, loader.drop_last) if batches else (1, False)
        return cls(loader, sampler, Deal(sampler.num_replicas, batch, sampler.drop_last, drops), len(sampler.dataset))

    def is_another(self, state: State) -> bool:
        """Whether it is not known to be the one of which ``state`` tells."""
        return state.get("samples") != self.samples

    def why_another(self, state: State) -> str:
        """Return why it is not."""
        if "samples" not in state:
            return "the checkpoint does not say what was had of it"
        return f"it had {state['samples']} samples and has {self.samples}"

    @property
    def whole(self) -> int:
        """Batches of each worker in a whole epoch."""
        return self.deal.batches(self.samples)

    def batches(self, cuts: Sequence[Cut]) -> int:
        """Batches of each worker in what the cuts leave."""
        return self.deal.batches(count_left(self.samples, cuts))

    def had(self, batches: int, cuts: Sequence[Cut]) -> int:
        """Samples of a worker in so many batches of what the cuts leave."""
        return min(batches * self.deal.batch, self.deal.size(count_left(self.samples, cuts)))


def why_not(loader: Any, rank: int, workers: int) -> str | None:
    """Return why what is left of a loader's epoch cannot be dealt anew, or None if it can."""
    if not isinstance(loader, DataLoader):
        return f"a `{type(loader).__name__}` has no indices to deal"
    if isinstance(loader.dataset, IterableDataset):
        return f"a `{type(loader.dataset).__name__}` has no indices to deal"
    if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
        return f"a `{type(loader).__name__}` keeps a place of its own, which is not that of all workers"
    if type(loader.batch_sampler) not in (BatchSampler, type(None)):
        return f"a `{type(loader.batch_sampler).__name__}` makes its own batches"
    sampler = loader.sampler
    if type(sampler) is Dealt:
        return "with its `pace` the workers' shares are unequal"
    if type(sampler) is not DistributedSampler:
        return f"the samples are not dealt by a `DistributedSampler` but by a `{type(sampler).__name__}`"
    if (sampler.num_replicas, sampler.rank) != (workers, rank):
        return f"its `DistributedSampler` deals to {sampler.num_replicas} others than the {workers} workers"
    return None
