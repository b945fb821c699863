"""The loops: methods of one trainer's are wrapped while it fits, for hooks that a strategy has not."""

import atexit
import os
import signal
import subprocess
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from types import FrameType
from typing import Any, Protocol

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_localsgd.signals import REQUEUE, SIGTERM

_GRACE = 5.0  # seconds for the processes of a launcher to say why they end; as long as Lightning gives them


class Hooks(Protocol):
    """What the strategy does at the places that it has no hook for."""

    def starts_epoch(self) -> bool:
        """Before an epoch; return whether it is to be run."""

    def has_loaders(self) -> None:
        """When the training loaders are known and their iterators not made yet."""

    def finds_its_place(self) -> bool:
        """Whether the loaders go on where they were when the checkpoint that is resumed was saved."""

    def starts_batches(self) -> None:
        """Before the first batch of an epoch, or the first after a resume, and after the hooks of its start."""

    def before_batch(self) -> bool:
        """Before a batch is fetched; return whether one is to be run."""

    def after_batch(self) -> None:
        """After a batch and its hooks, before any validation."""

    def ends_untrained(self) -> None:
        """Where there is nothing to train: neither epochs nor hooks will follow."""

    def ends_epoch(self) -> None:
        """After the last batch of an epoch, however it was left, and before any hook."""

    def validates(self, run: Callable[[], Any]) -> Any:
        """In place of the validation loop, which ``run`` is."""

    def checks_validation(self, check: Callable[[], bool]) -> bool:
        """In place of the question after a batch whether to validate, which ``check`` is."""

    def steps_schedulers(self, step: Callable[[], None], interval: str, plateau: bool) -> None:
        """In place of a step of the learning rates after a batch or an epoch, which ``step`` is."""

    def ends_fit(self) -> None:
        """After the last epoch and before any hook."""

    def has_data_somewhere(self, here: bool) -> bool:
        """Whether any rank has a batch."""

    def receives(self, signals: int) -> None:
        """In a signal handler: take note."""


def attach(trainer: Trainer, hooks: Hooks) -> ExitStack:
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
        if not hooks.starts_epoch():
            raise StopIteration  # as if the loop had been left here
        advance_start()

    def run_epoch(data_fetcher: Any) -> None:
        hooks.starts_batches()
        epoch(data_fetcher)
        hooks.ends_epoch()

    def reset_epoch() -> None:
        with warnings.catch_warnings():
            if hooks.finds_its_place():  # which Lightning does not know
                warnings.filterwarnings(
                    "ignore", message="You're resuming from a checkpoint that ended before the epoch"
                )
            reset()

    def run_batch(data_fetcher: Any) -> None:
        if hooks.before_batch():
            batch(data_fetcher)
            hooks.after_batch()

    def load_loaders() -> None:
        hooks.has_loaders()
        load_loader_states()

    def run_validation() -> Any:
        return hooks.validates(validation)

    def should_check_validation(data_fetcher: Any) -> bool:
        return hooks.checks_validation(lambda: check(data_fetcher))

    def update_lr_schedulers(interval: str, update_plateau_schedulers: bool) -> None:
        hooks.steps_schedulers(
            lambda: schedulers(interval, update_plateau_schedulers), interval, update_plateau_schedulers
        )

    def on_run_end() -> None:
        hooks.ends_fit()
        run_end()

    def setup_data() -> None:
        before = loop._combined_loader
        data()
        owners = (trainer.lightning_module, getattr(trainer, "datamodule", None))
        lenient = any(getattr(owner, "allow_zero_length_dataloader_with_multiple_devices", False) for owner in owners)
        if lenient and loop._combined_loader is not before:
            here = loop.max_batches > 0
            if hooks.has_data_somewhere(here) and not here:
                loop.max_batches = float("inf")  # epochs without a batch, in step with the others, not no epochs
        if loop.skip:
            hooks.ends_untrained()

    def on_sigterm(signum: int, _: FrameType | None) -> None:
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signum)
        hooks.receives(SIGTERM)

    def on_requeue(_: int, __: FrameType | None) -> None:
        hooks.receives(REQUEUE)

    advance_start = wrap(loop, "on_advance_start", on_advance_start, "start each epoch together")
    epoch = wrap(epoch_loop, "run", run_epoch, "answer each other when the data of one has ended")
    reset = wrap(epoch_loop, "reset", reset_epoch, "leave out a warning that is wrong", needed=False)
    batch = wrap(epoch_loop, "advance", run_batch, "act on a signal together")
    load_loader_states = wrap(
        loop, "_load_combined_loader_states", load_loaders, "find their places in the data again", needed=False
    )
    validation = wrap(val_loop, "run", run_validation, "validate the mean of their models")
    check = wrap(epoch_loop, "_should_check_val_fx", should_check_validation, "validate at the end of a round")
    schedulers = wrap(epoch_loop, "update_lr_schedulers", update_lr_schedulers, "follow the same learning rate")
    run_end = wrap(loop, "on_run_end", on_run_end, "end the fit together")
    data = wrap(loop, "setup_data", setup_data, "wait for each other when one has no data at all", needed=False)
    wrap(signals, "_sigterm_notifier_fn", on_sigterm, "stop together on SIGTERM", needed=False)
    wrap(signals, "_slurm_sigusr_handler_fn", on_requeue, "requeue together on SLURM's signal", needed=False)
    if hasattr(epoch_loop, "_broadcast_sigterm_tensor"):  # since 2.5.2; its duty is the header's
        wrap(epoch_loop, "_broadcast_sigterm_tensor", lambda: None, "train without waiting for each other")
    return undo


def tell_of_loaders(trainer: Trainer, hooks: Hooks) -> None:
    """Say that the training loaders are known, where a hook before had them made."""
    if trainer.fit_loop._combined_loader is not None:
        hooks.has_loaders()
        iter(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]


def validate_now(trainer: Trainer) -> None:
    """Run the validation loop at the end of an epoch, as `_TrainingEpochLoop.on_advance_end` does."""
    trainer.validating = True
    trainer.lightning_module.on_validation_model_zero_grad()
    first = trainer._logger_connector._first_loop_iter
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
    trainer._logger_connector._first_loop_iter = first  # else the metrics of this epoch would begin anew


def act_on(trainer: Trainer, signals: int, is_saved: bool) -> None:
    """Do what Lightning's signal handlers do, outside of a handler and on all ranks at once.

    On SLURM SIGTERM does the same as SIGUSR1, unless the scheduler has ended the job: cancelled, or requeued by it. One
    that is to make place for another one is not, and would be over if it ended without being requeued.

    Args:
        trainer: whose fit it is.
        signals: the bits of those that have come.
        is_saved: whether there is a checkpoint to go on from, because of an earlier one.
    """
    connector: Any = trainer._signal_connector
    if signals & REQUEUE or (signals & SIGTERM and not is_saved and _requeues(trainer)):
        if signals & REQUEUE or (trainer.is_global_zero and _job_runs()):
            type(connector)._slurm_sigusr_handler_fn(connector, signal.SIGUSR1, None)
        else:  # it saves in the same way, and rank 0 alone requeues
            trainer.save_checkpoint(trainer._checkpoint_connector.hpc_save_path(trainer.default_root_dir))
    if signals & SIGTERM:
        connector.received_sigterm = True
        # Not 0, which would say that the training is done: what a shell says of a process that SIGTERM has ended.
        raise of(trainer, "utilities.exceptions").SIGTERMException(128 + signal.SIGTERM)


def _job_runs() -> bool:
    """Whether SLURM says that this job runs, neither cancelled nor ended nor requeued."""
    command = ["scontrol", "--oneliner", "show", "job", os.environ.get("SLURM_JOB_ID", "")]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return False
    return "JobState=RUNNING" in told


def _requeues(trainer: Trainer) -> bool:
    """Whether this is a job of SLURM that goes on from the checkpoint of a signal by itself."""
    environment = trainer._accelerator_connector.cluster_environment
    return bool(getattr(environment, "auto_requeue", False))


def of(trainer: Trainer, module: str) -> Any:
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


def after_saves(io: CheckpointIO, act: Callable[[], object]) -> None:
    """Act after the saves that are under way, if ``io`` saves in the background."""
    executor = getattr(io, "_executor", None)
    if executor is None:
        act()
    else:
        executor.submit(act)


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
