"""A user's script in which one rank fails: ``python -m tests.faulty START WHERE WHO FOLDER``.

It trains in one round that does not end. Every process that takes part leaves its pid in the folder, and the failing
one the time at which it failed.
"""

import os
import sys
import time
import warnings
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from lightning_localsgd import LocalSGDStrategy
from tests.models import Regression, batch, rank, trainer

MANY = 100_000


class Fault:
    """Fails at one place, on one rank."""

    def __init__(self, where, who, folder):
        self.where, self.who, self.folder = where, who, Path(folder)

    def takes_part(self):
        (self.folder / f"{os.getpid()}.pid").touch()

    def __call__(self, where, rank):
        if where == self.where and rank == self.who:
            (self.folder / "failed").write_text(str(time.time()))
            raise ZeroDivisionError(f"on purpose, in {where}")


class Numbers(Dataset):
    """Batches that come slowly; loading the 31st may be the fault."""

    def __init__(self, fault, owner, length):
        self.fault, self.owner, self.length = fault, owner, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.fault.takes_part()
        if index == 30:
            self.fault("loader", self.owner)
        time.sleep(0.01)
        return batch(self.owner, index % 100)


class Faulty(Regression):
    def __init__(self, fault):
        super().__init__()
        self.fault = fault

    def train_dataloader(self):
        length = 10 if self.fault.where == "waits" and rank() == self.fault.who else MANY
        workers = 2 if self.fault.where == "loader" else 0
        return DataLoader(Numbers(self.fault, rank(), length), batch_size=None, num_workers=workers)

    def val_dataloader(self):
        return DataLoader(Numbers(self.fault, rank(), MANY), batch_size=None)

    def training_step(self, batch, batch_idx):
        self.fault.takes_part()
        if batch_idx == 30:
            self.fault("training_step", rank())
        if batch_idx == 50:
            (self.fault.folder / "running").touch()
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        if batch_idx == 3:
            self.fault("validation", rank())
        super().validation_step(batch, batch_idx)


def main(start, where, who, folder):
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    strategy = LocalSGDStrategy(period=MANY, start_method="popen" if start == "torchrun" else start)
    validate = {"val_check_interval": 20} if where == "validation" else {"limit_val_batches": 0}
    trainer(2, strategy, num_sanity_val_steps=0, **validate).fit(Faulty(Fault(where, int(who), folder)))


if __name__ == "__main__":
    main(*sys.argv[1:])
