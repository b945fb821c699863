"""What runs in a job that is interrupted: digits, at a pace of each worker's own, and what the test is told of it."""

import os
import time
from pathlib import Path

from lightning.pytorch import Callback

from examples.digits import Digits
from tests.resume import digest


class Skewed(Digits):
    """Takes so many seconds in each step, and in each validation step.

    Args:
        seconds: of each rank's.
        validation: of all ranks' validation steps.
    """

    def __init__(
        self,
        seconds: list[float],
        validation: float = 0.0,
        width: int = 8,
        lr: float = 0.01,
        weight_decay: float = 0.05,
    ) -> None:
        super().__init__(width, lr, weight_decay)
        self.seconds, self.validation = seconds, validation

    def training_step(self, batch, batch_idx):
        time.sleep(self.seconds[self.global_rank])
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        time.sleep(self.validation)
        super().validation_step(batch, batch_idx)


class Tells(Callback):
    """Leaves files in ``folder``: who runs, since when it trains, at which step it is, and what came of it."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.turn = os.environ.get("SLURM_RESTART_COUNT") or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.rank = next(
            (os.environ[name] for name in ("SLURM_PROCID", "RANK", "LOCAL_RANK") if name in os.environ), "0"
        )
        self._tell("pid", os.getpid())  # while the trainer is made, before or after the strategy

    def _tell(self, what, value):
        path = self.folder / f"{what}-{self.turn}-{self.rank}"
        path.with_suffix(".new").write_text(str(value))
        path.with_suffix(".new").rename(path)

    def on_train_start(self, *_):
        self._tell("trains", time.time())

    def on_train_batch_end(self, trainer, *_):
        self._tell("step", trainer.fit_loop.total_batch_idx)

    def on_fit_end(self, trainer, pl_module):
        (self.folder / f"digest-{self.rank}").write_text(digest(pl_module, []))
