"""WHERE Lightning asks for what is kept: the strategy's hooks for checkpoints, which say the same on all ranks."""

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from typing import Any, Literal

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_localsgd import _lightning
from lightning_localsgd.checkpoint import (
    KEY,
    AtomicCheckpointIO,
    Keeper,
    Remove,
    Save,
    one_workers_path,
    refuse_one_worker,
)
from lightning_localsgd.clock import Clock
from lightning_localsgd.fingerprint import MODEL, compare, describe, words
from lightning_localsgd.header import Want
from lightning_localsgd.mean import Mean
from lightning_localsgd.moments import load_as_it_was, mean_state
from lightning_localsgd.outer import OuterStep
from lightning_localsgd.pace import Proportional
from lightning_localsgd.rest import Rest
from lightning_localsgd.resume import Fit, all_go_on_from, read_part
from lightning_localsgd.schedule import Schedule
from lightning_localsgd.states import OptimizerState
from lightning_localsgd.talking import Talks
from lightning_localsgd.worker import Worker


class Keeps(Talks):
    """The part of the strategy that saves, removes and loads checkpoints."""

    schedule: Schedule
    mean: Mean
    outer: OuterStep | None
    _state_rule: OptimizerState
    _replica_rule: Literal["device", "node"]
    _pace_rule: Proportional | None
    _exact: bool
    _keeper: Keeper
    _last: Worker | None  # of the last fit, for a checkpoint that is saved after it
    _rest: Rest | None  # follows what is had of its data
    _fit: Fit | None  # follows the fit in progress, where checkpoints are exact
    _pacing: "_lightning.Pacing | None"
    _resumed: dict[str, Any]  # our entry in the checkpoint that a fit goes on from
    _part: dict[str, Any] | None  # this worker's part of it, if it goes on exactly

    def _restart(self) -> None:
        raise NotImplementedError

    @property
    def rest(self) -> Rest:
        """What this worker has had of an epoch's data, during ``fit``."""
        assert self._rest is not None
        return self._rest

    def lightning_module_state_dict(self) -> dict[str, Any]:
        with self.worker.consensus() if self._communicates else nullcontext():
            state = super().lightning_module_state_dict()
            # Written only after the module has its own weights again.
            return deepcopy(state) if self._worker is not None and self._worker.holds_other_weights else state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state: dict[str, Any] = super().optimizer_state(optimizer)
        if self._communicates:
            return self.worker.mean_state(optimizer, state)
        if self._worker is None and self._last and self._last.clock.averages_models and not self._is_apart:
            return mean_state(  # after a fit
                state, self.mean, self._talk(), self._last.links, reader=0, device=self.root_device
            )
        return state

    @property
    def checkpoint_io(self) -> CheckpointIO:
        self._checkpoint_io = _lightning.with_default_io(self._checkpoint_io, AtomicCheckpointIO())
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        worker = self._worker or self._last
        if worker is not None:
            checkpoint[KEY] = self._setting()
        if self._communicates:
            exact = self._exact and "optimizer_states" in checkpoint  # else only weights are saved
            with self.worker.measured.pause():
                common = partial(self.worker.common_state, whole=exact)
                self._handle_files(Save(str(filepath), checkpoint, storage_options, exact, common))
            return
        if worker is not None:
            checkpoint[KEY] |= worker.common_state(whole=False)
        if self._is_apart:
            checkpoint[KEY] = checkpoint.get(KEY, {}) | {"one_worker": self.global_rank}
            path = one_workers_path(str(filepath), self.global_rank)
            self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options=storage_options)
        else:
            if self._exact and self._worker is None and "optimizer_states" in checkpoint:
                rank_zero_warn(
                    f"Outside of training no worker keeps its part of a checkpoint: a run that resumes from {filepath} "
                    "starts a new round at the consensus."
                )
            super().save_checkpoint(checkpoint, filepath, storage_options)

    def remove_checkpoint(self, filepath: Any) -> None:
        if self._communicates:
            self._handle_files(Remove(str(filepath)))
        elif not self._is_apart:  # there it is the last good one
            super().remove_checkpoint(filepath)

    @property
    def _is_apart(self) -> bool:
        """Whether an exception has left this rank with a replica that is not the other workers'."""
        return self._trainer.interrupted and self.world_size > 1

    def _handle_files(self, wish: Save | Remove) -> None:
        source = self.worker.ask(Want.FILES, detail=int(isinstance(wish, Remove))).askers[0]  # rank 0, if it is here
        self._keeper.serve(source, wish, self.checkpoint_io)

    def _serve_files(self, source: int) -> None:
        self._keeper.serve(source, None, self.checkpoint_io)

    def _setting(self) -> dict[str, Any]:
        """Return what a resume must have in common with the run that saved, to go on bit for bit."""
        return {
            "workers": self.world_size,
            "replica": f"node of {self.num_processes}" if self._replica_rule == "node" else "device",
            "bucket_mb": self.mean.bucket_mb,
            "wire": [self.mean.wire, self.mean.rounding, self.mean.error_feedback],
            "seed": self._seed if self.mean.rounding == "stochastic" else None,
            "delay": self.mean.delay,
            "backend": self._process_group_backend if self.world_size > 1 else None,
            "period": words(self.schedule),
            "outer": words(str(self.outer)),
            "optimizer_state": words(self._state_rule),
            "pace": words(self._pace_rule),
        }

    def _require_alike(self, ckpt_path: Any = None) -> None:
        """See that all workers may join this run, before one of them sends its model, or loads one.

        Raises:
            RuntimeError: on all ranks, with the rank that is unlike the others and the difference.
        """
        assert self.lightning_module is not None
        header = self._talk()
        if header.size > 1:
            run = {"run": self._trainer.state.fn, "ckpt_path": "given" if ckpt_path else "not given"}
            setting = self._setting() | {"mean": repr(self.mean), "checkpoint": "exact" if self._exact else "consensus"}
            compare(header, run | setting | {MODEL: describe(self.lightning_module)})

    @property
    def _seed(self) -> int:
        """What `seed_everything` has been given: the seed of the noise in roundings."""
        return int(os.environ.get("PL_GLOBAL_SEED", 0))

    @contextmanager
    def _own_part(self) -> Generator[dict[str, Any], None, None]:
        assert self._fit is not None
        with self.worker.state() as state:
            yield {
                "worker": state,
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "fit": self._fit.state(),
                "rest": self.rest.own_state(),
            } | ({"pace": self._pacing.state()} if self._pacing is not None else {})

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        fits = self._trainer.state.fn == TrainerFn.FITTING
        if self._worker is None:
            self._require_alike(checkpoint_path)
        checkpoint, part, error, path = {}, None, None, str(checkpoint_path)
        try:
            checkpoint = super().load_checkpoint(checkpoint_path, *args, **kwargs)
            if fits:
                refuse_one_worker(checkpoint, path)
            if fits and self._exact and self._worker is None:
                part = read_part(checkpoint, path, self.global_rank, self._setting(), kwargs.get("weights_only"))
        except Exception as this:
            error = this
        self._talk().agree(error)
        entry = checkpoint.get(KEY, {})
        what = f"of step {checkpoint.get('global_step')} in epoch {checkpoint.get('epoch')}, {entry.get('clock')}"
        compare(self._talk(), {"ckpt_path": what})
        if not fits:
            return checkpoint
        was = entry.get("workers", self.world_size)
        if was != self.world_size and self.mean.rounds_to_integers and self.mean.error_feedback:
            rank_zero_warn(
                f"The error memories of the wire start at 0, because the number of workers was {was} and is "
                f"{self.world_size}."
            )
        self._resumed = entry | {"clock": Clock.new_round(entry["clock"])} if "clock" in entry else {}
        if self._worker is not None:  # the learning rate finder goes back to where it was
            self._restart()
        elif part is not None and all_go_on_from(part, checkpoint, path, self._setting(), self._trainer, self._talk()):
            checkpoint |= part["fit"]["lightning"] | {"optimizer_states": part["optimizers"]}
            self._part, self._resumed = part, entry | {"clock": part["worker"]["clock"]}
        elif "cuts" in (rest := self._resumed.get("rest", {})):
            _lightning.put_between_batches(checkpoint, rest["back"], rest["logged"])
        return checkpoint

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        super().load_optimizer_state_dict(checkpoint)
        if self._part is not None:
            for optimizer, state in zip(self.optimizers, self._part["optimizers"], strict=True):
                load_as_it_was(optimizer, state)
