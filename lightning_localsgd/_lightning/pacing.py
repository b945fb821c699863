"""The paces: what Lightning counts by a worker's own steps follows the fastest worker's, in step at each round's end.

While workers take unequal numbers of steps, `global_step`, the schedulers that step with each batch, validation within
an epoch and checkpoints by steps would part; so they are led by the common clock.
"""

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Trainer

from lightning_localsgd._lightning.callbacks import _wrap, is_a
from lightning_localsgd._lightning.loops import of, validate_now
from lightning_localsgd._lightning.stages import loaders
from lightning_localsgd.pace import Dealt, Pace
from lightning_localsgd.worker import Worker


def require_one_loader(trainer: Trainer) -> None:
    """See that there is one training loader.

    Raises:
        ValueError: if there are more.
    """
    found = loaders(trainer)
    if len(found) != 1:
        raise ValueError(f"`pace` must be 'equal' with more than one training loader, got {len(found)}.")


class Pacing:
    """Leads the loops of one trainer by the clock.

    Args:
        trainer: whose fit it is.
        pace: this worker's.
        worker: the same.
        undo: takes what puts the callbacks back.

    Raises:
        ValueError: if something in the trainer or the module follows each worker's own steps.
    """

    def __init__(self, trainer: Trainer, pace: Pace, worker: Worker, undo: ExitStack) -> None:
        self._trainer, self._pace, self._worker = trainer, pace, worker
        self._loop: Any = trainer.fit_loop
        self._before: int | None = None  # what Lightning's count of steps is ahead of our clock
        self._scheduled = worker.clock.step  # up to which step Lightning's counts have been led
        self._looked = 0  # how many batches of this epoch had been when validation was considered last
        self._validated = -1  # where it was due last
        self._is_first = True  # no epoch has begun in this fit
        self._undo = undo
        self._seen: dict[int, int] = {}  # by callback: where the round began at whose end it was asked last
        self._savers: list[Callable[..., None]] = []  # checkpoint callbacks, at the ends of rounds
        self._require_led()
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if is_a(callback, "ModelCheckpoint"):
                self._lead_checkpoint(callback)

    def _require_led(self) -> None:
        trainer: Any = self._trainer
        if not trainer.lightning_module.automatic_optimization:
            raise ValueError(
                "`pace` must be 'equal' with manual optimization, where only the module steps its learning rates."
            )
        if getattr(trainer, "_val_check_time_interval", None) is not None:
            raise ValueError(
                "`val_check_interval` must be a number of batches where `pace` is not 'equal', got a time."
            )
        for config in trainer.lr_scheduler_configs:
            if config.interval == "step" and (config.frequency != 1 or config.reduce_on_plateau):
                raise ValueError(
                    "A learning-rate scheduler with the interval 'step' must have the frequency 1 and not look for a "
                    f"plateau where `pace` is not 'equal', got {type(config.scheduler).__name__} with the frequency "
                    f"{config.frequency}."
                )

    # -------------------------------------------------------------------------------------------------------- an epoch

    def starts_epoch(self, step: int, goes_on: bool, taken_up: bool) -> None:
        """An epoch begins, before its iterator is made.

        Args:
            step: of the fastest worker.
            goes_on: whether it goes on exactly where this worker was in it.
            taken_up: whether its beginning is exactly as it would have been without a stop.
        """
        first, self._is_first = self._is_first, False
        if goes_on:
            return
        offset, progress = 0, self._loop.epoch_loop.batch_progress
        if first and not taken_up and self._loop.epoch_loop.restarting and not progress.is_last_batch:
            offset = progress.current.ready if self._pace.resumed is None else self._pace.resumed
            self._level_batches(offset)
        if not first or taken_up:
            clock = self._worker.clock
            self._pace.share_out(clock.averages_models, clock.length)
            self._count_batches()
        self._pace.begin_epoch(step, offset)
        self._looked, self._validated = offset, -1

    def _level_batches(self, count: int) -> None:
        """Let Lightning's count of the batches of this epoch be the fastest worker's."""
        progress = self._loop.epoch_loop.batch_progress
        more = count - progress.current.ready
        for counts in (progress.current, progress.total):
            for name in ("ready", "started", "processed", "completed"):
                setattr(counts, name, getattr(counts, name) + more)

    def _count_batches(self) -> None:
        """See that Lightning knows how many batches the fastest worker has in this epoch."""
        loop, trainer = self._loop, self._trainer
        combined = loop._combined_loader
        length, limit = len(combined.flattened[0]), trainer.limit_train_batches
        combined.limits = [min(length, limit) if isinstance(limit, int) else int(length * limit)]
        self._set_batches(combined.limits[0])

    def _set_batches(self, count: int) -> None:
        loop, trainer = self._loop, self._trainer
        loop.max_batches = count
        if isinstance(trainer.val_check_interval, float):
            trainer.val_check_batch = max(1, int(loop.max_batches * trainer.val_check_interval))

    def starts_batches(self) -> None:
        """Its batches begin or go on, after the hooks of its start."""
        trainer, loop = self._trainer, self._loop
        if self._before is None:
            self._before = trainer.global_step - self._scheduled
        sampler = loaders(trainer)[0].sampler
        assert isinstance(sampler, Dealt)
        batches = sampler.batches()
        if not self._worker.clock.averages_models:  # all must have the same number; the sampler does not pad
            batches = [min(batches)] * len(batches)
            self._set_batches(min(int(loop.max_batches), batches[0]))
        last_step = trainer.max_steps - self._before if trainer.max_steps >= 0 else float("inf")
        self._length = self._pace.begin_batches(
            batches, int(loop.max_batches), trainer.accumulate_grad_batches, last_step
        )

    def before_batch(self) -> None:
        """Before a batch: sit out the rounds in which this worker has no step.

        Raises:
            StopIteration: if the epoch has ended meanwhile.
        """
        self._loop._data_fetcher.length = self._length  # of this worker; its loader's is that of the fastest
        worker = self._worker
        if worker.clock.averages_models and self.checks_validation():  # it was, when a checkpoint was saved
            validate_now(self._trainer)
        while worker.clock.averages_models and worker.is_idle():
            decision = worker.end_round()
            self.follow()
            for saver in self._savers:  # as the others do at the end of their batch
                saver(self._trainer, self._trainer.lightning_module, None, None, self._loop.epoch_loop.batch_idx)
            if self._validation_is_due(worker.clock.step):
                validate_now(self._trainer)
            if self._loop.epoch_loop.done:
                raise StopIteration
            if not any(decision.weights):  # the others' data have ended before they should
                return

    def ends_epoch(self, step: int) -> None:
        """All workers' data have ended, at this step of the fastest one."""
        self._pace.furthest = step
        self.follow(step)  # also in the midst of a round: what comes now is done by all workers alike
        if self._validation_is_due(step):
            self._worker.validation_is_due = True
        self._level_batches(max(self._pace.position(step), self._current.ready))

    @property
    def _current(self) -> Any:
        return self._loop.epoch_loop.batch_progress.current

    # ------------------------------------------------------------------------------------------------------ after steps

    def follow(self, step: int = 0) -> None:
        """Put Lightning's count of steps, and the learning rates that step with it, level with the clock.

        Args:
            step: where they are to be at least.
        """
        trainer, step = self._trainer, max(step, self._worker.clock.step, self._scheduled)
        if self._before is not None:  # else nothing has been trained
            counts = self._loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
            counts.ready = counts.completed = self._before + step
        call = of(trainer, "trainer.call")
        with warnings.catch_warnings():  # a worker that has had no step yet follows the learning rate too
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step\\(\\)` before")
            for _ in range(step - self._scheduled):
                for config in trainer.lr_scheduler_configs:
                    if config.interval == "step":
                        call._call_lightning_module_hook(trainer, "lr_scheduler_step", config.scheduler, None)
        self._scheduled = step

    def steps_schedulers(self, step: Callable[[], None], interval: str, plateau: bool) -> None:
        """In place of Lightning's step of the learning rates, which ``step`` is."""
        if interval == "step":
            if not plateau:
                self.follow()
        else:
            step()

    def checks_validation(self) -> bool:
        """In place of Lightning's question after a batch whether to validate: only where a round has ended."""
        clock = self._worker.clock
        return clock.taken == 0 and self._validation_is_due(clock.step)

    def _validation_is_due(self, step: int) -> bool:
        trainer: Any = self._trainer
        if not self._loop.epoch_loop._should_check_val_epoch():
            return False
        before, now = self._looked, self._pace.position(step)
        self._looked = max(now, before)
        if trainer.should_stop and self._loop._can_stop_early:
            due = now != self._validated
            self._validated = now
            return due
        every, earlier = trainer.val_check_batch, 0
        if trainer.check_val_every_n_epoch is None:
            earlier = self._loop.epoch_loop.batch_progress.total.ready - self._current.ready
        due = bool((earlier + now) // every > (earlier + before) // every)
        self._validated = now if due else self._validated
        return due

    def _lead_checkpoint(self, callback: Any) -> None:
        """Let a `ModelCheckpoint` save by steps at the ends of rounds only: at the first that reaches its step."""
        self._seen[id(callback)] = self._worker.clock.start

        def on_train_batch_end(trainer: Any, *args: Any) -> None:
            clock, every, seen = self._worker.clock, callback._every_n_train_steps, self._seen[id(callback)]
            if clock.taken or clock.start == seen or self._before is None:
                return
            if callback not in trainer.callbacks:  # the tuner takes all out for a while
                return
            now, before, self._seen[id(callback)] = self._before + clock.start, self._before + seen, clock.start
            by_steps = every > 0
            if by_steps and now // every == before // every:
                return
            callback._every_n_train_steps = 1 if by_steps else every
            try:
                end(trainer, *args)
            finally:
                callback._every_n_train_steps = every

        end = _wrap(self._undo, callback, "on_train_batch_end", on_train_batch_end)
        self._savers.append(on_train_batch_end)

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def state(self) -> list[int]:
        """Return where this worker alone is, for an exact resume."""
        before = self._trainer.global_step - self._scheduled if self._before is None else self._before
        return [self._pace.own_state(), before, self._scheduled, self._looked]

    def load_state(self, state: list[int]) -> None:
        """Go on from there."""
        taken, self._before, self._scheduled, self._looked = state
        self._pace.load_own_state(taken)

    def restart(self) -> None:
        """Begin anew where the clock and Lightning's counts are now."""
        self._before, self._scheduled, self._is_first = None, self._worker.clock.step, True
        self._seen = dict.fromkeys(self._seen, self._worker.clock.start)
        self._pace.furthest = 0
