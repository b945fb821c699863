"""IS IT FINITE: which tensor of a replica, if any, must not go into a mean."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_TOGETHER = 1 << 16  # elements that are copied to be looked at together
_NORMED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # dtypes that torch takes a norm of


class Finding(NamedTuple):
    """What a look at a replica has found.

    Args:
        bad: the place of the first tensor that counts and is not finite, from 1; 0 if all that count are finite.
        modest: whether every element is so small that even the sum of all squares is finite.
    """

    bad: int
    modest: bool


class Finiteness:
    """Looks for NaN and infinite elements, in one pass through the memory.

    A parameter that is trained counts always. A buffer or a frozen parameter counts once it has been finite: a mask
    of -inf, a "lowest so far" of inf or a "not yet" of NaN, with which the module was made, is no fault. A tensor that
    gets another shape is another tensor.
    """

    def __init__(self) -> None:
        self._once_finite: set[tuple[str, torch.Size]] = set()
        self._last: object = None  # the key of tensors that are all among them
        self._runs: tuple[object, list[list[int]]] = None, []  # of which views, and the places of those for one look

    def examine(self, named: Iterable[tuple[str, Tensor]], views: Sequence[Tensor] = (), key: object = None) -> Finding:
        """Examine these tensors, in their order; integers are finite.

        Args:
            named: the tensors.
            views: one-dimensional ones of real numbers that cover them, if at hand: many small tensors that are finite
                are then seen to be so sooner.
            key: what their names, shapes, dtypes and devices follow from, if at hand; it is compared with the last one.
        """
        if key is None or key != self._runs[0]:
            self._runs = key, runs(views)
        if self._runs[1] and all(_is_modest([views[place] for place in run]) for run in self._runs[1]):
            if key is None or key != self._last:
                self._once_finite |= {(name, x.shape) for name, x in named if x.is_floating_point() or x.is_complex()}
                self._last = key
            return Finding(0, modest=True)
        inexact = [
            (place, name, tensor)
            for place, (name, tensor) in enumerate(named, start=1)
            if tensor.is_floating_point() or tensor.is_complex()
        ]
        values = [_real(tensor) for _, _, tensor in inexact]
        bad, modest = 0, True
        for (place, name, tensor), value, norm in zip(inexact, values, _norms(values), strict=True):
            key = name, tensor.shape
            if not math.isfinite(norm):
                modest = False
                if not all(math.isfinite(end) for end in torch.stack(value.aminmax()).tolist()):
                    if not bad and (tensor.requires_grad or key in self._once_finite):
                        bad = place
                    continue
            self._once_finite.add(key)
        return Finding(bad, modest)


def runs(views: Sequence[Tensor]) -> list[list[int]]:
    """Return the places of those to be looked at together, of all floating point ones; none if they must not be.

    On a CPU a call takes as long as the look at some thousand elements: small tensors of one kind share it.
    """
    places = [place for place, view in enumerate(views) if view.is_floating_point()]
    kinds = {views[place].dtype for place in places}
    if len(kinds) != 1 or not kinds <= {torch.float32, torch.float64} or not all(views[p].is_cpu for p in places):
        return []
    found: list[list[int]] = []
    room = -1
    for place in places:
        room -= views[place].numel()
        if room < 0:
            found.append([])
            room = _TOGETHER - views[place].numel()
        found[-1].append(place)
    return found


@torch.no_grad()
def _is_modest(views: Sequence[Tensor]) -> bool:
    """Return whether the squares of all elements, and their sum, are finite."""
    line = torch.cat(list(views)) if len(views) > 1 else views[0]
    return math.isfinite(torch.dot(line, line))


@torch.no_grad()
def _norms(values: Sequence[Tensor]) -> list[float]:
    """Return the norm of each tensor, which is finite if the squares of its elements and their sum are."""
    groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i, value in enumerate(values):
        groups.setdefault((value.dtype, value.device), []).append(i)
    norms = [0.0] * len(values)
    for places in groups.values():  # one wait for the device in each
        found = torch.stack(torch._foreach_norm([values[i] for i in places])).tolist()
        for i, norm in zip(places, found, strict=True):
            norms[i] = norm
    return norms


def _real(tensor: Tensor) -> Tensor:
    value = tensor.detach()
    if value.is_complex():
        value = torch.view_as_real(value)
    return value if value.dtype in _NORMED else value.float()
