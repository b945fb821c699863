"""WHAT ELSE a worker trains with: its optimizers, whose state stays its own, and the loss scale of its GradScaler."""

import math
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
        self.have_stepped = False
        self._noted: dict[tuple[int, int], list[float]] = {}  # learning rates of this round: their sum, and how many

    def attach(self, optimizers: Callable[[], Sequence[Optimizer]], may_reset: bool) -> None:
        """Take the optimizers, which are made after the first model has been agreed on.

        Args:
            optimizers: returns them.
            may_reset: whether :meth:`reset` may be called.
        """
        self._optimizers = optimizers
        if may_reset:
            for optimizer in optimizers():
                if is_schedule_free(optimizer):
                    raise ValueError(
                        "`Mean(nonfinite='exclude')` and `optimizer_state='reset'` give a worker a new optimizer "
                        f"state, which is wrong for {type(optimizer).__name__}: it keeps a part of the model there."
                    )
            # Empty now, but for a few that fill their state when they are made, such as Adagrad.
            self._first_states = WeakKeyDictionary({one: _copied(one.state) for one in optimizers()})

    def all(self) -> Sequence[Optimizer]:
        """Return the optimizers."""
        return self._optimizers()

    def reset(self, gradients: bool = False) -> None:
        """Give the optimizers the states that they were made with; their parameter groups stay as they are.

        Args:
            gradients: whether what has been accumulated goes too.
        """
        for optimizer in self._optimizers():
            optimizer.state.clear()  # in place: a `LightningOptimizer` shares it
            optimizer.state.update(_copied(self._first_states.get(optimizer, {})))
        if gradients:
            self._module.zero_grad()

    @property
    def learning_rate(self) -> float:
        """The largest learning rate of all parameter groups."""
        rates = [float(group["lr"]) for optimizer in self._optimizers() for group in optimizer.param_groups]
        return max(rates, default=math.nan)

    def note_step(self, optimizer: Optimizer, rates: bool) -> None:
        """Take note that an optimizer has stepped, and with which learning rates if ``rates``."""
        self.have_stepped = True
        if not rates:
            return
        which = next(i for i, other in enumerate(self._optimizers()) if other is optimizer)
        for i, group in enumerate(optimizer.param_groups):
            noted = self._noted.setdefault((which, i), [0.0, 0.0])
            noted[0] += float(group["lr"])
            noted[1] += 1

    def take_rates(self) -> list[float]:
        """Return the mean learning rate of each parameter group over the steps since the last call."""
        rates = []
        for which, optimizer in enumerate(self._optimizers()):
            for i, group in enumerate(optimizer.param_groups):
                total, count = self._noted.get((which, i), (float(group["lr"]), 1.0))
                rates.append(total / count)
        self._noted = {}
        return rates

    def rates_by_name(self, rates: Sequence[float]) -> dict[str, float]:
        """Return for each parameter the one of ``rates``, in the order of :meth:`take_rates`, that is its group's."""
        names = {parameter: name for name, parameter in self._module.named_parameters()}
        groups = [group for optimizer in self._optimizers() for group in optimizer.param_groups]
        return {
            names[parameter]: rate
            for group, rate in zip(groups, rates, strict=True)
            for parameter in group["params"]
            if parameter in names
        }

    def noted_rates(self) -> list[list[float]]:
        """Return what :meth:`note_step` has noted, as plain numbers."""
        return [[*which, *noted] for which, noted in self._noted.items()]

    def load_noted_rates(self, state: list[list[float]]) -> None:
        """Go on from there."""
        self._noted = {(int(which), int(group)): list(noted) for which, group, *noted in state}

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
            if not is_schedule_free(optimizer):
                continue
            names = names or {parameter: name for name, parameter in self._module.named_parameters()}
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    z = optimizer.state.get(parameter, {}).get("z")
                    if isinstance(z, Tensor):
                        yield f"{names.get(parameter, 'a parameter')} (z in the optimizer)", z


def is_schedule_free(optimizer: Optimizer) -> bool:
    """Whether it is one of the package `schedulefree`, or of the same kind."""
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


def _copied(state: dict[Any, Any]) -> dict[Any, Any]:
    """Copy the values only: the keys are parameters."""
    return {key: deepcopy(value) for key, value in state.items()}
