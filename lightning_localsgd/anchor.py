"""WHERE a round started: a copy of the trained parameters, all elements of a kind in one line."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_localsgd.mean import Group, grouped

Trained = tuple[str, Tensor, Sequence[Tensor]]  # name, parameter, and one-dimensional views that cover its memory


@dataclass(frozen=True)
class Line:
    """Where the elements of one parameter lie.

    Args:
        name: of the parameter.
        group: the dtype in which it is averaged, and its device: each group has a line of its own.
        start: its first element in that line.
        size: number of elements.
        shape: of the parameter.
        stride: of the parameter; its elements lie in the line as they do in its memory.
        complex: whether an element is two numbers of the line.
    """

    name: str
    group: Group
    start: int
    size: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    complex: bool


def require_whole(parameters: Sequence[Trained]) -> None:
    """See that an anchor can be taken.

    Raises:
        ValueError: if a parameter is a part of a larger tensor.
    """
    for name, _, pieces in parameters:
        if len(pieces) != 1:
            raise ValueError(f"An anchor needs parameters with memory of their own, and `{name}` is a slice.")


class Anchor:
    """The values of parameters at the start of a round, in the order in which `Mean` packs them.

    Args:
        parameters: in the order in which `Mean` averages them.
        in_main_memory: whether the values are kept there, pinned, rather than beside the model.

    Raises:
        ValueError: if a parameter is a part of a larger tensor.
    """

    def __init__(self, parameters: Sequence[Trained], in_main_memory: bool = False) -> None:
        require_whole(parameters)
        views = [pieces[0] for _, _, pieces in parameters]
        found: dict[int, Line] = {}
        self.values: dict[Group, Tensor] = {}
        self._starts: dict[Group, tuple[list[int], list[Line]]] = {}
        for group, places in grouped(views).items():
            start, lines = 0, []
            for place in places:
                name, tensor, _ = parameters[place]
                shape, stride = tuple(tensor.shape), tensor.stride()
                line = Line(name, group, start, views[place].numel(), shape, stride, tensor.is_complex())
                found[place] = line
                lines.append(line)
                start += line.size
            dtype, device = group
            pinned = in_main_memory and device.type != "cpu"
            self.values[group] = torch.empty(
                start, dtype=dtype, device="cpu" if in_main_memory else device, pin_memory=pinned
            )
            self._starts[group] = [line.start for line in lines], lines
        self.lines = [found[place] for place in range(len(views))]  # in the order of the parameters
        self.take(views)

    @torch.no_grad()
    def take(self, views: Sequence[Tensor]) -> None:
        """Take the values that the parameters have now."""
        for line, view in zip(self.lines, views, strict=True):
            self._part(line).copy_(view)

    def fits(self, parameters: Sequence[Trained]) -> bool:
        """Return whether it can take the values of these parameters, as if it had been made for them."""
        require_whole(parameters)
        found = grouped([view for _, _, (view,) in parameters])
        groups = {place: group for group, places in found.items() for place in places}
        return [(line.name, line.group, line.shape, line.stride) for line in self.lines] == [
            (name, groups[place], tuple(tensor.shape), tensor.stride())
            for place, (name, tensor, _) in enumerate(parameters)
        ]

    @torch.no_grad()
    def distance(self, views: Sequence[Tensor]) -> float:
        """Return how far the parameters have moved."""
        squares = [
            (view.to(self._part(line)) - self._part(line)).double().square().sum()
            for line, view in zip(self.lines, views, strict=True)
        ]
        return float(torch.stack([square.cpu() for square in squares]).sum().sqrt()) if squares else 0.0

    def flat(self) -> list[Tensor]:
        """Return the values as one-dimensional views, as `Replica` gives them of the parameters."""
        return [self._part(line) for line in self.lines]

    def _part(self, line: Line) -> Tensor:
        return self.values[line.group][line.start : line.start + line.size]

    def within(self, group: Group, start: int, stop: int) -> Iterator[tuple[Line, slice, slice]]:
        """Yield the parameters in this piece of a line: which, what part of it, and where in the piece that is."""
        starts, lines = self._starts[group]
        for line in lines[bisect_right(starts, start) - 1 :]:
            if line.start >= stop:
                return
            first, last = max(start, line.start), min(stop, line.start + line.size)
            if first < last:
                yield line, slice(first - line.start, last - line.start), slice(first - start, last - start)

    def shaped(self) -> list[Tensor]:
        """Return the values as views of the parameters' own shapes."""
        return [
            torch.view_as_complex(self._part(line).view(-1, 2)).as_strided(line.shape, line.stride)
            if line.complex
            else self.values[line.group].as_strided(line.shape, line.stride, line.start)
            for line in self.lines
        ]

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the values of each parameter."""
        return {line.name: self._part(line).clone() for line in self.lines}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take these values."""
        for line in self.lines:
            self._part(line).copy_(state[line.name])
