"""The few places where we must touch what Lightning keeps private.

A strategy has no hook at the end of an epoch, before validation, or at the end of the fit before the callbacks; and
Lightning sends a broadcast before every batch. So methods of one trainer's loops are wrapped while it fits: never a
class, always undone. Without one of them a Lightning is refused, or what is lost is warned about; and
`tests/test_lightning.py` fails when one is no longer called.
"""

import atexit
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from enum import Enum
from importlib import import_module
from types import FrameType
from typing import Any, Protocol

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

SIGTERM, REQUEUE = 1, 2  # bits of `Message.signals`
_GRACE = 5.0  # seconds for the processes of a launcher to say why they end; as long as Lightning gives them


class Fit(Protocol):
    """What the strategy does at the places that it has no hook for."""

    def starts_epoch(self) -> bool:
        """Before an epoch; return whether it is to be run."""

    def has_loaders(self) -> None:
        """When the training loaders are known and their iterators not made yet."""

    def starts_batches(self) -> None:
        """Before the first batch of an epoch, or the first after a resume, and after the hooks of its start."""

    def before_batch(self) -> bool:
        """Before a batch is fetched; return whether one is to be run."""

    def ends_untrained(self) -> None:
        """Where there is nothing to train: neither epochs nor hooks will follow."""

    def ends_epoch(self) -> None:
        """After the last batch of an epoch, however it was left, and before any hook."""

    def validates(self, run: Callable[[], Any]) -> Any:
        """In place of the validation loop, which ``run`` is."""

    def ends_fit(self) -> None:
        """After the last epoch and before any hook."""

    def has_data_somewhere(self, here: bool) -> bool:
        """Whether any rank has a batch."""

    def receives(self, signals: int) -> None:
        """In a signal handler: take note."""


def attach(trainer: Trainer, fit: Fit) -> ExitStack:
    """Wrap the loops of ``trainer``; closing the result undoes it.

    Raises:
        RuntimeError: if this Lightning lacks a method without which a worker could train something else than the
            others, or wait for them in vain.
    """
    undo = ExitStack()

    def wrap(owner: object, name: str, wrapper: Callable[..., Any], to: str, needed: bool = True) -> Any:
        original = getattr(owner, name, None)
        if original is not None:
            setattr(owner, name, wrapper)
            undo.callback(delattr, owner, name)
            return original
        package = import_module(_package(trainer))
        missing = f"{package.__name__} {package.__version__} has no `{name}`"
        if needed:
            undo.close()
            raise RuntimeError(f"{missing}, which the workers need to {to}: install a version that has it, as 2.6.6.")
        rank_zero_warn(f"{missing}: the workers will not {to}.")
        return None

    loop = trainer.fit_loop
    epoch_loop = getattr(loop, "epoch_loop", None)
    val_loop = getattr(epoch_loop, "val_loop", None)
    signals = getattr(trainer, "_signal_connector", None)

    def on_advance_start() -> None:
        if not fit.starts_epoch():
            raise StopIteration  # as if the loop had been left here
        advance_start()

    def run_epoch(data_fetcher: Any) -> None:
        fit.starts_batches()
        epoch(data_fetcher)
        fit.ends_epoch()

    def run_batch(data_fetcher: Any) -> None:
        if fit.before_batch():
            batch(data_fetcher)

    def load_loaders() -> None:
        fit.has_loaders()
        load_loader_states()

    def run_validation() -> Any:
        return fit.validates(validation)

    def on_run_end() -> None:
        fit.ends_fit()
        run_end()

    def setup_data() -> None:
        before = loop._combined_loader
        data()
        owners = (trainer.lightning_module, getattr(trainer, "datamodule", None))
        lenient = any(getattr(owner, "allow_zero_length_dataloader_with_multiple_devices", False) for owner in owners)
        if lenient and loop._combined_loader is not before:
            here = loop.max_batches > 0
            if fit.has_data_somewhere(here) and not here:
                loop.max_batches = float("inf")  # epochs without a batch, in step with the others, not no epochs
        if before is None and loop.skip:
            fit.ends_untrained()

    def on_sigterm(signum: int, _: FrameType | None) -> None:
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signum)
        fit.receives(SIGTERM)

    def on_requeue(_: int, __: FrameType | None) -> None:
        fit.receives(REQUEUE)

    advance_start = wrap(loop, "on_advance_start", on_advance_start, "start each epoch together")
    epoch = wrap(epoch_loop, "run", run_epoch, "answer each other when the data of one has ended")
    batch = wrap(epoch_loop, "advance", run_batch, "act on a signal together")
    load_loader_states = wrap(
        loop, "_load_combined_loader_states", load_loaders, "find their places in the data again", needed=False
    )
    validation = wrap(val_loop, "run", run_validation, "validate the mean of their models")
    run_end = wrap(loop, "on_run_end", on_run_end, "end the fit together")
    data = wrap(loop, "setup_data", setup_data, "wait for each other when one has no data at all", needed=False)
    wrap(signals, "_sigterm_notifier_fn", on_sigterm, "stop together on SIGTERM", needed=False)
    wrap(signals, "_slurm_sigusr_handler_fn", on_requeue, "requeue together on SLURM's signal", needed=False)
    if hasattr(epoch_loop, "_broadcast_sigterm_tensor"):  # since 2.5.2; its duty is the header's
        wrap(epoch_loop, "_broadcast_sigterm_tensor", lambda: None, "train without waiting for each other")
    return undo


def validate_now(trainer: Trainer) -> None:
    """Run the validation loop at the end of an epoch, as `_TrainingEpochLoop.on_advance_end` does."""
    trainer.validating = True
    trainer.lightning_module.on_validation_model_zero_grad()
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True


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


def stage(trainer: Trainer, waits: bool) -> Stage:
    """Return where the fit is; ``waits`` says that this rank's data in the epoch has ended."""
    loop: Any = trainer.fit_loop
    epochs, batches = loop.epoch_progress.current, loop.epoch_loop.batch_progress.current
    validation = loop.epoch_loop.val_loop
    if trainer.validating:
        ended = validation._data_fetcher is not None and validation._data_fetcher.done
        counts = validation.batch_progress.current
        if not (ended and counts.completed == counts.ready):
            return Stage.VALIDATION
        return Stage.DATA_OVER if waits else Stage.VALIDATION_END
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
    call = _of(trainer, "trainer.call")
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


def set_sampler_epochs(trainer: Trainer) -> None:
    """Tell the samplers the epoch before an iterator is made; Lightning does after."""
    loop: Any = trainer.fit_loop
    for loader in loaders(trainer):
        _of(trainer, "loops.fit_loop")._set_sampler_epoch(loader, loop.epoch_progress.current.processed)


def take_up_epoch_end(trainer: Trainer, stage: Stage, state: dict[str, Any]) -> None:
    """Do what was left of an epoch's end when it was saved; what follows is an ordinary next epoch."""
    loop = trainer.fit_loop
    trainer._logger_connector._callback_metrics.update(state["logged"])
    loop._last_train_dl_reload_epoch = state["fetched"]["reloaded"]
    if stage is Stage.EPOCH_END and loop.epoch_loop._num_ready_batches_reached():
        loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
    if stage is not Stage.EPOCH_START:
        _forget_resuming(trainer)


def take_up_batches(trainer: Trainer, state: dict[str, Any]) -> None:
    """Let the fetcher and the combination of loaders remember what they did."""
    loop: Any = trainer.fit_loop
    fetcher, combined = loop._data_fetcher, loop._combined_loader
    trainer._logger_connector._callback_metrics.update(state["logged"])
    loop._last_train_dl_reload_epoch = state["fetched"]["reloaded"]
    if state["fetched"]["ahead"]:  # put there in place of what has been fetched since
        combined._load_state_dicts(state["lightning"]["loops"]["fit_loop"]["state_dict"].get("combined_loader", []))
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
    _forget_resuming(trainer)
    if stage is Stage.DATA_OVER:
        raise StopIteration
    trainer.fit_loop.epoch_loop._skip_next_val = stage is Stage.VALIDATION_END
    return stage not in (Stage.BATCH_END, Stage.VALIDATION_END)


def _forget_resuming(trainer: Trainer) -> None:
    """What follows is done as if there had been no stop."""
    loop = trainer.fit_loop
    for one in (loop, loop.epoch_loop, loop.epoch_loop.val_loop):
        one._restarting = one._loaded_from_state_dict = one._resuming_from_checkpoint = False


def act_on(trainer: Trainer, signals: int) -> None:
    """Do what Lightning's signal handlers do, outside of a handler and on all ranks at once."""
    connector = trainer._signal_connector
    if signals & REQUEUE:
        type(connector)._slurm_sigusr_handler_fn(connector, signal.SIGUSR1, None)  # type: ignore[arg-type]
    if signals & SIGTERM:
        connector.received_sigterm = True
        raise _of(trainer, "utilities.exceptions").SIGTERMException


def _of(trainer: Trainer, module: str) -> Any:
    """Return a module of the package that the trainer is of: ``lightning.pytorch`` or ``pytorch_lightning``."""
    return import_module(f"{_package(trainer)}.{module}")


def _package(trainer: Trainer) -> str:
    return type(trainer.state).__module__.removesuffix(".trainer.states")


def with_default_io(io: CheckpointIO | None, default: CheckpointIO) -> CheckpointIO:
    """Return ``io``, or ``default`` where there is none; one that wraps another gets ``default`` if it has none yet."""
    if io is None:
        return default
    if hasattr(io, "checkpoint_io"):
        io.checkpoint_io = default  # ignored where there is one
    return io


def end_with(launcher: Any) -> None:
    """See that the processes which ``launcher`` has started do not outlive this one by more than a few seconds."""
    if getattr(launcher, "procs", []):
        atexit.unregister(_end)
        atexit.register(_end, launcher)


def _end(launcher: Any) -> None:
    deadline = time.monotonic() + _GRACE
    while any(map(_runs, launcher.procs)) and time.monotonic() < deadline:
        time.sleep(0.05)
    if any(map(_runs, launcher.procs)):
        launcher.kill(signal.SIGKILL)


def _runs(process: Any) -> bool:
    return process.poll() is None if isinstance(process, subprocess.Popen) else process.is_alive()
