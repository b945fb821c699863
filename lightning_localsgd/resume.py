"""WHERE in its fit a worker is, to be kept in its part of a checkpoint, and how a fit goes on from exactly there."""

import warnings
from collections.abc import Iterable, Iterator

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_localsgd import _lightning
from lightning_localsgd._lightning import Stage
from lightning_localsgd.checkpoint import KEY, Parts
from lightning_localsgd.header import Header
from lightning_localsgd.place import Follower, State, is_plain, random_state, set_random_state

_RANDOM_IN_PROCESSES = "the dataset draws random numbers in the loader's processes, whose states are not kept"


class Fit:
    """Follows one worker's fit, tells where it is, and goes on from where one was.

    Args:
        trainer: whose fit this is.
        device: the worker's.
        state: what :meth:`state` returned in the run that is gone on from.
    """

    def __init__(self, trainer: Trainer, device: torch.device, state: State | None = None) -> None:
        self._trainer = trainer
        self._device = device
        self._state = state  # until it has been taken up
        self._stage = Stage(state["stage"]) if state else None
        self._followers: list[Follower] = []
        self._watches = False
        self.waits = False  # its data in this epoch has ended
        self.validates = False  # validation has begun
        self.ends_batch = False  # what follows a batch and its hooks is still to come

    @property
    def finds_its_place(self) -> bool:
        """Whether the batches of an epoch are taken up, or will be, where they were left."""
        return self._stage is not None and not any(follower.why_not for follower in self._followers)

    @property
    def is_taken_up(self) -> bool:
        """Whether the epoch that begins now is the first after a stop."""
        return self._stage is not None

    @property
    def goes_on_in_epoch(self) -> bool:
        """Whether it goes on in the midst of an epoch."""
        return self._stage is not None and self._stage.in_epoch

    def leave(self) -> None:
        """Undo what was done to the loaders."""
        for follower in self._followers:
            follower.leave()
        self._followers = []

    # ---------------------------------------------------------------------------------------------------------- to keep

    def state(self) -> State:
        """Return where the fit is."""
        trainer = self._trainer
        stage = _lightning.stage(trainer, self.waits, self.validates)
        stage = Stage.BATCH_END if stage is Stage.BETWEEN and self.ends_batch else stage
        why_not = [] if stage.why_not is None else [stage.why_not]
        if stage.in_epoch:
            why_not += [why for follower in self._followers if (why := follower.why_not)]
        why_not += _lightning.forgotten(trainer, stage)
        fetched, why = _lightning.fetched(trainer)
        why_not += [why] if why else []
        if fetched["ahead"] and not is_plain(fetched["ahead"]):
            fetched["ahead"] = []
            why_not.append("the batches that were fetched ahead are not made of tensors, numbers, lists and dicts")
        module = trainer.lightning_module
        keeps_gradients = not module.automatic_optimization or (stage.in_epoch and _lightning.accumulates(trainer))
        return {
            "stage": stage.value,
            "lightning": _lightning.own_state(trainer, stage),
            "random": random_state(self._device),
            "data": [
                follower.state(iterator, redo=stage is Stage.IN_BATCH)
                for follower, iterator in zip(self._followers, _lightning.iterators(trainer), strict=True)
            ],
            "fetched": fetched,
            "gradients": _gradients(module) if keeps_gradients else {},
            "metrics": {name: _metric_state(metric) for name, metric in _metrics(module)},
            "logged": {name: value.detach().clone() for name, value in trainer.callback_metrics.items()},
            "why_not": why_not,
        }

    # -------------------------------------------------------------------------------------------------------- to go on

    def follow(self) -> None:
        """The loaders are known, and their iterators not made yet."""
        self.leave()
        self._followers = [Follower(loader) for loader in _lightning.loaders(self._trainer)]
        if self._state is None or self._stage is None:
            return
        _lightning.set_sampler_epochs(self._trainer)
        if self._stage.in_epoch:
            self._find_places()
        for follower in self._followers:
            follower.watch(anew=not self._stage.in_epoch)

    def _find_places(self) -> None:
        assert self._state is not None
        for follower, state in zip(self._followers, self._state["data"], strict=False):
            follower.go_on_from(state)

    def starts_epoch(self) -> None:
        """An epoch begins or is taken up; its hooks have not been called."""
        if self._state is not None and self._stage is not None and not self._stage.in_epoch:
            _lightning.take_up_epoch_end(self._trainer, self._stage, self._state)
            self._settle()

    def starts_batches(self) -> None:
        """The batches of an epoch begin or are taken up."""
        if self._state is not None:
            _lightning.take_up_batches(self._trainer, self._state, self._find_places)
            self._settle()

    def _settle(self) -> None:
        """Put back what the way here may have changed."""
        state = self._state
        assert state is not None
        module = self._trainer.lightning_module
        for follower, data in zip(self._followers, state["data"], strict=False):
            follower.settle(data)
        for name, metric in _metrics(module):
            if name in state["metrics"]:
                _set_metric_state(metric, state["metrics"][name])
        parameters = list(module.parameters())
        for index, gradient in state["gradients"].items():
            parameters[index].grad = gradient.to(parameters[index].device)
        set_random_state(state["random"], self._device)
        if len(self._followers) != len(state["data"]):
            say_not_exact([f"there were {len(state['data'])} loaders and are {len(self._followers)}"])
        self._state = None
        self._watches = True

    def before_batch(self) -> bool:
        """Return whether a batch is to be run; where only the end of one is to be taken up it is not.

        Raises:
            StopIteration: if this worker's data in the epoch had ended.
        """
        if self._watches and any(follower.drew_in_processes() for follower in self._followers):
            say_not_exact([_RANDOM_IN_PROCESSES])
            self._watches = False
        stage, self._stage = self._stage, None
        return stage is None or _lightning.take_up_batch(self._trainer, stage)

    def ends_epoch(self) -> None:
        """The batches of an epoch are over."""
        self._stage, self._watches, self.waits = None, False, True
        for follower in self._followers:
            follower.stop_watching()


def read_part(checkpoint: State, path: str, rank: int, setting: State, weights_only: bool | None) -> State | None:
    """Return a worker's part of a checkpoint, or None, and say why, if a run cannot go on exactly from it.

    Args:
        checkpoint: what is in its main file ``path``.
        path: of the main file.
        rank: the worker's.
        setting: of this run.
        weights_only: as in ``Trainer.fit``.

    Raises:
        FileNotFoundError: if the part is missing.
    """
    entry, parts = checkpoint.get(KEY, {}), Parts.of(checkpoint)
    if "clock" not in entry:
        why_not = "it was saved by another strategy"
    elif parts is None:
        why_not = 'no worker has kept its part of it, as they do in training with `checkpoint="exact"`'
    elif entry["workers"] != setting["workers"]:
        why_not = f"it was saved by {entry['workers']} workers, and these are {setting['workers']}"
    elif (was := entry.get("replica", "device")) != setting["replica"]:
        why_not = f"a {was} held each replica when it was saved, and now a {setting['replica']} does"
    else:
        return parts.read(rank, path, weights_only is not False)
    rank_zero_warn(f"All workers start a new round at the consensus in {path}: {why_not}.")
    return None


def all_go_on_from(part: State, checkpoint: State, path: str, setting: State, trainer: Trainer, header: Header) -> bool:
    """Return whether all workers can go on from their parts, and let rank 0 say in what that is not exact.

    Args:
        part: this worker's.
        checkpoint: what is in the main file ``path``.
        path: of the main file.
        setting: what must be as it was for the order of summation to be.
        trainer: whose fit goes on.
        header: how the workers hear of each other.
    """
    over = _lightning.limit_is_reached(trainer, part["fit"]["lightning"])
    overs, reasons = zip(*header.gather((over, part["fit"]["why_not"])), strict=True)
    if len(set(overs)) > 1:
        done = [rank for rank, over in enumerate(overs) if over]
        rank_zero_warn(
            f"All workers start a new round at the consensus in {path}: `max_steps` was reached by the ranks {done} "
            "and not by the others."
        )
        return False
    was = checkpoint[KEY]
    why_not = [why for of_rank in reasons for why in of_rank]
    why_not += [f"`{name}` was {was[name]!r} and is {now!r}" for name, now in setting.items() if was.get(name) != now]
    if why_not and header.rank == 0:
        say_not_exact(why_not)
    return True


def say_not_exact(why: Iterable[str]) -> None:
    """Say that a run does not go on bit for bit, and why."""
    warnings.warn(
        f"The run does not go on exactly as it would have without the stop: {'; '.join(dict.fromkeys(why))}.",
        stacklevel=2,
    )


def _gradients(module: nn.Module) -> dict[int, Tensor]:
    return {i: parameter.grad for i, parameter in enumerate(module.parameters()) if parameter.grad is not None}


def _metrics(module: nn.Module) -> Iterator[tuple[str, Metric]]:
    return ((name, child) for name, child in module.named_modules() if isinstance(child, Metric))


def _metric_state(metric: Metric) -> State:
    return {"updates": metric._update_count, "values": dict(metric.metric_state)}


def _set_metric_state(metric: Metric, state: State) -> None:
    metric._update_count, metric._computed = state["updates"], None
    for name, value in state["values"].items():
        old = getattr(metric, name)
        if isinstance(value, list):
            value = [item.to(metric.device) for item in value]
        elif isinstance(old, Tensor):
            value = value.to(old.device)
        setattr(metric, name, value)
