"""What `pace="proportional"` buys with one worker four times slower than the other three, and what accuracy it costs.

    python benchmarks/pace.py [--seeds 3]

Four workers train on the digits example's data for the same number of epochs with each pace in turn. Each step of the
slow one sleeps four times as long as the others' (busy processes on two cores would slow each other). The strategy
measures the speeds, so the first epoch is as at equal pace and is left out of the rate; `given` has them from the
start. Shown: samples a second of all workers after the first epoch, relative to the equal pace of the
same seed, and the test accuracy at the end.

Needs: scikit-learn; about 6 minutes.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

sys.path.insert(0, str(Path(__file__).parent.parent))

from lightning_localsgd import LocalSGDStrategy, Proportional
from tests.workers import run_workers

STEP = 0.03  # seconds that a step of a fast worker sleeps
SLOWNESS = (1, 1, 1, 4)
EPOCHS = 10
PACES = {"equal": "equal", "measured": Proportional(), "given": Proportional([1 / times for times in SLOWNESS])}


class Digits(LightningModule):
    """A small network; sleeps in each step as long as it is told."""

    def __init__(self, sleeps: float) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        self.sleeps, self.samples = sleeps, 0

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        time.sleep(self.sleeps)
        x, y = batch
        self.samples += len(x)
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


class Watch(Callback):
    """Notes when the first epoch was over, and how many samples this worker had had."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0:
            self.start, self.samples = time.perf_counter(), pl_module.samples


def train(name: str, seed: int) -> tuple[int, float, float]:
    """Return this worker's samples and seconds after the first epoch, and the accuracy at the end."""
    torch.set_num_threads(1)
    seed_everything(seed, verbose=False)
    x, y = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y))
    seen, held_out = random_split(data, [0.8, 0.2], torch.Generator().manual_seed(seed))
    model, watch = Digits(STEP * SLOWNESS[int(os.environ["LOCAL_RANK"])]), Watch()
    quiet: Any = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    strategy = LocalSGDStrategy(8, pace=PACES[name])  # type: ignore[arg-type]
    trainer = Trainer(
        accelerator="cpu", devices=len(SLOWNESS), strategy=strategy, max_epochs=EPOCHS, callbacks=[watch], **quiet
    )
    trainer.fit(model, DataLoader(seen, batch_size=8, shuffle=True))
    seconds = time.perf_counter() - watch.start
    inputs, targets = (torch.stack(parts) for parts in zip(*held_out, strict=True))
    with torch.no_grad():
        accuracy = (model.net(inputs).argmax(1) == targets).float().mean().item()
    return model.samples - watch.samples, seconds, accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    rates: dict[str, list[float]] = {name: [] for name in PACES}
    accuracies: dict[str, list[float]] = {name: [] for name in PACES}
    for seed in range(parser.parse_args().seeds):
        for name in PACES:
            ranks = run_workers(train, len(SLOWNESS), name, seed, timeout=300)
            samples, seconds, accuracy = zip(*ranks, strict=True)
            rates[name].append(sum(samples) / max(seconds))
            accuracies[name].append(100 * accuracy[0])
    print("| pace | samples a second, relative to equal pace (lowest to highest) | test accuracy (lowest to highest) |")
    print("|---|---|---|")
    for name in PACES:
        ratios = [rate / equal for rate, equal in zip(rates[name], rates["equal"], strict=True)]
        of = accuracies[name]
        print(
            f"| {name} | {statistics.mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
            f"| {statistics.mean(of):.1f} ({min(of):.1f} to {max(of):.1f}) |"
        )


if __name__ == "__main__":
    main()
