"""WHAT ELSE a worker trains with: its optimizers, whose state stays its own, and the loss scale of its GradScaler."""

import struct
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Optimizers:
    """The optimizers of one worker, and its GradScaler if there is one.

    Args:
        module: whose parameters they train.
        scaler: scales the loss in 16-bit training.
    """

    def __init__(self, module: nn.Module, scaler: torch.amp.GradScaler | None) -> None:
        self._module = module
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._optimizers: Callable[[], Sequence[Optimizer]] = tuple  # none yet
        self._first_states: WeakKeyDictionary[Optimizer, dict[Any, Any]] = WeakKeyDictionary()

    def attach(self, optimizers: Callable[[], Sequence[Optimizer]], may_reset: bool) -> None:
        """Take the optimizers, which are made after the first model has been agreed on.

        Args:
            optimizers: returns them.
            may_reset: whether :meth:`reset` may be called.
        """
        self._optimizers = optimizers
        if may_reset:
            for optimizer in optimizers():
                if _is_schedule_free(optimizer):
                    raise ValueError(
                        "`Mean(nonfinite='exclude')` gives a worker a new optimizer state, which is wrong for "
                        f"{type(optimizer).__name__}: it keeps a part of the model there; take `nonfinite='raise'`."
                    )
            # Empty now, but for a few that fill their state when they are made, such as Adagrad.
            self._first_states = WeakKeyDictionary({one: _copied(one.state) for one in optimizers()})

    def all(self) -> Sequence[Optimizer]:
        """Return the optimizers."""
        return self._optimizers()

    def reset(self) -> None:
        """Give the optimizers the states that they were made with; their parameter groups stay as they are."""
        for optimizer in self._optimizers():
            optimizer.state.clear()  # in place: a `LightningOptimizer` shares it
            optimizer.state.update(_copied(self._first_states.get(optimizer, {})))
        self._module.zero_grad()  # what has been accumulated comes from the replica that is gone

    @property
    def loss_scale(self) -> int:
        """The loss scale, and the steps since it last changed, as one number above 0 in that order; 0 without any."""
        if self._scaler is None:
            return 0
        state = self._scaler.state_dict()
        bits = int.from_bytes(struct.pack(">f", state["scale"]), "big")  # floats above 0 are in the order of their bits
        return bits << 31 | int(state["_growth_tracker"])

    @loss_scale.setter
    def loss_scale(self, number: int) -> None:
        if self._scaler is not None:
            (scale,) = struct.unpack(">f", (number >> 31).to_bytes(4, "big"))
            state = self._scaler.state_dict() | {"scale": scale, "_growth_tracker": number & (1 << 31) - 1}
            self._scaler.load_state_dict(state)

    def iterates(self) -> Iterator[tuple[str, Tensor]]:
        r"""Yield the second model that schedule-free optimizers keep in their state, with a name for each tensor.

        They train :math:`y = (1 - \beta) z + \beta x`. In the module is y, or x after `optimizer.eval()`, and z is in
        the state. All three are points in the space of the model: their means are in the same relation, so that y and
        z are averaged, and x with them. (With z left alone, x would be pulled apart at each average.)
        """
        names = None
        for optimizer in self._optimizers():
            if not _is_schedule_free(optimizer):
                continue
            names = names or {parameter: name for name, parameter in self._module.named_parameters()}
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    z = optimizer.state.get(parameter, {}).get("z")
                    if isinstance(z, Tensor):
                        yield f"{names.get(parameter, 'a parameter')} (z in the optimizer)", z


def _is_schedule_free(optimizer: Optimizer) -> bool:
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


def _copied(state: dict[Any, Any]) -> dict[Any, Any]:
    """Copy the values only: the keys are parameters."""
    return {key: deepcopy(value) for key, value in state.items()}
