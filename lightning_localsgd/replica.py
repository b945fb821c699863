"""WHAT is this worker's model: its parameters and buffers, as one fixed list of memory to send, keep and put back."""

import hashlib
import zlib
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


class Replica:
    """The parameters and buffers of a module, in the module's order, as one-dimensional views of their memory.

    Writing to a view changes the module in place: storage, memory format, ties and the optimizer's references stay.
    Buffers may be rebound by the user, so the list is made anew by each call.

    Args:
        module: a module whose tensors are dense (strided).
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def tensors(self) -> list[Tensor]:
        """Return views (one-dimensional each) that together cover every parameter and buffer once."""
        return [piece for _, tensor in self._named() for piece in _pieces(tensor)]

    def buffers(self) -> list[Tensor]:
        """Return the same views for the buffers alone."""
        return [piece for buffer in self._module.buffers() for piece in _pieces(buffer)]

    def layout(self) -> int:
        """Return a number that two replicas share if their tensors have equal names, dtypes, shapes and strides."""
        lines = [
            (name, str(tensor.dtype), [(n, s) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n != 1])
            for name, tensor in self._named()
        ]
        return zlib.crc32(repr(lines).encode())

    def digest(self) -> int:
        """Return a 63-bit hash of every bit of the replica: equal replicas have equal digests."""
        hashed = hashlib.sha1(usedforsecurity=False)  # the fastest one at hand
        for piece in self.tensors():
            hashed.update(piece.cpu().view(torch.uint8).numpy().data)
        return int.from_bytes(hashed.digest()[:8], "big") >> 1

    def state(self, own: "Snapshot | None" = None) -> dict[str, Any]:
        """Return the values, to :meth:`load` them into the same model elsewhere.

        Args:
            own: where the values are while the module holds other ones.
        """
        return {"layout": self.layout(), "tensors": self.tensors() if own is None else own.values()}

    def load(self, state: dict[str, Any]) -> None:
        """Write the values that :meth:`state` returned into the module.

        Raises:
            ValueError: if they are of another model.
        """
        if state["layout"] != self.layout():
            raise ValueError(
                "To resume exactly, the model must have the parameters and buffers that it had when it was saved, and "
                'they differ in name, dtype, shape or memory format; `checkpoint="consensus"` goes on without.'
            )
        with torch.no_grad():
            torch._foreach_copy_(self.tensors(), state["tensors"])

    def snapshot(self) -> "Snapshot":
        """Return a copy to :meth:`Snapshot.restore` later."""
        tensors = self.tensors()
        return Snapshot(tensors, first_buffer=len(tensors) - len(self.buffers()))

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in chain(self._module.named_parameters(), self._module.named_buffers()):
            if is_lazy(tensor):
                raise ValueError(f"All parameters must have a shape before `fit`, and the lazy `{name}` has none yet.")
            if tensor.layout != torch.strided:
                raise ValueError(f"Only dense tensors can be averaged, and `{name}` has the layout {tensor.layout}.")
            yield name, tensor


class Snapshot:
    """A copy of a replica's values, to be put back after the module has held other ones.

    What the user writes into a *buffer* meanwhile (a counter of validation batches, say) is kept as it is without us.
    """

    def __init__(self, tensors: list[Tensor], first_buffer: int) -> None:
        self._tensors = tensors
        self._values = [tensor.clone() for tensor in tensors]
        self._first_buffer = first_buffer
        self._versions: list[int] | None = None

    def mark(self) -> None:
        """Take note that the values now in the module are ours: later writes are the user's."""
        self._versions = [tensor._version for tensor in self._tensors]

    def values(self) -> list[Tensor]:
        """Return the values that :meth:`restore` would leave in the module."""
        kept = set(self._mine())
        return [self._values[i] if i in kept else tensor for i, tensor in enumerate(self._tensors)]

    def restore(self) -> None:
        """Put the values back, but for buffers that were written since :meth:`mark`."""
        mine = self._mine()
        with torch.no_grad():
            torch._foreach_copy_([self._tensors[i] for i in mine], [self._values[i] for i in mine])

    def _mine(self) -> list[int]:
        return [
            i
            for i, tensor in enumerate(self._tensors)
            if i < self._first_buffer or self._versions is None or tensor._version == self._versions[i]
        ]


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Yield one-dimensional views that cover the memory of ``tensor`` once, whatever its memory format."""
    view = tensor.detach()
    if view.is_complex():
        view = torch.view_as_real(view)
    if view.is_contiguous():  # by far the most
        yield view.view(-1)
        return
    for dim, (size, stride) in enumerate(zip(view.shape, view.stride(), strict=True)):
        if stride == 0 and size > 1:  # expanded: all these elements are one
            view = view.narrow(dim, 0, 1)
    strides = view.stride()
    view = view.permute(sorted(range(view.ndim), key=lambda dim: -strides[dim]))
    if view.is_contiguous():
        yield view.view(-1)
    else:  # a slice of a larger tensor
        for row in view:
            yield from _pieces(row)
