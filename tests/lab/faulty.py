"""A training on two hosts that tells when it is in the phase in which the test has something fail, and stays there."""

import os
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_localsgd import LocalSGDStrategy
from lightning_localsgd.checkpoint import AtomicCheckpointIO
from tests.resume import digest

PERIOD, STEPS = 4, 24
PHASES = ("start", "local step", "average", "save", "validation")


class Told:
    """Leaves a file when this rank is in the phase, once, and stays there for a while."""

    def __init__(self, folder: Path, phase: str, rank: int) -> None:
        self.folder, self.phase, self.rank = folder, phase, rank

    def __call__(self, phase: str, stays: float) -> None:
        path = self.folder / f"there-{self.rank}"
        if phase == self.phase and not path.exists():
            path.touch()
            time.sleep(stays)


class SlowIO(AtomicCheckpointIO):
    """Takes its time to save."""

    def __init__(self, told: Told) -> None:
        self.told = told

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.told("save", 0 if self.told.rank else 1)
        super().save_checkpoint(checkpoint, path, storage_options)


class Model(LightningModule):
    """Of 2 MB, so that an average takes a while on a link of 10 Mbit/s."""

    def __init__(self, told: Told) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(64, 1000), nn.ReLU(), nn.Linear(1000, 432))
        self.told = told

    def training_step(self, batch, batch_idx):
        if batch_idx == 9:
            self.told("local step", 1)
        if batch_idx == 11:  # the last one of the third round
            self.told("average", 0)
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.told("validation", 1)
        self.log("loss", self.net(batch[0]).square().mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Saving(Callback):
    """Tells of the worker's part of a checkpoint, which another rank than the file's writes."""

    def __init__(self, told: Told) -> None:
        self.told = told

    def on_save_checkpoint(self, *_):
        self.told("save", 0.5)


def train(folder: Path, phase: str, rank: int, saves: Path, timeout: float, workers: int, resume: str | None) -> None:
    """Train as this rank of two, by hand: address, port and rank are in the environment."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    told = Told(folder, phase, rank)
    told("start", 1)
    data = TensorDataset(torch.randn(2 * 4 * STEPS, 64, generator=torch.Generator().manual_seed(1)))
    strategy = LocalSGDStrategy(PERIOD, checkpoint="exact", timeout=timedelta(seconds=timeout))
    strategy.checkpoint_io = SlowIO(told)
    trainer = Trainer(
        accelerator="cpu", devices=1, num_nodes=workers, strategy=strategy, max_epochs=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, val_check_interval=14,
        callbacks=[ModelCheckpoint(saves, every_n_train_steps=6, save_top_k=-1, filename="{step}"), Saving(told)],
    )  # fmt: skip
    model = Model(told)
    trainer.fit(model, DataLoader(data, 4), DataLoader(data, 96), ckpt_path=resume)
    (folder / f"digest-{rank}").write_text(digest(model, []))


def process(enter, namespace: str, log: str, env: dict[str, str], given: dict) -> None:
    """Become this rank on its host."""
    enter(namespace)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update(env)
    train(**given)
