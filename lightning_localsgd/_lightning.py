"""The few places where we must touch what Lightning keeps private.

A strategy has no hook at the end of an epoch, before validation, or at the end of the fit before the callbacks; and
Lightning sends a broadcast before every batch. So methods of one trainer's loops are wrapped while it fits: never a
class, always undone. Each is checked to be there, and `tests/test_lightning.py` fails when one is no longer called.
"""

import atexit
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType
from typing import Any, Protocol

from lightning.pytorch import Trainer
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.exceptions import SIGTERMException

SIGTERM, REQUEUE = 1, 2  # bits of `Message.signals`
_GRACE = 5.0  # seconds for the processes of a launcher to say why they end; as long as Lightning gives them


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
    """Wrap the loops of ``trainer``; closing the result undoes it."""
    undo = ExitStack()

    def wrap(owner: object, name: str, wrapper: Callable[..., Any]) -> Callable[..., Any]:
        original: Callable[..., Any] = getattr(owner, name)  # AttributeError: not a Lightning that we know
        setattr(owner, name, wrapper)
        undo.callback(delattr, owner, name)
        return original

    loop = trainer.fit_loop
    epoch_loop, val_loop, signals = loop.epoch_loop, loop.epoch_loop.val_loop, trainer._signal_connector

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

    advance_start = wrap(loop, "on_advance_start", on_advance_start)
    epoch = wrap(epoch_loop, "run", run_epoch)
    validation = wrap(val_loop, "run", run_validation)
    run_end = wrap(loop, "on_run_end", on_run_end)
    data = wrap(loop, "setup_data", setup_data)
    wrap(signals, "_sigterm_notifier_fn", on_sigterm)
    wrap(signals, "_slurm_sigusr_handler_fn", on_requeue)
    if hasattr(epoch_loop, "_broadcast_sigterm_tensor"):  # since 2.5.2; its duty is the header's
        wrap(epoch_loop, "_broadcast_sigterm_tensor", lambda: None)
    return undo


def validate_now(trainer: Trainer) -> None:
    """Run the validation loop as `_TrainingEpochLoop.on_advance_end` does."""
    loop = trainer.fit_loop.epoch_loop
    trainer.validating = True
    first_loop_iter = trainer._logger_connector._first_loop_iter
    call._call_lightning_module_hook(trainer, "on_validation_model_zero_grad")
    loop.val_loop.run()
    trainer.training = True
    trainer._logger_connector._first_loop_iter = first_loop_iter


def act_on(trainer: Trainer, signals: int) -> None:
    """Do what Lightning's signal handlers do, outside of a handler and on all ranks at once."""
    connector = trainer._signal_connector
    if signals & REQUEUE:
        type(connector)._slurm_sigusr_handler_fn(connector, signal.SIGUSR1, None)  # type: ignore[arg-type]
    if signals & SIGTERM:
        connector.received_sigterm = True
        raise SIGTERMException


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
