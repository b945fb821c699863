"""A program for DDP, before and after: ``ddp.patch`` changes one line of it, and it trains by local SGD.

Run ``python examples/ddp.py``, then ``git apply examples/ddp.patch`` and run it again. It ends with the strategy, and
with the accuracy on held-out digits.
"""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy as Strategy
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        pixels, digits = batch
        return nn.functional.cross_entropy(self.net(pixels), digits)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        pixels, digits = batch
        right = (self.net(pixels).argmax(1) == digits).float().mean()
        self.log("accuracy", right, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main() -> None:
    seed_everything(0)
    pixels, digits = (torch.tensor(of) for of in load_digits(return_X_y=True))
    data = TensorDataset(pixels.float() / 16, digits)
    train, test = torch.utils.data.random_split(data, [0.8, 0.2])

    model = Classifier()
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=Strategy(), max_epochs=20, logger=False, enable_checkpointing=False
    )
    trainer.fit(model, DataLoader(train, batch_size=32, shuffle=True))
    (result,) = trainer.test(model, DataLoader(test, batch_size=32), verbose=False)
    if trainer.is_global_zero:
        print(f"{Strategy.__name__}: {100 * result['accuracy']:.1f} % of the held-out digits are right")


if __name__ == "__main__":
    main()
