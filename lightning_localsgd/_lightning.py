"""The few places where we must touch what Lightning keeps private.

A strategy has no hook at the end of an epoch, before validation, or at the end of the fit before the callbacks; and
Lightning sends a broadcast before every batch. So methods of one trainer's loops are wrapped while it fits: never a
class, always undone. Without one of them a Lightning is refused, or what is lost is warned about; and
`tests/test_lightning.py` fails when one is no longer called.
"""

import signal
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from types import FrameType
from typing import Any, Protocol

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

SIGTERM, REQUEUE = 1, 2  # bits of `Message.signals`


class Fit(Protocol):
    """What the strategy does at the places that it has no hook for."""

    def starts_epoch(self) -> bool:
        """Before an epoch; return whether it is to be run."""

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
        epoch(data_fetcher)
        fit.ends_epoch()

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

    def on_sigterm(signum: int, _: FrameType | None) -> None:
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signum)
        fit.receives(SIGTERM)

    def on_requeue(_: int, __: FrameType | None) -> None:
        fit.receives(REQUEUE)

    advance_start = wrap(loop, "on_advance_start", on_advance_start, "start each epoch together")
    epoch = wrap(epoch_loop, "run", run_epoch, "answer each other when the data of one has ended")
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


def act_on(trainer: Trainer, signals: int) -> None:
    """Do what Lightning's signal handlers do, outside of a handler and on all ranks at once."""
    connector = trainer._signal_connector
    if signals & REQUEUE:
        type(connector)._slurm_sigusr_handler_fn(connector, signal.SIGUSR1, None)  # type: ignore[arg-type]
    if signals & SIGTERM:
        connector.received_sigterm = True
        raise import_module(f"{_package(trainer)}.utilities.exceptions").SIGTERMException


def _package(trainer: Trainer) -> str:
    """Return which package the trainer is of, ``lightning.pytorch`` or ``pytorch_lightning``."""
    return type(trainer.state).__module__.removesuffix(".trainer.states")
