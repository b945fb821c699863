"""The stages of a fit: where one is when a checkpoint is saved, and how loops are taken up again from there."""

import math
import sys
from collections.abc import Callable
from copy import deepcopy
from enum import Enum
from typing import Any

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, IterableDataset

from lightning_localsgd._lightning.callbacks import is_a
from lightning_localsgd._lightning.loops import of

_COUNTS = ("ready", "started", "processed", "completed")


class Stage(Enum):
    """Where a fit is when a checkpoint is saved."""

    EPOCH_START = "epoch start"  # in the hooks of its start
    BETWEEN = "between batches"
    IN_BATCH = "in a batch"
    BATCH_END = "batch end"  # in the hooks of its end
    VALIDATION = "validation"  # before its end
    VALIDATION_END = "validation end"  # in the hooks of its end
    DATA_OVER = "data over"  # waiting for the other workers
    EPOCH_END = "epoch end"  # in the hooks of its end
    AFTER_EPOCH = "after an epoch"

    @property
    def in_epoch(self) -> bool:
        """Whether the data of an epoch is being used."""
        return self not in (Stage.EPOCH_START, Stage.EPOCH_END, Stage.AFTER_EPOCH)

    @property
    def why_not(self) -> str | None:
        """Why one cannot go on exactly from here, if one cannot."""
        if self in (Stage.EPOCH_START, Stage.IN_BATCH, Stage.VALIDATION):
            where = {
                Stage.EPOCH_START: "the hooks of an epoch's start",
                Stage.IN_BATCH: "a training step",
                Stage.VALIDATION: "validation",
            }[self]
            return f"the checkpoint was saved in the middle of {where}"
        return None


def stage(trainer: Trainer, waits: bool, validates: bool) -> Stage:
    """Return where the fit is.

    Args:
        trainer: whose fit it is.
        waits: whether this rank's data in the epoch has ended.
        validates: whether validation has begun and not ended.
    """
    loop: Any = trainer.fit_loop
    epochs, batches = loop.epoch_progress.current, loop.epoch_loop.batch_progress.current
    validation = loop.epoch_loop.val_loop
    if validates:
        ended = validation._data_fetcher is not None and validation._data_fetcher.done
        counts = validation.batch_progress.current
        if not (ended and counts.completed == counts.ready and not validation._logged_outputs):
            return Stage.VALIDATION
        return Stage.DATA_OVER if waits else Stage.VALIDATION_END
    if trainer.validating:  # it is about to begin
        return Stage.DATA_OVER if waits else Stage.BATCH_END
    if epochs.ready > epochs.started:
        return Stage.EPOCH_START
    if epochs.processed == epochs.started:
        return Stage.AFTER_EPOCH if epochs.completed == epochs.processed else Stage.EPOCH_END
    if waits:
        return Stage.DATA_OVER
    if batches.ready > batches.processed:
        return Stage.IN_BATCH
    return Stage.BETWEEN if batches.completed == batches.processed else Stage.BATCH_END


def own_state(trainer: Trainer, stage: Stage) -> dict[str, Any]:
    """Return what a checkpoint holds of this rank, whose loops will neither repeat nor leave out a part."""
    call = of(trainer, "trainer.call")
    state: dict[str, Any] = {
        "loops": deepcopy(trainer._checkpoint_connector._get_loops_state_dict()),
        "callbacks": call._call_callbacks_state_dict(trainer),
        "lr_schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
    }
    for owner in (trainer.precision_plugin, getattr(trainer, "datamodule", None)):
        if owner is not None and (of_owner := owner.state_dict()):
            state[type(owner).__qualname__] = of_owner
    fit = state["loops"]["fit_loop"]
    if stage is Stage.BATCH_END:
        for counts in (fit["epoch_loop.batch_progress"][which] for which in ("total", "current")):
            counts["completed"] = counts["processed"]
    if not stage.in_epoch and stage is not Stage.EPOCH_START:
        for counts in (fit["epoch_progress"][which] for which in ("total", "current")):
            counts["completed"] = counts["processed"]
        fit["state_dict"].pop("combined_loader", None)  # loaders begin the next epoch anew
    return state


def forgotten(trainer: Trainer, stage: Stage) -> list[str]:
    """Return why Lightning itself does not go on exactly from this stage."""
    why_not = []
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    if stage.in_epoch:
        metrics = trainer.fit_loop.epoch_loop._results.result_metrics
        sums = {metric.meta.name for metric in metrics if metric.meta.on_epoch}
        plateaus = [config.monitor for config in trainer.lr_scheduler_configs if config.reduce_on_plateau]
        stops = [callback.monitor for callback in callbacks if is_a(callback, "EarlyStopping")]
        why_not += [
            f"`{name}` of this epoch, which decides on the training, counts only the batches after the resume"
            for name in sorted(sums.intersection(plateaus + stops))
        ]
        if any(is_a(callback, "StochasticWeightAveraging") and callback._initialized for callback in callbacks):
            why_not.append("`StochasticWeightAveraging` takes up its learning rate at the start of an epoch only")
    elif trainer.limit_train_batches != 1.0 and not all(map(_begins_anew, loaders(trainer))):
        why_not.append("an epoch that is cut short leaves an iterable dataset where only the dataset knows")
    return why_not


def _begins_anew(loader: Any) -> bool:
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def limit_is_reached(trainer: Trainer, lightning: dict[str, Any]) -> bool:
    """Whether the loops of :func:`own_state` have no step left."""
    fit = lightning["loops"]["fit_loop"]
    automatic = fit["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]["completed"]
    manual = fit["epoch_loop.manual_optimization.optim_step_progress"]["total"]["completed"]
    return bool(0 <= trainer.max_steps <= max(automatic, manual))


def loaders(trainer: Trainer) -> list[Any]:
    """Return the training loaders."""
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else combined.flattened


def iterators(trainer: Trainer) -> list[Any]:
    """Return the iterator of each training loader, or None."""
    combined = trainer.fit_loop._combined_loader
    here = [] if combined is None or combined._iterator is None else combined._iterator.iterators
    return [*here, *[None] * (len(loaders(trainer)) - len(here))]


def accumulates(trainer: Trainer) -> bool:
    """Whether the gradients of the last batch are kept for the next one."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def is_last_batch(trainer: Trainer) -> bool:
    """Whether this worker's data of the epoch ends with the batch that is being trained on, as far as is known."""
    return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def steps_left(trainer: Trainer, ahead: int = 0) -> float:
    """Return how many steps the fit will take from here on, of which the optimizers take one each; or NaN.

    Args:
        trainer: whose fit it is.
        ahead: what :func:`steps_ahead` returned when the number of workers changed.
    """
    if trainer.lightning_module.automatic_optimization:
        try:
            total = trainer.estimated_stepping_batches
        except Exception:  # with `GradientAccumulationScheduler` Lightning refuses to say
            return math.nan
        done = trainer.global_step - (0 if total == trainer.max_steps else ahead)
    elif trainer.max_steps == -1 and (trainer.max_epochs or -1) > 0:  # `max_steps` counts each optimizer's
        total = trainer.num_training_batches * (trainer.max_epochs or 0)
        done = trainer.fit_loop.epoch_loop.total_batch_idx + 1 - ahead
    else:
        return math.nan
    return float(total - done) if math.isfinite(total) else math.nan


def steps_ahead(trainer: Trainer) -> int:
    """Return by how much the steps so far are more than they would be with as many workers from the start."""
    whole, here = trainer.num_training_batches, batches(trainer) if in_epoch(trainer) else 0
    if not math.isfinite(whole):
        return 0
    if not trainer.lightning_module.automatic_optimization:
        return int(trainer.fit_loop.epoch_loop.total_batch_idx + 1 - epoch(trainer) * whole - here)
    accumulate = trainer.accumulate_grad_batches
    return trainer.global_step - epoch(trainer) * math.ceil(whole / accumulate) - math.ceil(here / accumulate)


def fetched(trainer: Trainer) -> tuple[dict[str, Any], str | None]:
    """Return what the fetcher and the combination of loaders remember, and why it cannot be kept, if so."""
    loop = trainer.fit_loop
    fetcher, combined = loop._data_fetcher, loop._combined_loader
    state = {
        "ahead": list(getattr(fetcher, "batches", [])),
        "consumed": list(getattr(getattr(combined, "_iterator", None), "_consumed", [])),
        "reloaded": loop._last_train_dl_reload_epoch,
    }
    if fetcher is not None and not hasattr(fetcher, "batches"):
        return state, "`training_step(dataloader_iter)` fetches batches itself"
    return state, None


def set_sampler_epochs(trainer: Trainer, number: int | None = None) -> None:
    """Tell the samplers the epoch before an iterator is made; Lightning does after.

    Args:
        trainer: whose loaders they are of.
        number: of the epoch, if Lightning does not know it yet.
    """
    for loader in loaders(trainer):
        of(trainer, "loops.fit_loop")._set_sampler_epoch(loader, epoch(trainer) if number is None else number)


def take_up_epoch_end(trainer: Trainer, stage: Stage, state: dict[str, Any]) -> None:
    """Do what was left of an epoch's end when it was saved; what follows is an ordinary next epoch."""
    loop = trainer.fit_loop
    trainer._logger_connector._callback_metrics.update(state["logged"])
    loop._last_train_dl_reload_epoch = state["fetched"]["reloaded"]
    if stage is Stage.EPOCH_END and loop.epoch_loop._num_ready_batches_reached():
        loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
    if stage is not Stage.EPOCH_START:
        forget_resuming(trainer)


def take_up_batches(trainer: Trainer, state: dict[str, Any], find_places: Callable[[], None]) -> None:
    """Let the fetcher and the combination of loaders remember what they did.

    Args:
        trainer: whose fit it is.
        state: of the fit that goes on.
        find_places: makes the next iterators go on where they were.
    """
    loop: Any = trainer.fit_loop
    fetcher, combined = loop._data_fetcher, loop._combined_loader
    trainer._logger_connector._callback_metrics.update(state["logged"])
    loop._last_train_dl_reload_epoch = state["fetched"]["reloaded"]
    if state["fetched"]["ahead"]:  # put there in place of what has been fetched since
        combined._load_state_dicts(state["lightning"]["loops"]["fit_loop"]["state_dict"].get("combined_loader", []))
        find_places()
        ahead, fetcher.prefetch_batches = fetcher.prefetch_batches, 0
        iter(fetcher)
        fetcher.prefetch_batches, fetcher.batches = ahead, state["fetched"]["ahead"]
    if state["fetched"]["consumed"]:
        combined._iterator._consumed = state["fetched"]["consumed"]


def take_up_batch(trainer: Trainer, stage: Stage) -> bool:
    """Return whether a batch is next; make the loops do what was left of the last one if not.

    Raises:
        StopIteration: if there is none any more in this epoch.
    """
    if stage in (Stage.IN_BATCH, Stage.VALIDATION):
        return True  # as Lightning does it
    forget_resuming(trainer)
    if stage is Stage.DATA_OVER:
        raise StopIteration
    trainer.fit_loop.epoch_loop._skip_next_val = stage is Stage.VALIDATION_END
    return stage not in (Stage.BATCH_END, Stage.VALIDATION_END)


def forget_resuming(trainer: Trainer) -> None:
    """What follows is done as if there had been no stop."""
    loop = trainer.fit_loop
    for one in (loop, loop.epoch_loop, loop.epoch_loop.val_loop):
        one._restarting = one._loaded_from_state_dict = one._resuming_from_checkpoint = False


def epoch(trainer: Trainer) -> int:
    """Return the number of the epoch that Lightning is in, or will be."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    return int(progress.processed)


def in_epoch(trainer: Trainer) -> bool:
    """Whether the data of an epoch is being used."""
    return stage(trainer, waits=False, validates=False).in_epoch


def is_validated(trainer: Trainer) -> bool:
    """Whether a validation has ended, and only the hooks of its end are called."""
    return trainer.validating and stage(trainer, waits=False, validates=True) is Stage.VALIDATION_END


def batches(trainer: Trainer) -> int:
    """Return how many batches of this epoch there have been, with the one that is being trained on."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.current.ready)


def set_batches(trainer: Trainer, count: int) -> None:
    """Let Lightning count the batches of this epoch from there on."""
    _set_counts(trainer.fit_loop.epoch_loop.batch_progress.current, count)


def _set_counts(counts: Any, count: int) -> None:
    for name in _COUNTS:
        setattr(counts, name, count)


def put_between_batches(checkpoint: dict[str, Any], back: int, logged: int) -> None:
    """Change the loops in a checkpoint from wherever they were in the midst of an epoch to between two batches.

    Args:
        checkpoint: as it was loaded.
        back: so many batches earlier, which have left no trace.
        logged: the step by which loggers are to count.
    """
    fit = checkpoint["loops"]["fit_loop"]
    progress = fit["epoch_loop.batch_progress"]
    for which in ("total", "current"):
        progress[which] = dict.fromkeys(_COUNTS, progress[which]["ready"] - back)
    progress["is_last_batch"] = False
    fit["epoch_loop.state_dict"]["_batches_that_stepped"] = logged


def begins_next_epoch(trainer: Trainer, steps_schedulers: bool) -> bool:
    """Leave the epoch that is taken up, in which nothing is left to do, without its hooks; return whether one comes.

    Args:
        trainer: whose fit it is.
        steps_schedulers: whether the learning rates that step at the end of an epoch have not.
    """
    loop: Any = trainer.fit_loop
    if steps_schedulers:
        loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=False)
    loop.epoch_progress.increment_processed()
    loop.epoch_progress.increment_completed()
    forget_resuming(trainer)
    if hasattr(loop, "reset_restart_stage"):  # since lightning 2.5.1
        loop.reset_restart_stage()
    return not loop.done


def train_on(trainer: Trainer) -> None:
    """Let nothing end the fit that has begun but ``trainer.should_stop``."""
    trainer.fit_loop.max_epochs = sys.maxsize
    trainer.fit_loop.epoch_loop.max_steps = -1


def logged_step(trainer: Trainer) -> int:
    """Return the step under which Lightning's own loggers write now, as its callbacks look it up."""
    return int(getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step))
