"""Parallel restarted SGD for PyTorch Lightning: workers train alone for a round, then agree on one model."""

from importlib.metadata import version as _version

from lightning.pytorch.strategies import StrategyRegistry

from lightning_localsgd.adaptive import QSR as QSR
from lightning_localsgd.adaptive import AdaComm as AdaComm
from lightning_localsgd.adaptive import CommBudget as CommBudget
from lightning_localsgd.adaptive import DriftLimit as DriftLimit
from lightning_localsgd.checkpoint import adopt_replica as adopt_replica
from lightning_localsgd.mean import Mean as Mean
from lightning_localsgd.moments import AverageState as AverageState
from lightning_localsgd.monitor import LocalSGDMonitor as LocalSGDMonitor
from lightning_localsgd.outer import DiLoCo as DiLoCo
from lightning_localsgd.outer import Outer as Outer
from lightning_localsgd.outer import SlowMo as SlowMo
from lightning_localsgd.pace import Proportional as Proportional
from lightning_localsgd.progress import Progress as Progress
from lightning_localsgd.rounds import Round as Round
from lightning_localsgd.schedule import AtEnd as AtEnd
from lightning_localsgd.schedule import Epochs as Epochs
from lightning_localsgd.schedule import Every as Every
from lightning_localsgd.schedule import EveryEpoch as EveryEpoch
from lightning_localsgd.schedule import PostLocal as PostLocal
from lightning_localsgd.schedule import Schedule as Schedule
from lightning_localsgd.schedule import Stages as Stages
from lightning_localsgd.sequences import Corollary as Corollary
from lightning_localsgd.sequences import Listed as Listed
from lightning_localsgd.sequences import RoundLR as RoundLR
from lightning_localsgd.sequences import Sequences as Sequences
from lightning_localsgd.sequences import TimeVarying as TimeVarying
from lightning_localsgd.spread import Spread as Spread
from lightning_localsgd.strategy import LocalSGDStrategy as LocalSGDStrategy

__version__ = _version("lightning-localsgd")  # which pyproject.toml says

LocalSGDStrategy.register_strategies(StrategyRegistry)  # `Trainer(strategy="localsgd")`
