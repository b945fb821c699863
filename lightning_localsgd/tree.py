"""WHICH TENSORS a module has: they are named anew only where something has been put into it or taken out."""

from itertools import chain
from operator import is_

from torch import Tensor, nn

Named = list[tuple[str, Tensor]]
_OWN = ("named_parameters", "named_buffers", "_named_members")  # that lead through the modules
_EACH = "named_modules"


class Tree:
    """The parameters and buffers of a module by name, which to walk through takes longer than to average many of them.

    A module's tensors and children are in three dictionaries. As long as all of these hold the same objects by the same
    names, so does the module.

    Args:
        module: a module; where it, or one in it, names its tensors in a way of its own, they are always named anew.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.forget()

    def forget(self) -> None:
        """Hold no tensor any more."""
        self._modules: list[nn.Module] = []
        self._sizes: list[int] = []  # of the dictionaries
        self._content: list[object] = []  # of them, end to end
        self._parameters: Named = []
        self._buffers: Named = []

    def look(self) -> tuple[Named, Named]:
        """Return the parameters and the buffers, in the module's order: the same lists as long as nothing changes."""
        if not self._modules or not self._is_as_it_was():
            self._walk()
        return self._parameters, self._buffers

    def _walk(self) -> None:
        self._parameters, self._buffers = list(self._module.named_parameters()), list(self._module.named_buffers())
        modules = list(self._module.modules())
        is_plain = all(_is_torchs(self._module, name) for name in _OWN) and all(_is_torchs(m, _EACH) for m in modules)
        self._modules = modules if is_plain else []
        self._sizes, self._content = self._now()

    def _is_as_it_was(self) -> bool:
        sizes, content = self._now()
        return sizes == self._sizes and all(map(is_, content, self._content))

    def _now(self) -> tuple[list[int], list[object]]:
        parts = [part for m in self._modules for part in (m._parameters, m._buffers, m._modules)]
        values = chain.from_iterable(part.values() for part in parts)
        return list(map(len, parts)), [*chain.from_iterable(parts), *values]


def _is_torchs(module: nn.Module, name: str) -> bool:
    return getattr(getattr(module, name), "__func__", None) is getattr(nn.Module, name)
