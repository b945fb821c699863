"""Two workers train a GAN on handwritten digits: manual optimization, two optimizers, half a minute on the CPU.

Run ``python examples/gan.py``. At the end of a round generator and discriminator are averaged together, since both are
the module's parameters; each worker's optimizers keep their own moments. It ends with digits that it has drawn and with
how far these are from held-out images (Fréchet distance, by a torchmetrics that takes it of small images), and fails
above 6.
"""

import argparse
import sys
import warnings

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.image.fid import FrechetInceptionDistance

from lightning_localsgd import LocalSGDStrategy

Batch = list[Tensor]  # of one element: images (b, 64), in -1 to 1
PIXELS = 64  # 8 x 8
SHADES = " .:-=+*#%@"


class DigitImages(LightningDataModule):
    """scikit-learn's handwritten digits without their labels: 1,198 to learn from, every third held out.

    Args:
        batch_size: images in a batch of one worker.
    """

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        images = torch.tensor(load_digits().data, dtype=torch.float32) / 8 - 1
        held_out = torch.arange(len(images)) % 3 == 2
        self.train, self.test = TensorDataset(images[~held_out]), TensorDataset(images[held_out])

    def train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def test_dataloader(self) -> DataLoader[Batch]:
        assert self.trainer is not None
        sampler = UnrepeatedDistributedSampler(  # each image once, as in digits.py
            self.test, num_replicas=self.trainer.world_size, rank=self.trainer.global_rank, shuffle=False
        )
        return DataLoader(self.test, batch_size=256, sampler=sampler)


class Pixels(nn.Module):
    """What the Fréchet distance compares: usually the features of an Inception network, here the pixels themselves."""

    num_features = PIXELS

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).double()


class GAN(LightningModule):
    """A generator that draws digits, and a discriminator that tells them from real ones.

    The losses are the original ones, the generator's in its form that does not saturate (Goodfellow et al. 2014).

    Args:
        noise: numbers from which a digit is drawn.
        width: of the layers.
        lr: the learning rate of both.
    """

    def __init__(self, noise: int = 32, width: int = 256, lr: float = 5e-4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(noise, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, PIXELS),
            nn.Tanh(),
        )
        self.discriminator = nn.Sequential(
            nn.Linear(PIXELS, width),
            nn.LeakyReLU(0.2),
            nn.Dropout(0.3),
            nn.Linear(width, width),
            nn.LeakyReLU(0.2),
            nn.Dropout(0.3),
            nn.Linear(width, 1),
        )
        self.distance = FrechetInceptionDistance(Pixels(), normalize=True, input_img_size=(1, 8, 8))

    def forward(self, number: int) -> Tensor:
        """Return ``number`` drawings, (number, PIXELS) in -1 to 1."""
        return self.generator(torch.randn(number, self.hparams.noise, device=self.device))

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        (real,) = batch
        for_generator, for_discriminator = self.optimizers()

        drawn = self(len(real))
        loss = softplus(-self.discriminator(real)).mean() + softplus(self.discriminator(drawn.detach())).mean()
        for_discriminator.zero_grad()
        self.manual_backward(loss)
        for_discriminator.step()

        loss_of_generator = softplus(-self.discriminator(drawn)).mean()
        for_generator.zero_grad()
        self.manual_backward(loss_of_generator)
        for_generator.step()

        self.log_dict({"discriminator": loss, "generator": loss_of_generator}, prog_bar=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        (real,) = batch
        self.distance.update(real, real=True)
        self.distance.update(self(len(real)), real=False)
        self.log("test_distance", self.distance)  # computed at the end, over the images of all workers

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        networks = (self.generator, self.discriminator)
        return [torch.optim.Adam(network.parameters(), self.hparams.lr, betas=(0.5, 0.999)) for network in networks]


def shown(images: Tensor) -> str:
    """Return images (n, PIXELS) side by side, two characters for each pixel."""
    shades = ((images + 1) / 2 * (len(SHADES) - 1)).round().int().view(-1, 8, 8)
    return "\n".join("    ".join("".join(SHADES[x] * 2 for x in image[y]) for image in shades) for y in range(8))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--workers", type=int, default=2, help="processes")
    options.add_argument("--period", type=int, default=8, help="steps between two averages")
    options.add_argument("--epochs", type=int, default=60, help="times that the images are gone through")
    options.add_argument("--at-most", type=float, default=6.0, help="Fréchet distance; with more it fails")
    options.add_argument("--seed", type=int, default=0, help="of the first model and the order of the images")
    args = options.parse_args()

    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the images are in memory
    seed_everything(args.seed)
    trainer = Trainer(
        accelerator="cpu",
        devices=args.workers,
        strategy=LocalSGDStrategy(period=args.period),
        max_epochs=args.epochs,
        log_every_n_steps=10,
        logger=False,
        enable_checkpointing=False,
    )
    model, images = GAN(), DigitImages()
    trainer.fit(model, images)
    (result,) = trainer.test(model, images, verbose=False)

    if trainer.is_global_zero:
        with torch.no_grad():
            print(shown(model.eval()(5)))
        distance = result["test_distance"]
        print(f"Fréchet distance to held-out images: {distance:.3f}")
        if distance > args.at_most:
            sys.exit(f"this is above {args.at_most}, which the example is meant to stay below")


if __name__ == "__main__":
    main()
