"""WHO ELSE TALKS: the collectives of Lightning and torchmetrics inside `fit`, each behind a header.

If all ranks ask for the same one it is done as Lightning does it. If some rank is elsewhere (its data has ended, say),
it is done for those who ask: the others stand in with values that change nothing.
"""

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ReduceOp
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_localsgd.header import Decision, Want

_DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
_OPERATIONS = {
    "sum": ReduceOp.SUM,
    "mean": ReduceOp.SUM,
    "max": ReduceOp.MAX,
    "min": ReduceOp.MIN,
    "product": ReduceOp.PRODUCT,
}


class Collectives:
    """Lightning's collectives for those who ask, with the other ranks standing in.

    Args:
        ask: sends headers until a want is served; from the strategy.
        device: where tensors must be to travel.
    """

    def __init__(self, ask: Callable[[Want, int], Decision], device: torch.device) -> None:
        self._ask = ask
        self._device = device

    def broadcast(self, value: Any, src: int) -> Any:
        """Return the value of rank ``src``, or of the first rank that asks if ``src`` is elsewhere."""
        return self._broadcast(self._ask(Want.BROADCAST, src), value)

    def reduce(self, tensor: Tensor, operation: Any, everyone: Callable[[], Tensor]) -> tuple[Tensor, int]:
        """Return ``tensor`` reduced over the ranks that ask, and their number; ``everyone()`` if all ask."""
        name = _operation(operation)
        detail = tensor.numel() << 8 | _code(tensor.dtype) << 3 | list(_OPERATIONS).index(name)
        decision = self._ask(Want.REDUCE, detail)
        if decision.unanimous:
            return everyone(), decision.size
        dist.all_reduce(tensor, _OPERATIONS[name])
        count = len(decision.askers)
        if name == "mean":
            tensor.copy_(tensor / count)
        return tensor, count

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks that ask, which may differ in size."""
        return self._gather(self._ask(Want.GATHER, tensor.ndim << 4 | _code(tensor.dtype)), tensor)

    def stand_in(self, decision: Decision) -> None:
        """Take part, without changing the result, in a collective that others asked for."""
        if decision.want is Want.BROADCAST:
            self._broadcast(decision, None)
        elif decision.want is Want.REDUCE:
            numel, dtype = decision.detail >> 8, _DTYPES[decision.detail >> 3 & 31]
            name = list(_OPERATIONS)[decision.detail & 7]
            dist.all_reduce(
                torch.full((numel,), _neutral(name, dtype), dtype=dtype, device=self._device), _OPERATIONS[name]
            )
        elif decision.want is Want.GATHER:
            dtype = _DTYPES[decision.detail & 15]
            self._gather(decision, torch.zeros([0] * (decision.detail >> 4), dtype=dtype, device=self._device))

    def _broadcast(self, decision: Decision, value: Any) -> Any:
        src = decision.detail if decision.detail in decision.askers else decision.askers[0]
        box = [value]
        dist.broadcast_object_list(box, src)
        return box[0]

    def _gather(self, decision: Decision, tensor: Tensor) -> list[Tensor]:
        gathered: Sequence[Tensor] = gather_all_tensors(tensor)
        return [gathered[rank] for rank in decision.askers]


class MetricSync:
    """A ``dist_sync_fn`` that lets the metrics of a module gather their states through :class:`Collectives`.

    Copies of a metric share it, and a pickled metric forgets it.
    """

    def __init__(self, gather: Callable[[Tensor], list[Tensor]]) -> None:
        self._gather = gather

    def __call__(self, tensor: Tensor, group: Any = None) -> list[Tensor]:
        if group not in (None, dist.group.WORLD):
            return gather_all_tensors(tensor, group)
        return self._gather(tensor)

    def __deepcopy__(self, memo: object) -> "MetricSync":
        return self

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _no_sync_function, ()

    def attach(self, module: torch.nn.Module) -> Callable[[], None]:
        """Give all metrics in ``module`` that have none this function; return what takes it away again."""
        metrics = [child for child in module.modules() if isinstance(child, Metric) and child.dist_sync_fn is None]
        for metric in metrics:
            metric.dist_sync_fn = self

        def detach() -> None:
            for metric in metrics:
                metric.dist_sync_fn = None

        return detach


class StepWarning:
    """Warns once when something makes every training step wait for the others, and names it."""

    def __init__(self) -> None:
        self._said = False

    def __call__(self) -> None:
        """Look at who called, and say so if it is a cause that comes back at every step."""
        if self._said:
            return
        cause = _cause()
        if cause:
            self._said = True
            warnings.warn(
                f"{cause} makes the workers wait for each other at every training step, which `LocalSGDStrategy` "
                "otherwise leaves free of communication.",
                stacklevel=2,
            )


def _cause() -> str | None:
    """Return the name of what in the calling code comes back at every step, if anything does."""
    frame = sys._getframe(2)
    while frame is not None:
        name, owner = frame.f_code.co_name, frame.f_locals.get("self")
        if _is(owner, "LightningModule") and name == "log":
            return f"`self.log({frame.f_locals['name']!r}, on_step=True, sync_dist=True)`"
        if _is(owner, "Timer") and name == "on_train_batch_end":
            return "`Trainer(max_time=...)`, or a `Timer` with `interval='step'`,"
        if _is(owner, "ModelCheckpoint"):
            return "`ModelCheckpoint(train_time_interval=...)`" if name == "on_train_batch_end" else None
        if isinstance(owner, Metric) and owner.dist_sync_on_step and name == "forward":
            return f"`{type(owner).__name__}(dist_sync_on_step=True)`"
        if _is(owner, "Strategy") and name == "training_step":
            return "A collective in `training_step`"
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _is(owner: object, name: str) -> bool:
    """Return whether this is Lightning's class of that name, in whichever of its two packages."""
    return any(
        base.__name__ == name and base.__module__.startswith(("lightning.pytorch.", "pytorch_lightning."))
        for base in type(owner).__mro__
    )


def _code(dtype: torch.dtype) -> int:
    if dtype not in _DTYPES:
        raise ValueError(f"Values that are reduced or gathered inside `fit` must be real numbers, got {dtype}.")
    return _DTYPES.index(dtype)


def _operation(operation: Any) -> str:
    name = operation.lower() if isinstance(operation, str) else None
    if name == "avg" or operation == ReduceOp.AVG:
        name = "mean"
    for known, op in _OPERATIONS.items():
        if known == name or (name is None and op == operation):
            return known
    raise ValueError(f"`reduce_op` must be one of {', '.join(_OPERATIONS)} inside `fit`, got {operation!r}.")


def _neutral(name: str, dtype: torch.dtype) -> float | int:
    if name in ("sum", "mean"):
        return 0
    if name == "product":
        return 1
    if dtype == torch.bool:
        return name == "min"
    if dtype.is_floating_point:
        return -torch.inf if name == "max" else torch.inf
    limits = torch.iinfo(dtype)
    return limits.min if name == "max" else limits.max


def _no_sync_function() -> None:
    return None
