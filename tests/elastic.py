"""What torchrun starts with as many workers as there are: ``python -m tests.elastic FOLDER``; notes the samples."""

import logging
import os
import sys
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_localsgd import LocalSGDStrategy
from tests.models import trainer
from tests.test_rest import Ids, Notes
from tests.versions import WEIGHTS_ONLY

SAMPLES, BATCH, PERIOD = 403, 4, 4


class Tells(Callback):
    """Writes down of each batch by how many workers, at which step, in which epoch, and of which samples it was."""

    def __init__(self, folder):
        self.batches, self.path = 0, Path(folder, f"{time.time()}-{os.getpid()}")

    def on_train_batch_end(self, trainer, pl_module, *_):
        last = pl_module.seen[-1]
        with self.path.open("a") as file:
            print(trainer.world_size, trainer.global_step, last.epoch, *last.ids, file=file)
        self.batches += 1
        alone = trainer.world_size == 1 and self.batches > 10
        time.sleep(0.5 if alone else 0.02)  # until another one comes


def main(folder):
    """Train for an epoch, from the newest checkpoint if there is one, and save at the end of each round."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    found = sorted(Path(folder, "saves").glob("*.ckpt"), key=os.path.getmtime)
    Path(folder, "ids").mkdir(exist_ok=True)
    saver = ModelCheckpoint(Path(folder, "saves"), "{step}", save_top_k=-1, every_n_train_steps=PERIOD)
    run = trainer(
        1,
        LocalSGDStrategy(PERIOD),
        num_nodes=int(os.environ["GROUP_WORLD_SIZE"]),
        callbacks=[Tells(Path(folder, "ids")), saver],
        enable_checkpointing=True,
        use_distributed_sampler=True,
    )
    resume = {"ckpt_path": found[-1]} | WEIGHTS_ONLY if found else {}
    run.fit(Notes(), DataLoader(Ids(SAMPLES), BATCH, shuffle=True), **resume)


if __name__ == "__main__":
    main(sys.argv[1])
