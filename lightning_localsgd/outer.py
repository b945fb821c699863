"""THEN WHAT: outer steps, which take the next start from the anchor and the mean."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from lightning_localsgd.anchor import Anchor
from lightning_localsgd.mean import Bucket, Group
from lightning_localsgd.schedule import require_number

OptimizerMaker = Callable[[Iterable[Tensor]], Optimizer]  # as Lightning's `OptimizerCallable`, which its CLI knows
State = dict[str, dict[str, Any]]  # of each parameter, by the optimizer's own keys

# Their steps treat every element alike, so that they may be given any piece of the line of all elements.
ELEMENTWISE = (
    optim.SGD, optim.Adam, optim.AdamW, optim.Adamax, optim.NAdam, optim.RAdam,
    optim.Adagrad, optim.Adadelta, optim.RMSprop, optim.Rprop, optim.ASGD,
)  # fmt: skip
_CHUNK = 1 << 20  # elements that they are given at a time, so that what a step needs beside them is small


class OuterStep(ABC):
    """What makes the next start of the anchor and the mean: a frozen dataclass, which makes a :class:`Stepper`.

    Args:
        offload: whether the anchor, and what the step remembers, live in (pinned) main memory while the model does not.
    """

    offload: bool

    @abstractmethod
    def stepper(self, anchor: Anchor) -> "Stepper":
        """Return what does the steps, for these parameters."""

    @property
    def kind(self) -> str:
        """Names what is remembered: two of a kind can take it up from each other."""
        return type(self).__name__


class Stepper(ABC):
    """Does the outer steps for a fixed list of parameters; what it remembers is equal on all workers."""

    in_pieces = True  # whether it steps bucket by bucket, rather than when the whole mean is there
    needs_rates = False  # whether it wants the learning rates of the round

    def step(self, bucket: Bucket, anchor: Tensor, rates: Mapping[str, float]) -> None:
        """Move a piece of the anchor to the next start.

        Args:
            bucket: the mean of that piece.
            anchor: the piece, one-dimensional, maybe on another device.
            rates: for each parameter its mean learning rate over the steps of the round, if wanted.
        """
        raise NotImplementedError

    def finish(self, parameters: Sequence[Tensor]) -> None:
        """Change ``parameters``, which hold the mean, and the anchor to the next start."""
        raise NotImplementedError

    @abstractmethod
    def state_dict(self) -> State:
        """Return what is remembered of each parameter."""

    @abstractmethod
    def load_state_dict(self, state: State) -> None:
        """Take up what was remembered of those parameters that ``state`` knows."""

    @abstractmethod
    def rest(self) -> None:
        """After the last step: keep what is remembered in main memory, and let go of the anchor."""


# ------------------------------------------------------------------------------------------------ an outer optimizer


@dataclass(frozen=True)
class Outer(OuterStep):
    r"""Any optimizer steps from the anchor, with the outer gradient.

    .. math:: \Delta = a - \bar x, \qquad a \leftarrow \mathrm{OuterOpt}(a, \Delta)

    with the anchor a, from which the round started, and the mean :math:`\bar x` of the replicas. Only parameters that
    required gradients when the round began are stepped; all others, and buffers, take the mean.

    The optimizers of `torch.optim` that treat each element alike (SGD, Adam, AdamW, Adamax, NAdam, RAdam, Adagrad,
    Adadelta, RMSprop, Rprop, ASGD) run piece by piece and need, beside the model, the anchor and their state, and while
    they step a few MiB more than the average. Others, such as Adafactor and Muon, run on the parameters' own shapes,
    and need for a moment the memory of one model more.

    BMUF (Chen, Huo, ICASSP 2016) with block momentum :math:`\eta` and block learning rate :math:`\zeta` is
    ``SGD(lr=zeta, momentum=eta)``, usually with :math:`\eta = 1 - 1/N, \zeta = 1`; ``nesterov=True`` is its Nesterov
    form.

    Args:
        optimizer: makes the optimizer for a list of tensors, as ``functools.partial(torch.optim.SGD, lr=0.7)``; in YAML
            a class path with its arguments.
        offload: whether the anchor and the optimizer's state live in main memory, pinned, and the step is taken there:
            for models on accelerators.

    Raises:
        ValueError: if ``optimizer`` does not make one, or one that needs a closure; at the start of ``fit``, with
            ``offload`` where the model itself is in main memory; in training, if a round averages gradients.

    Example:
        >>> from functools import partial
        >>> outer = Outer(partial(torch.optim.SGD, lr=0.5))

    Paper: Reddi et al., *Adaptive Federated Optimization*, ICLR 2021 (arXiv 2003.00295).
    """

    optimizer: OptimizerMaker
    offload: bool = False

    def __post_init__(self) -> None:
        self._make([torch.zeros(1, 1)], "`optimizer`")

    def _make(self, parameters: Sequence[Tensor], name: str) -> Optimizer:
        if not callable(self.optimizer):
            raise ValueError(f"{name} must make an optimizer from a list of tensors, got {self.optimizer!r}.")
        made = self.optimizer([nn.Parameter(tensor, requires_grad=True) for tensor in parameters])
        if not isinstance(made, Optimizer):
            raise ValueError(f"{name} must return a `torch.optim.Optimizer`, got {made!r}.")
        if isinstance(made, optim.LBFGS):
            raise ValueError(f"{name} must step without a closure, which LBFGS needs.")
        return made

    def stepper(self, anchor: Anchor) -> Stepper:
        elementwise = type(self._make([torch.zeros(1, 1)], "`optimizer`")) in ELEMENTWISE
        return Pieces(anchor, self._make_for) if elementwise else Shapes(anchor, self._make_for)

    @property
    def kind(self) -> str:
        return f"Outer with {type(self._make([torch.zeros(1, 1)], '`optimizer`')).__name__}"

    def __str__(self) -> str:  # the same in every process, unlike the address of a function
        return f"{self.kind}, {self._make([torch.zeros(1, 1)], '`optimizer`').defaults}, offload={self.offload}"

    def _make_for(self, parameters: Sequence[Tensor]) -> Optimizer:
        return self._make(parameters, "`optimizer`")


@dataclass(frozen=True)
class DiLoCo(OuterStep):
    r"""DiLoCo's outer optimizer: SGD with Nesterov momentum, from the anchor.

    .. math:: \Delta = a - \bar x, \qquad v \leftarrow \mu v + \Delta, \qquad a \leftarrow a - \eta (\Delta + \mu v)

    The rest of the recipe is yours: AdamW inside, rounds of 30 to 500 steps, a warm-up and a decay of the inner
    learning rate, the inner optimizers' state kept (``optimizer_state="keep"``).

    Args:
        lr: :math:`\eta`, above 0; 0.7 is the published value. A later study finds 0.6 best for 2 and 4 workers and 0.8
            for 8 (arXiv 2503.09799).
        momentum: :math:`\mu`, at least 0 and below 1.
        offload: as in :class:`Outer`.

    Raises:
        ValueError: if an argument is something else.

    Example:
        >>> DiLoCo()
        DiLoCo(lr=0.7, momentum=0.9, offload=False)

    Paper: Douillard et al., *DiLoCo: Distributed Low-Communication Training of Language Models*, 2023
    (arXiv 2311.08105).
    """

    lr: float = 0.7
    momentum: float = 0.9
    offload: bool = False

    def __post_init__(self) -> None:
        require_number("lr", self.lr)
        _require_momentum("momentum", self.momentum)

    def stepper(self, anchor: Anchor) -> Stepper:
        return Pieces(anchor, self._make)

    def _make(self, parameters: Sequence[Tensor]) -> Optimizer:
        momentum = {"momentum": self.momentum, "nesterov": True} if self.momentum else {}
        return optim.SGD(parameters, lr=self.lr, **momentum)  # type: ignore[arg-type]


class Pieces(Stepper):
    """An elementwise optimizer, one for each piece of the line."""

    def __init__(self, anchor: Anchor, make: Callable[[Sequence[Tensor]], Optimizer]) -> None:
        self._anchor = anchor
        self._make = make
        self._pieces: dict[tuple[Group, int, int], tuple[nn.Parameter, Optimizer]] = {}
        self._later: State = {}  # to be taken up by pieces that are not made yet

    def step(self, bucket: Bucket, anchor: Tensor, rates: Mapping[str, float]) -> None:
        for start in range(0, len(anchor), _CHUNK):
            piece = anchor[start : start + _CHUNK]
            key = bucket.group, bucket.start + start, bucket.start + start + len(piece)
            parameter, optimizer = self._pieces.get(key) or self._new(key, piece)
            with torch.no_grad():
                parameter.grad = piece - bucket.values[start : start + _CHUNK].to(piece.device)
            optimizer.step()
            parameter.grad = None

    def _new(self, key: tuple[Group, int, int], piece: Tensor) -> tuple[nn.Parameter, Optimizer]:
        parameter = nn.Parameter(piece)  # the same memory
        optimizer = self._make([parameter])
        (parameter,) = optimizer.param_groups[0]["params"]
        optimizer.state[parameter].update(self._state_of(key, piece))
        self._pieces[key] = parameter, optimizer
        return parameter, optimizer

    def _state_of(self, key: tuple[Group, int, int], piece: Tensor) -> dict[str, Any]:
        """Return what `load_state_dict` has left for this piece."""
        state: dict[str, Any] = {}
        group, start, stop = key
        for line, own, here in self._anchor.within(group, start, stop):
            for name, value in self._later.get(line.name, {}).items():
                if isinstance(value, Tensor) and value.ndim:
                    whole = state.setdefault(name, torch.zeros_like(piece))
                    whole[here].copy_(value[own])
                else:
                    state.setdefault(name, value.clone() if isinstance(value, Tensor) else value)
        return state

    def state_dict(self) -> State:
        found: State = {line.name: {} for line in self._anchor.lines}
        for (group, start, stop), (parameter, optimizer) in self._pieces.items():
            for line, own, here in self._anchor.within(group, start, stop):
                for name, value in optimizer.state[parameter].items():
                    if isinstance(value, Tensor) and value.ndim:
                        if name not in found[line.name]:
                            found[line.name][name] = torch.zeros(line.size, dtype=value.dtype)
                        found[line.name][name][own].copy_(value[here])
                    else:
                        found[line.name][name] = value.cpu().clone() if isinstance(value, Tensor) else value
        return found if self._pieces else self._later

    def load_state_dict(self, state: State) -> None:
        self._later, self._pieces = state, {}

    def rest(self) -> None:
        for parameter, optimizer in self._pieces.values():
            _rest(parameter, optimizer)


class Shapes(Stepper):
    """Any other optimizer, on the parameters' own shapes."""

    in_pieces = False

    def __init__(self, anchor: Anchor, make: Callable[[Sequence[Tensor]], Optimizer]) -> None:
        self._names = [line.name for line in anchor.lines]
        self._optimizer = make(anchor.shaped())
        self._anchors = [each for group in self._optimizer.param_groups for each in group["params"]]

    def finish(self, parameters: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for own, parameter in zip(self._anchors, parameters, strict=True):
                own.grad = own - parameter.to(own)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for own, parameter in zip(self._anchors, parameters, strict=True):
                parameter.copy_(own)
                own.copy_(parameter)  # the workers start from what their dtype can hold

    def state_dict(self) -> State:
        state = self._optimizer.state
        return {name: deepcopy(state.get(own, {})) for name, own in zip(self._names, self._anchors, strict=True)}

    def load_state_dict(self, state: State) -> None:
        for name, own in zip(self._names, self._anchors, strict=True):
            for key, value in state.get(name, {}).items():
                kept = value.to(own.device, copy=True) if isinstance(value, Tensor) and value.ndim else value
                self._optimizer.state[own][key] = kept

    def rest(self) -> None:
        for parameter in self._anchors:
            _rest(parameter, self._optimizer)


def _rest(parameter: Tensor, optimizer: Optimizer) -> None:
    state = optimizer.state[parameter]
    for key, value in state.items():
        state[key] = value.cpu() if isinstance(value, Tensor) else value
    parameter.data = torch.empty(0)


# -------------------------------------------------------------------------------------------------------- slow momentum


@dataclass(frozen=True)
class SlowMo(OuterStep):
    r"""Slow momentum, independent of the learning rate inside.

    .. math:: u \leftarrow \beta u + \frac{1}{\gamma} (a - \bar x), \qquad a \leftarrow a - \alpha \gamma u

    :math:`\gamma` is the mean learning rate over the steps of the round, of each parameter group its own, and the mean
    over the workers; where it is 0, :math:`u \leftarrow \beta u` and the parameters take the mean. With
    :math:`\beta = 0, \alpha = 1` it is the plain mean.

    The paper empties the momentum of SGD inside at the start of each round (``optimizer_state="reset"``) and keeps
    Adam's moments (``"keep"``).

    Args:
        alpha: :math:`\alpha`, above 0; the paper found 1 best everywhere.
        beta: :math:`\beta`, at least 0 and below 1; the paper took 0.4 to 0.8, the more the more workers.
        offload: as in :class:`Outer`.

    Raises:
        ValueError: if an argument is something else.

    Example:
        >>> SlowMo(beta=0.6)
        SlowMo(alpha=1.0, beta=0.6, offload=False)

    Paper: Wang, Tantia, Ballas, Rabbat, *SlowMo: Improving Communication-Efficient Distributed SGD with Slow Momentum*,
    ICLR 2020 (arXiv 1910.00643).
    """

    alpha: float = 1.0
    beta: float = 0.5
    offload: bool = False

    def __post_init__(self) -> None:
        require_number("alpha", self.alpha)
        _require_momentum("beta", self.beta)

    def stepper(self, anchor: Anchor) -> Stepper:
        return Slow(anchor, self.alpha, self.beta)


class Slow(Stepper):
    """Slow momentum u, in lines as the anchor's."""

    needs_rates = True

    def __init__(self, anchor: Anchor, alpha: float, beta: float) -> None:
        self._anchor = anchor
        self._alpha, self._beta = alpha, beta
        self._u = {group: torch.zeros_like(values) for group, values in anchor.values.items()}

    @torch.no_grad()
    def step(self, bucket: Bucket, anchor: Tensor, rates: Mapping[str, float]) -> None:
        stop = bucket.start + len(anchor)
        u = self._u[bucket.group][bucket.start : stop]
        u.mul_(self._beta)
        for line, _, here in self._anchor.within(bucket.group, bucket.start, stop):
            gamma, mean = rates.get(line.name, 0.0), bucket.values[here].to(u.device)
            if gamma:
                u[here].add_(anchor[here] - mean, alpha=1 / gamma)
                anchor[here].sub_(u[here], alpha=self._alpha * gamma)
            else:
                anchor[here].copy_(mean)

    def state_dict(self) -> State:
        parts = {line.name: self._u[line.group][line.start : line.start + line.size] for line in self._anchor.lines}
        return {name: {"u": part.clone()} for name, part in parts.items()}

    def load_state_dict(self, state: State) -> None:
        for line in self._anchor.lines:
            if line.name in state:
                self._u[line.group][line.start : line.start + line.size].copy_(state[line.name]["u"])

    def rest(self) -> None:
        self._u = {group: u.cpu() for group, u in self._u.items()}


def _require_momentum(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"`{name}` must be a number of at least 0 and below 1, got {value!r}.")
