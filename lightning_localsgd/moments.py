"""WHAT of the optimizers goes into a checkpoint for everyone: the mean of their moments over the workers."""

import zlib
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_localsgd.header import Header
from lightning_localsgd.mean import Mean

_Entry = tuple[int, str, tuple[int, ...], str]  # parameter, key, shape, dtype


def mean_state(
    state: dict[str, Any], mean: Mean, header: Header, *, reader: int, device: torch.device
) -> dict[str, Any]:
    r"""Return an optimizer's state dict with the mean of its tensors over the workers where they are finite.

    .. math:: \bar{m} = \frac{1}{|W_m|} \sum_{i \in W_m} m_i

    What is no number for each element of a parameter stays the reader's own: step counts, parameter groups, and the
    memory of optimizers such as LBFGS, whose parts only fit each other. So does the lack of a state that an optimizer
    makes later on the reader than on others.

    Args:
        state: what ``optimizer.state_dict()`` returned; is left as it is.
        mean: how to average.
        header: how the workers hear of each other.
        reader: the worker that will use the result.
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
            mean.average(tensors, weights, header.rank)
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
