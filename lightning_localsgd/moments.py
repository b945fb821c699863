"""WHAT of the optimizers is averaged: their moments, for a checkpoint for everyone, and with the models if wanted."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lightning_localsgd.header import Header
from lightning_localsgd.links import Links
from lightning_localsgd.mean import Mean
from lightning_localsgd.replica import pieces
from lightning_localsgd.schedule import require_count

_Entry = tuple[int, str, tuple[int, ...], str]  # parameter, key, shape, dtype


def mean_state(
    state: dict[str, Any], mean: Mean, header: Header, links: Links, *, reader: int, device: torch.device
) -> dict[str, Any]:
    r"""Return an optimizer's state dict with the mean of its tensors over the workers where they are finite.

    .. math:: \bar{m} = \frac{1}{|W_m|} \sum_{i \in W_m} m_i

    What is no number for each element of a parameter stays the reader's own: step counts, parameter groups, and the
    memory of optimizers such as LBFGS, whose parts only fit each other. So does the lack of a state that an optimizer
    makes later on the reader than on others.

    Args:
        state: what ``optimizer.state_dict()`` returned; is left as it is.
        mean: how to average.
        header: how the ranks hear of each other.
        links: between the workers.
        reader: the rank that will use the result.
        device: where tensors must be to travel.
    """
    own = _entries(state)
    finite = [bool(tensor.isfinite().all()) for tensor in own.values()]
    mine = (list(own), finite)
    digests = header.gather(zlib.crc32(repr(mine).encode()))
    said = header.gather(mine) if len(set(digests)) > 1 else [mine] * len(digests)
    having = [{entry for entry, good in zip(*one, strict=True) if good} for one in said]
    owners: dict[tuple[int, ...], list[_Entry]] = {}
    for entry in said[reader][0]:
        owners.setdefault(tuple(int(entry in entries) for entries in having), []).append(entry)

    result = {key: dict(value) for key, value in state["state"].items()}
    for weights, entries in sorted(owners.items()):
        tensors = []
        for entry in entries:
            parameter, key, shape, dtype = entry
            if entry in own:
                tensor = own[entry].detach().to(device, copy=True, memory_format=torch.contiguous_format)
                result[parameter][key] = tensor
            else:
                tensor = torch.zeros(shape, dtype=getattr(torch, dtype), device=device)
            tensors.append(tensor.view(-1))
        if any(weights):
            mean.average(tensors, weights, links)
    return state | {"state": result}


def load_as_it_was(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """After ``optimizer.load_state_dict(state)``: give those tensors their dtype back that it has cast."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    for parameter, number in zip(parameters, numbers, strict=True):
        for key, value in state["state"].get(number, {}).items():
            now = optimizer.state[parameter][key]
            if isinstance(value, Tensor) and isinstance(now, Tensor) and now.dtype != value.dtype:
                optimizer.state[parameter][key] = value.to(now.device)


def _entries(state: dict[str, Any]) -> dict[_Entry, Tensor]:
    """Return the tensors that have a number for each element of their parameter."""
    found: dict[_Entry, Tensor] = {}
    for parameter, values in state["state"].items():
        if not isinstance(values, dict) or not all(
            isinstance(value, Tensor | int | float) for value in values.values()
        ):
            continue
        for key, value in values.items():
            if isinstance(value, Tensor) and value.is_floating_point() and key != "step":
                found[parameter, key, tuple(value.shape), str(value.dtype).removeprefix("torch.")] = value
    return found


@dataclass(frozen=True)
class AverageState:
    r"""Average the local optimizers' moments too, at the ends of rounds.

    .. math:: m_i \leftarrow \frac{1}{|W|} \sum_{j \in W} m_j

    for each float tensor of a parameter's shape in an optimizer's state (momentum, Adam's two moments). Counters of one
    element, such as Adam's `step`, take the maximum. Whatever else a state has stays as it is. Each moment sends
    as many bytes as the model.

    With SGD's momentum it is momentum PR-SGD, Algorithm 2 of Yu, Jin, Yang; with other periods for other moments it is
    DES-LOC.

    Args:
        every: in how many rounds once, an int of at least 1; or that for each moment by its key in the state, as
            ``{"exp_avg": 3, "exp_avg_sq": 6}``: moments that it does not name are kept.

    Raises:
        ValueError: if ``every`` is something else; at the first average, if no optimizer has such a moment.

    Example:
        >>> AverageState(every={"exp_avg": 3, "exp_avg_sq": 6})
        AverageState(every={'exp_avg': 3, 'exp_avg_sq': 6})

    Paper: Yu, Jin, Yang, *On the Linear Speedup Analysis of Communication Efficient Momentum SGD for Distributed
    Non-Convex Optimization*, ICML 2019 (arXiv 1905.03817); Iacob et al., *DES-LOC*, ICLR 2026 (arXiv 2505.22549).
    """

    every: int | Mapping[str, int] = 1

    def __post_init__(self) -> None:
        if not isinstance(self.every, Mapping):
            require_count("every", self.every)
        elif not self.every:
            raise ValueError("`every` must name a moment, got {}.")
        else:
            for number in self.every.values():
                require_count("every", number)

    def __hash__(self) -> int:
        return hash(tuple(self.every.items()) if isinstance(self.every, Mapping) else self.every)

    def due(self, completed: int) -> set[str] | None:
        """Return which moments are averaged at the end of this round, the first being 1; None are all of them."""
        if not isinstance(self.every, Mapping):
            return None if completed % self.every == 0 else set()
        return {key for key, number in self.every.items() if completed % number == 0}


class _Moment(NamedTuple):
    """A tensor in the state of an optimizer, or a counter, and how others can make one."""

    optimizer: int
    parameter: int
    key: str
    counts: bool  # is it a counter?
    shape: tuple[int, ...]
    dtype: str  # of torch; "int" and "float" are Python's
    whole: bool  # is there nothing else in the state of this parameter?


def average_states(
    optimizers: Sequence[Optimizer],
    mean: Mean,
    header: Header,
    links: Links,
    weights: Sequence[int],
    due: set[str] | None,
    device: torch.device,
) -> bool:
    """Replace the moments of all workers by their mean; a worker without the state of a parameter gets it.

    Args:
        optimizers: this worker's.
        mean: how to average.
        header: how the ranks hear of each other.
        links: between the workers.
        weights: for each rank whether it counts.
        due: the keys of the moments, or None for all.
        device: where counters must be to travel.

    Returns:
        whether any worker that counts has a moment to average.
    """
    parameters: list[list[Tensor]] = [
        [each for group in one.param_groups for each in group["params"]] for one in optimizers
    ]
    own = {
        moment: value
        for which, optimizer in enumerate(optimizers)
        for number, parameter in enumerate(parameters[which])
        for moment, value in _moments(which, number, parameter, optimizer.state.get(parameter, {}), due)
    }
    finite = [moment.counts or bool(torch.as_tensor(value).isfinite().all()) for moment, value in own.items()]
    mine = list(zip(own, finite, strict=True)) if weights[header.rank] else []
    digests = header.gather(zlib.crc32(repr(mine).encode()))
    said = [mine] * len(digests) if len(set(digests)) == 1 else header.gather(mine)
    having: dict[_Moment, list[int]] = {}
    for rank, moments in enumerate(said):
        for moment, good in moments:
            having.setdefault(_Moment(*moment), [0] * len(said))[rank] = int(good)
    if all(moment.counts for moment in having):
        return False
    owners: dict[tuple[int, ...], list[Tensor]] = {}
    for moment in sorted(having):
        if moment not in own:
            own[moment] = _make(moment, parameters[moment.optimizer][moment.parameter])
        if not moment.counts:
            owners.setdefault(tuple(having[moment]), []).extend(pieces(own[moment]))
    for ranks, tensors in sorted(owners.items(), key=lambda item: item[0]):
        if any(ranks):
            mean.average(tensors, ranks, links)
    counters = [moment for moment in sorted(having) if moment.counts]
    values = torch.tensor([float(own[moment]) for moment in counters], dtype=torch.float64, device=device)
    if header.size > 1 and counters:
        dist.all_reduce(values, dist.ReduceOp.MAX)
    for moment, value in zip(counters, values.tolist(), strict=True):
        old = own[moment]
        if isinstance(old, Tensor):
            own[moment] = old.fill_(value)
        else:
            own[moment] = type(old)(value)
    for moment in having:
        state = optimizers[moment.optimizer].state[parameters[moment.optimizer][moment.parameter]]
        if moment.whole or moment.key in state:  # no half of a state where there is none yet
            state[moment.key] = own[moment]
    return True


def averaged(optimizers: Sequence[Optimizer], due: set[str] | None) -> list[Tensor]:
    """Return the moments that :func:`average_states` averages, where all workers have the same."""
    return [
        value
        for which, optimizer in enumerate(optimizers)
        for number, (parameter, state) in enumerate(optimizer.state.items())
        for moment, value in _moments(which, number, parameter, state, due)
        if not moment.counts
    ]


def _moments(
    which: int, number: int, parameter: Tensor, state: dict[str, Any], due: set[str] | None
) -> Iterator[tuple[_Moment, Any]]:
    """Yield what can be averaged of the state of one parameter; nothing of one whose parts only fit each other."""
    values = {key: value for key, value in state.items() if value is not None}
    if not all(isinstance(value, Tensor | int | float) for value in values.values()):
        return
    found: list[tuple[str, bool, tuple[int, ...], str]] = []
    for key, value in values.items():
        if not isinstance(value, Tensor):
            found.append((key, True, (), type(value).__name__))
            continue
        shape, dtype = tuple(value.shape), str(value.dtype).removeprefix("torch.")
        inexact = value.is_floating_point() or value.is_complex()
        if inexact and value.shape == parameter.shape and key not in _COUNTERS:
            if due is None or key in due:
                found.append((key, False, shape, dtype))
        elif value.numel() == 1:
            found.append((key, True, shape, dtype))
    for key, counts, shape, dtype in found:
        yield _Moment(which, number, key, counts, shape, dtype, len(found) == len(values)), values[key]


def _make(moment: _Moment, parameter: Tensor) -> Any:
    if moment.dtype in ("int", "float", "bool"):
        return 0 if moment.dtype == "int" else 0.0 if moment.dtype == "float" else False
    dtype = getattr(torch, moment.dtype)
    if moment.counts:
        return torch.full(moment.shape, -torch.inf if dtype.is_floating_point else 0, dtype=dtype)
    return torch.zeros_like(parameter, dtype=dtype)


# One number for a parameter, which could be taken for a moment of a parameter that is one number.
_COUNTERS = {"step", "eta", "mu", "mu_product"}
