"""Lightning's callbacks that keep a model of their own, or prune ours: all are shown the consensus.

Between averages each worker's replica is its own, and so would be what such a callback makes of it. So methods of the
callbacks of one trainer are wrapped while it fits: never a class, always undone.
"""

from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod

_KEY = "lightning_localsgd"  # our entry in a callback's state


def attach_callbacks(trainer: Any, undo: ExitStack) -> "list[Average]":
    """Wrap the callbacks of ``trainer``, before any state is loaded into them; closing ``undo`` undoes it."""
    averages = []
    for callback in trainer.callbacks:
        if is_a(callback, "WeightAveraging"):  # since lightning 2.6
            averages.append(Average(callback, trainer, undo))
        elif is_a(callback, "StochasticWeightAveraging"):
            _attach_swa(callback, trainer, undo)
        elif is_a(callback, "ModelPruning"):
            _attach_pruning(callback, trainer, undo)
    return averages


class Average:
    r"""The average that a ``WeightAveraging`` callback keeps (an EMA, say), fed with the consensus.

    An update that falls due within a round is done at its end, when every worker holds the consensus :math:`\bar{x}`:
    if :math:`k` steps of the round asked for one, :math:`k` times

    .. math:: m \leftarrow \beta \, m + (1 - \beta) \, \bar{x}

    So after each round there have been as many updates as without us, equal on all workers, for no communication.
    Which steps have ended is read off the clock, not counted here: a worker whose data has ended earlier updates as
    often as the others. An update at the end of an epoch takes the consensus there and then. While gradients are
    averaged the callback does what it does without us.

    Args:
        callback: a ``WeightAveraging``.
        trainer: whose callback it is.
        undo: takes what puts the callback back.
    """

    def __init__(self, callback: Any, trainer: Any, undo: ExitStack) -> None:
        self._callback = callback
        self._trainer = trainer
        self._asked: int | None = None  # the steps for which it is settled whether they update the average
        self._before = 0  # what Lightning's count of steps is ahead of our clock
        self._resumed = False  # from a checkpoint with this average
        self._should_update = _wrap(undo, callback, "should_update", self._answer)
        self._state_dict = _wrap(undo, callback, "state_dict", self._save)
        self._load_state_dict = _wrap(undo, callback, "load_state_dict", self._load)

    @property
    def _model(self) -> Any:
        return self._callback._average_model

    @property
    def _clock(self) -> Any:
        return self._trainer.strategy.worker.clock

    @torch.no_grad()
    def copy(self, module: nn.Module) -> None:
        """Begin as a copy of the module, unless resumed: so far it is one of this rank's own, before rank 0's came."""
        if not self._resumed:
            for mine, its in zip(_tensors(self._model.module), _tensors(module), strict=True):
                mine.copy_(its)

    def start(self) -> None:
        """Follow the training from here on; all ranks together."""
        if self._asked is None or self._asked > self._clock.start:
            self._asked = self._clock.start
            self._before = self._trainer.strategy.broadcast(self._trainer.global_step - self._clock.step)
        self.follow()

    def follow(self) -> None:
        """Do the updates that have fallen due; at the start of a round, where the module holds the consensus."""
        if self._asked is None or self._callback not in self._trainer.callbacks:  # the tuner takes all out for a while
            return
        steps = range(self._asked, self._clock.start)
        self._asked = self._clock.start
        for step in steps:
            if self._should_update(step_idx=self._before + step):
                self._update()
                self._callback._latest_update_step = self._trainer.global_step

    def _answer(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Stand in for ``should_update``: refuse what is done elsewhere."""
        if not self._clock.averages_models:
            self._asked = self._clock.start
        elif epoch_idx is not None:
            if self._should_update(epoch_idx=epoch_idx):
                with self._trainer.strategy.consensus():
                    self._update()
                self._callback._latest_update_epoch = epoch_idx
            return False
        elif self._asked == self._clock.start or self._trainer.strategy.worker.is_aloft:
            return False
        else:  # the step that ended the last round of averaged gradients, in which replicas were equal
            self._asked = self._clock.start
        due: bool = self._should_update(step_idx=step_idx, epoch_idx=epoch_idx)
        return due

    def _update(self) -> None:
        self._model.update_parameters(self._trainer.lightning_module)

    def _save(self) -> dict[str, Any]:
        state: dict[str, Any] = self._state_dict()
        return state | {_KEY: {"asked": self._asked, "before": self._before}}

    def _load(self, state: dict[str, Any]) -> None:
        self._resumed = True
        ours = state.get(_KEY, {"asked": None, "before": 0})
        self._asked, self._before = ours["asked"], ours["before"]
        self._load_state_dict({key: value for key, value in state.items() if key != _KEY})


def _attach_swa(callback: Any, trainer: Any, undo: ExitStack) -> None:
    """Let it average the consensus at the start of an epoch."""

    def update_parameters(*args: Any, **kwargs: Any) -> None:
        with trainer.strategy.consensus():
            update(*args, **kwargs)

    update = _wrap(undo, callback, "update_parameters", update_parameters)


def _attach_pruning(callback: Any, trainer: Any, undo: ExitStack) -> None:
    """Let it prune all workers' replicas alike, by the consensus, and save what is pruned of the consensus."""

    def apply_pruning(amount: int | float) -> None:
        pruned = callback._parameters_to_prune
        with trainer.strategy.consensus():
            for module in {module for module, _ in pruned}:
                for hook in module._forward_pre_hooks.values():
                    if isinstance(hook, BasePruningMethod):
                        hook(module, None)  # else what the last forward pass has left is looked at
            prune(amount)
        # Random masks differ, and masks are not to be averaged.
        masks = [getattr(module, f"{name}_mask") for module, name in pruned]
        for mask, first in zip(masks, trainer.strategy.broadcast([mask.cpu() for mask in masks]), strict=True):
            mask.copy_(first)

    def on_save_checkpoint(trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        with trainer.strategy.consensus():
            save(trainer, module, checkpoint)
            # It reads the module again, whose storage soon holds this worker's own weights.
            checkpoint["state_dict"] = deepcopy(checkpoint["state_dict"])

    def on_train_start(trainer: Any, module: Any) -> None:
        # What the lottery goes back to was copied from this rank's own first model, before all took rank 0's.
        layers = [layer["data"] for layer in (callback._original_layers or {}).values()]
        states = trainer.strategy.broadcast([layer.state_dict() for layer in layers])
        for layer, state in zip(layers, states, strict=True):
            layer.load_state_dict(state)
        start(trainer, module)

    prune = _wrap(undo, callback, "apply_pruning", apply_pruning)
    save = _wrap(undo, callback, "on_save_checkpoint", on_save_checkpoint)
    if callback._use_lottery_ticket_hypothesis:
        start = _wrap(undo, callback, "on_train_start", on_train_start)


def is_a(callback: object, name: str) -> bool:
    """Whether it is Lightning's callback of this name, from either of its packages, or a subclass of it."""
    homes = ("lightning.pytorch.callbacks", "pytorch_lightning.callbacks")
    return any(base.__name__ == name and base.__module__.startswith(homes) for base in type(callback).__mro__)


def _wrap(undo: ExitStack, callback: object, name: str, wrapper: Callable[..., Any]) -> Callable[..., Any]:
    """Put ``wrapper`` in the place of a method of this instance, until ``undo`` is closed; return the method."""
    method: Callable[..., Any] = getattr(callback, name)
    if name in vars(callback):
        undo.callback(setattr, callback, name, method)
    else:
        undo.callback(delattr, callback, name)
    setattr(callback, name, wrapper)
    return method


def _tensors(module: nn.Module) -> Any:
    return chain(module.parameters(), module.buffers())
