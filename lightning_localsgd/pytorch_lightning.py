"""WHERE in `pytorch_lightning`: the same strategy and callback for the Trainer of that name, and the registration."""

from types import FunctionType
from typing import TYPE_CHECKING, Any

from lightning_fabric.plugins import CheckpointIO, ClusterEnvironment
from pytorch_lightning import Callback
from pytorch_lightning.accelerators import Accelerator
from pytorch_lightning.plugins import Precision
from pytorch_lightning.strategies import DDPStrategy, StrategyRegistry

from lightning_localsgd.monitor import Monitor
from lightning_localsgd.strategy import LocalSGD


def _with_types(function: FunctionType, **types: Any) -> FunctionType:
    """Return the function with other annotations for these arguments: they are what LightningCLI offers."""
    code, closure = function.__code__, function.__closure__
    copy = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__annotations__ = function.__annotations__ | types
    return copy


class LocalSGDStrategy(LocalSGD, DDPStrategy):  # type: ignore[misc]  # to mypy `LocalSGD` is of `lightning`
    """The same :class:`lightning_localsgd.LocalSGDStrategy`, for a ``pytorch_lightning.Trainer``.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(strategy=LocalSGDStrategy(period=8), accelerator="cpu", devices=1, logger=False)
    """

    _made_for = "`pytorch_lightning`; for `lightning` take `lightning_localsgd.LocalSGDStrategy`"

    if not TYPE_CHECKING:
        __init__ = _with_types(
            LocalSGD.__init__,
            accelerator=Accelerator | None,
            cluster_environment=ClusterEnvironment | None,
            checkpoint_io=CheckpointIO | None,
            precision_plugin=Precision | None,
        )


class LocalSGDMonitor(Monitor, Callback):  # type: ignore[misc]
    """The same :class:`lightning_localsgd.LocalSGDMonitor`, for a ``pytorch_lightning.Trainer``."""


LocalSGDStrategy.register_strategies(StrategyRegistry)  # `Trainer(strategy="localsgd")`
