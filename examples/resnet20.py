"""Two workers train ResNet-20 as in the paper: CIFAR-10 where it can be had, else smaller images, half a minute.

Run ``python examples/resnet20.py``; ``--period`` is the paper's I, which was 1, 4, 8, 16 and 32. CIFAR-10 needs
torchvision and, once, a network (``pip install 'lightning-localsgd[cifar]'``); without them the images are the
handwritten digits that ship with scikit-learn, and the program says so. It ends with the accuracy on images that were
held out, and with digits fails below 95 %.
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_localsgd import LocalSGDStrategy

Batch = tuple[Tensor, Tensor]  # images (b, 3, h, w), classes (b,)
FOLDER = Path.home() / ".cache" / "lightning-localsgd"  # of what is downloaded


class Data(NamedTuple):
    """Images of 10 classes, of 3 channels, with mean 0 and standard deviation 1."""

    train: TensorDataset
    test: TensorDataset


def cifar10(download: bool = True) -> Data:
    """Return CIFAR-10; raises OSError, RuntimeError or ImportError where it cannot be had."""
    from torchvision.datasets import CIFAR10  # an extra, which may be missing or made for another torch

    parts = [CIFAR10(FOLDER, train=train, download=download) for train in (True, False)]
    images = [torch.from_numpy(part.data).permute(0, 3, 1, 2).float() for part in parts]
    return _standardized(images, [torch.tensor(part.targets) for part in parts])


def digits(download: bool = True) -> Data:
    """Return the digits of scikit-learn, which are never downloaded: every fifth is for testing."""
    from sklearn.datasets import load_digits  # an extra

    pixels, labels = (torch.tensor(of) for of in load_digits(return_X_y=True))
    images = functional.interpolate(pixels.float().view(-1, 1, 8, 8), scale_factor=2, mode="bilinear")
    images = images.expand(-1, 3, -1, -1).contiguous()
    tests = torch.arange(len(labels)) % 5 == 4
    return _standardized([images[~tests], images[tests]], [labels[~tests], labels[tests]])


def _standardized(images: Sequence[Tensor], labels: Sequence[Tensor]) -> Data:
    std, mean = torch.std_mean(images[0], (0, 2, 3), keepdim=True)
    return Data(*(TensorDataset((part - mean) / std, of) for part, of in zip(images, labels, strict=True)))


DIGITS = "scikit-learn's digits, 8 x 8 pixels enlarged to 16 x 16"
DATA: dict[str, Callable[[bool], Data]] = {"CIFAR-10": cifar10, DIGITS: digits}


def found(download: bool = True) -> str:
    """Return the name of the first data that can be had; where it may download, say why others cannot."""
    for name, load in DATA.items():
        try:
            load(download)
        except (ImportError, OSError, RuntimeError) as error:
            if download:
                print(f"{name} cannot be had here: {type(error).__name__}: {error}")
        else:
            return name
    raise SystemExit("no data: install scikit-learn or torchvision")


class Images(LightningDataModule):
    """The images above, dealt over the workers of one machine.

    Args:
        name: one of ``DATA``, or None for the first that can be had.
        batch_size: images in a batch of one worker.
    """

    def __init__(self, name: str | None = None, batch_size: int = 32) -> None:
        super().__init__()
        self.name = name
        self.batch_size = batch_size

    def prepare_data(self) -> None:  # by one process, before the others look
        if self.name is None:
            found()

    def setup(self, stage: str) -> None:
        self.name = self.name or found(download=False)
        self.data = DATA[self.name](False)

    def train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.data.train, self.batch_size, shuffle=True, drop_last=True)

    def test_dataloader(self) -> DataLoader[Batch]:
        assert self.trainer is not None
        sampler = UnrepeatedDistributedSampler(  # each image once, as in digits.py
            self.data.test, num_replicas=self.trainer.world_size, rank=self.trainer.global_rank, shuffle=False
        )
        return DataLoader(self.data.test, batch_size=256, sampler=sampler)


class Block(nn.Module):
    """Two convolutions and a shortcut around them: every other pixel, and zeros for the new channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride = outputs // inputs
        self.convolutions = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, self.stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.convolutions(x)
        shortcut = x[:, :, :: self.stride, :: self.stride]
        missing = y.shape[1] - x.shape[1]
        return functional.relu(y + functional.pad(shortcut, (0, 0, 0, 0, missing // 2, missing - missing // 2)))


class ResNet20(LightningModule):
    """ResNet-20 for small images (He et al. 2016): 0.27 million parameters, by plain SGD.

    Args:
        lr: the learning rate.
    """

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        widths = (16, 16, 16, 16, 32, 32, 32, 64, 64, 64)
        self.network = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            *(Block(inputs, outputs) for inputs, outputs in pairwise(widths)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        self.test_accuracy = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, classes = batch
        loss = functional.cross_entropy(self.network(images), classes)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        images, classes = batch
        self.test_accuracy(self.network(images), classes)
        self.log("test_accuracy", self.test_accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--workers", type=int, default=2, help="processes")
    options.add_argument("--period", type=int, default=8, help="steps between two averages, the paper's I")
    options.add_argument("--epochs", type=int, default=8, help="times that the training images are gone through")
    options.add_argument("--accelerator", default="cpu", help="as in Lightning's Trainer; one device for each worker")
    options.add_argument("--digits", action="store_true", help="take the digits even where CIFAR-10 can be had")
    options.add_argument("--at-least", type=float, default=0.95, help="accuracy with digits; with less it fails")
    options.add_argument("--seed", type=int, default=0, help="of the first model and the order of the images")
    args = options.parse_args()

    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the images are in memory
    seed_everything(args.seed)
    trainer = Trainer(
        accelerator=args.accelerator,
        devices=args.workers,
        strategy=LocalSGDStrategy(period=args.period),
        max_epochs=args.epochs,
        log_every_n_steps=10,
        logger=False,
        enable_checkpointing=False,
    )
    model, images = ResNet20(), Images(DIGITS if args.digits else None)
    trainer.fit(model, images)
    (result,) = trainer.test(model, images, verbose=False)

    if trainer.is_global_zero:
        accuracy = result["test_accuracy"]
        print(f"held-out test accuracy: {accuracy:.4f} on {len(images.data.test)} images of {images.name}")
        if images.name == DIGITS and accuracy < args.at_least:
            sys.exit(f"this is below {args.at_least}, which the example is meant to reach")


if __name__ == "__main__":
    main()
