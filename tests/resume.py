"""Runs that are stopped and gone on from, and what they are held equal to: the run that was not."""

import hashlib
import logging
import os
import random
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, WeightedRandomSampler

from lightning_localsgd import LocalSGDStrategy, Mean
from tests.models import optimizer, trainer
from tests.versions import WEIGHTS_ONLY
from tests.workers import as_node


class Points(Dataset):
    """`size` points; `transform` draws random numbers for each. Notes which were loaded, in this process."""

    def __init__(self, size, transform=False):
        self.size, self.transform, self.loaded = size, transform, []

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.loaded.append(index)
        x = torch.randn(6, generator=torch.Generator().manual_seed(index))
        if self.transform:
            x = x + 0.1 * torch.randn(6) + 0.1 * float(np.random.rand()) + 0.1 * random.random()
        return x, torch.sin(3 * x.sum()).reshape(1)


class Stream(IterableDataset):
    """The same points one after another, without a length; keeps its place if `stateful`."""

    def __init__(self, size, stateful):
        self.size, self.at = size, 0
        if stateful:
            self.state_dict = lambda: {"at": self.at}
            self.load_state_dict = lambda state: setattr(self, "at", state["at"])

    def __iter__(self):
        while self.at < self.size:
            self.at += 1
            yield Points(self.size)[self.at - 1]
        self.at = 0


class Noisy(nn.Module):
    """Adds noise from each of the three generators."""

    def forward(self, x):
        return x + 0.01 * (torch.randn_like(x) + float(np.random.rand()) + random.random())


def network(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Linear(6, 8)]
        layers += {"plain": [], "norm": [nn.BatchNorm1d(8)], "noisy": [nn.Dropout(0.3), Noisy()]}[kind]
        return nn.Sequential(*layers, nn.Tanh(), nn.Linear(8, 1))


@dataclass
class Case:
    """A run of several workers, and where it is saved."""

    workers: int = 2
    period: Any = 4
    outer: Any = None
    optimizer_state: Any = "keep"
    pace: Any = "equal"
    optimizer: str = "adamw"
    kind: str = "noisy"
    manual: bool = False
    accumulate: int = 1
    batches: int = 7  # an epoch of each worker
    lengths: Any = None  # ... or of each one
    epochs: int = 3
    options: dict[str, Any] = field(default_factory=dict)  # of the trainer
    data: dict[str, Any] = field(default_factory=lambda: {"shuffle": True})  # of the loader
    transform: bool = False
    stream: Any = None  # "stateful" or "plain"
    scheduler: Any = None
    bucket_mb: float = 64.0
    mean: Mean = field(default_factory=Mean)
    checkpoint: str = "exact"
    devices: int = 0  # of a node, where nodes are the replicas


def model_of(case):
    from lightning.pytorch import LightningModule

    class Model(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network(case.kind)
            self.automatic_optimization = not case.manual
            self.register_buffer("seen", torch.zeros(1), persistent=False)

        def loss(self, batch):
            x, y = batch
            return ((self.net(x) - y) ** 2).mean()

        def training_step(self, batch, batch_idx):
            if isinstance(batch, dict):
                batch = tuple(torch.cat(parts) for parts in zip(*batch.values(), strict=True))
            self.seen += 1
            loss = self.loss(batch)
            self.log("train_loss", loss.detach(), on_step=False, on_epoch=True)
            if self.automatic_optimization:
                return loss
            first, second = self.optimizers()
            first.zero_grad()
            self.manual_backward(loss)
            first.step()
            if batch_idx % 2:
                second.zero_grad()
                self.manual_backward(self.loss(batch))
                second.step()
            return None

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.loss(batch) + torch.rand(()), sync_dist=True)

        def configure_optimizers(self):
            if case.manual:
                return [optimizer(case.optimizer, self.net[i].parameters()) for i in (0, -1)]
            made = optimizer(case.optimizer, self.parameters())
            if case.scheduler is not None and case.scheduler.startswith("plateau"):
                monitor = case.scheduler.removeprefix("plateau on ") if "on" in case.scheduler else "val_loss"
                plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(made, patience=0, threshold=10.0)
                return {
                    "optimizer": made,
                    "lr_scheduler": {"scheduler": plateau, "monitor": monitor},
                }
            if case.scheduler == "step":
                step = torch.optim.lr_scheduler.StepLR(made, 3, 0.7)
                return {"optimizer": made, "lr_scheduler": {"scheduler": step, "interval": "step"}}
            return made

    return Model()


def loader_of(case):
    batches = case.batches if case.lengths is None else case.lengths[int(os.environ["LOCAL_RANK"])]
    if case.stream:
        from torchdata.stateful_dataloader import StatefulDataLoader

        kind = StatefulDataLoader if case.stream == "stateful" else DataLoader
        return kind(Stream(2 * batches, case.stream == "stateful"), batch_size=2, **case.data)
    if case.data.get("stateful"):
        from torchdata.stateful_dataloader import StatefulDataLoader

        options = {key: value for key, value in case.data.items() if key != "stateful"}
        return StatefulDataLoader(Points(2 * batches, case.transform), batch_size=2, **options)
    if "combined" in case.data:
        short, long = (DataLoader(Points(2 * size, case.transform), 2, shuffle=True) for size in (3, batches))
        return CombinedLoader({"a": short, "b": long}, case.data["combined"])
    if "and stream" in case.data:
        map_style = DataLoader(Points(2 * batches, case.transform), 2, shuffle=True)
        return {"a": map_style, "b": loader_of(replace(case, stream="stateful", data={}))}
    if "weighted" in case.data:
        weights = [1.0 + index for index in range(2 * batches)]
        points = Points(len(weights), case.transform)
        generator = torch.Generator().manual_seed(7)
        return DataLoader(points, 2, sampler=WeightedRandomSampler(weights, len(weights), generator=generator))
    if "generator" in case.data:
        generator = torch.Generator().manual_seed(7)
        points = Points(2 * batches, case.transform)
        return DataLoader(points, batch_size=2, sampler=RandomSampler(points, generator=generator))
    return DataLoader(Points(2 * batches, case.transform), batch_size=2, **case.data)


def digest(module, optimizers):
    """Return a digest of all weights, buffers and optimizer states."""
    hashed = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            hashed.update(repr((str(value.dtype), tuple(value.shape))).encode())
            hashed.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key, item in value.items():
                hashed.update(repr(key).encode())
                add(item)
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            hashed.update(repr(value).encode())

    add(dict(module.named_parameters()) | dict(module.named_buffers()))
    add([one.state_dict() for one in optimizers])
    return hashed.hexdigest()[:16]


class Digests(Callback):
    """Keeps a digest after each batch, by the number of batches since the start of the run."""

    def __init__(self):
        self.by_batch = {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.by_batch[trainer.fit_loop.total_batch_idx + 1] = digest(pl_module, trainer.optimizers)

    def on_train_end(self, trainer, pl_module):
        self.by_batch["end"] = digest(pl_module, [])


def run(case, folder=None, saver=None, resume=None, callbacks=()):
    """Fit; return this worker's digests, those after the fit, and what its loader loaded.

    Args:
        case: what to run.
        folder: where a ModelCheckpoint with the options ``saver`` saves.
        saver: its options, or None for a run that is not saved.
        resume: the checkpoint to go on from.
        callbacks: more of them.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    as_node(case.devices or case.workers)
    seed = 5 if resume else int(os.environ["LOCAL_RANK"])  # another one after a resume, which must not matter
    torch.manual_seed(100 + seed)
    np.random.seed(200 + seed)
    random.seed(300 + seed)
    digests = Digests()
    callbacks = [digests, *callbacks]
    if saver is not None:
        callbacks.append(ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **saver))
    model, loader = model_of(case), loader_of(case)
    strategy = LocalSGDStrategy(
        case.period,
        mean=replace(case.mean, bucket_mb=case.bucket_mb),
        outer=case.outer,
        optimizer_state=case.optimizer_state,
        replica="node" if case.devices else "device",
        pace=case.pace,
        checkpoint=case.checkpoint,
    )
    options = {"max_epochs": case.epochs, "num_sanity_val_steps": 0} | case.options
    validates = any("val" in name for name in case.options)
    fit = trainer(
        case.devices or case.workers,
        strategy,
        num_nodes=case.workers // case.devices if case.devices else 1,
        callbacks=callbacks,
        enable_checkpointing=saver is not None,
        accumulate_grad_batches=case.accumulate,
        **options,
    )
    val = DataLoader(Points(4), batch_size=2) if validates else None
    fit.fit(model, loader, val, ckpt_path=resume, **(WEIGHTS_ONLY if resume else {}))
    loaded = getattr(loader.dataset, "loaded", None) if isinstance(loader, DataLoader) else None
    return digests.by_batch, digest(model, []), loaded


def later(digests, batch):
    """Return the digests from ``batch`` on."""
    return {key: value for key, value in digests.items() if key == "end" or key >= batch}


def go_on(case, folder, saver, other=None):
    """Fit with checkpoints, then go on from each of them; return what differs, and what was said.

    Returns:
        For each checkpoint its step, the batches after which this worker's digests differ from those of the run that
        was not stopped, and the warnings of the resume.
    """
    digests, end, _ = run(case, folder, saver)
    if dist.is_initialized():
        dist.barrier()  # until the last file is there
    files = sorted(Path(folder).glob("*.ckpt"), key=os.path.getmtime)
    assert len(files) > 1
    found = []
    for file in files[:-1]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            again, again_end, loaded = run(case if other is None else other, resume=str(file))
        numbers = [key for key in again if key != "end"]
        expected = later(digests, min(numbers)) if numbers else {key: digests[key] for key in again}
        differ = [key for key in expected.keys() | again.keys() if expected.get(key) != again.get(key)]
        differ += [] if end == again_end else ["after"]
        said = [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
        said = [text for text in said if "exactly" in text or "new round" in text or "not resumable" in text]
        found.append(Found(file.stem, min(numbers, default=None), differ, said, loaded))
    return found


class Found(NamedTuple):
    """What was found when a run went on from one checkpoint."""

    file: str
    first: int | None  # batch after the resume
    differ: list[Any]
    said: list[str]
    loaded: list[int] | None
