"""Parallel restarted SGD for PyTorch Lightning: workers train alone for a round, then agree on one model."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_localsgd.checkpoint import adopt_replica as adopt_replica
from lightning_localsgd.mean import Mean as Mean
from lightning_localsgd.schedule import Every as Every
from lightning_localsgd.schedule import Progress as Progress
from lightning_localsgd.schedule import Schedule as Schedule
from lightning_localsgd.strategy import LocalSGDStrategy as LocalSGDStrategy

LocalSGDStrategy.register_strategies(StrategyRegistry)  # `Trainer(strategy="localsgd")`
