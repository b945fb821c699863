"""What is sent: nothing in a local step, one header and the buckets at the end of a round."""

import math
import warnings
from collections import Counter
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torchmetrics import MeanMetric

from lightning_localsgd import LocalSGDStrategy, Mean
from tests.models import Regression, loader, trainer
from tests.workers import run_workers


class Linears(LightningModule):
    """Many or few tensors of the same total size."""

    def __init__(self, tensors, size, norm=False):
        super().__init__()
        self.parts = nn.ParameterList(torch.zeros(size // tensors) for _ in range(tensors))
        self.norm = nn.BatchNorm1d(6) if norm else nn.Identity()

    def training_step(self, batch, batch_idx):
        return self.norm(batch[0]).sum() * self.parts[0].sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Manual(Regression):
    def __init__(self):
        super().__init__("adamw", norm=True)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for _ in range(2):
            self.optimizers().zero_grad()
            self.manual_backward(self.loss(batch))
            self.optimizers().step()


class LogsMuch(Regression):
    """Logs all that needs no communication in a training step."""

    def __init__(self):
        super().__init__("adamw", norm=True)
        self.mean = MeanMetric()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.mean(loss)
        self.log("mean", self.mean, on_step=True, on_epoch=True, prog_bar=True)
        self.log("loss", loss, on_step=True, on_epoch=False)
        self.log("epoch_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), on_step=True, on_epoch=True, sync_dist=True)


def count(module, arguments, period, steps, bucket_mb, options):
    """Return how often each collective was called in a fit of so many steps."""
    model = module(*arguments)
    strategy = LocalSGDStrategy(period, mean=Mean(bucket_mb))
    run = trainer(2, strategy, **options)
    with torch.profiler.profile() as profile:
        run.fit(model, loader([steps, steps]))
    calls = Counter(event.name for event in profile.events() if event.name.startswith("gloo:"))
    return dict(calls)


def difference(module, arguments, period, steps, bucket_mb=64, **options):
    """Return the collectives that the last steps of a longer fit add, on each rank."""
    short = run_workers(count, 2, module, arguments, period, steps[0], bucket_mb, options)
    long = run_workers(count, 2, module, arguments, period, steps[1], bucket_mb, options)
    return [
        {name: b.get(name, 0) - a.get(name, 0) for name in a | b if a.get(name, 0) != b.get(name, 0)}
        for a, b in zip(short, long, strict=True)
    ]


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (Regression, {}),
        (Manual, {}),
        (LogsMuch, {"gradient_clip_val": 0.1}),
        (Regression, {"accumulate_grad_batches": 2}),
        (Regression, {"precision": "bf16-mixed"}),
    ],
)
def test_a_local_step_sends_nothing(module, options):
    assert difference(module, (), 1000, (4, 24), **options) == [{}, {}]


@pytest.mark.parametrize("tensors", [4, 2000])
@pytest.mark.parametrize("norm", [False, True])
def test_a_round_is_one_header_and_the_buckets(tensors, norm):
    elements, bucket_mb = 300_000, 0.25
    # 4 more steps of period 4: one more round. Two groups with BatchNorm: float32, and its integer counter.
    floats = elements + (4 * 6 if norm else 0)
    reduces = math.ceil(4 * floats / (bucket_mb / 2 * 2**20)) + (1 if norm else 0)  # two are in flight
    for calls in difference(Linears, (tensors, elements, norm), 4, (4, 8), bucket_mb):
        assert calls == {"gloo:all_gather": 1, "gloo:all_reduce": reduces}


def test_gradients_are_averaged_with_one_header_a_step():
    calls, other = difference(Regression, (), 1, (4, 14))
    assert calls == other
    assert calls.pop("gloo:all_gather") == 10  # in place of Lightning's broadcast
    assert set(calls) == {"gloo:all_reduce"}  # DDP's, for the gradients and for which parameters were used


def test_one_worker_sends_nothing():
    for period in (1, 3):
        (calls,) = run_workers(count_alone, 1, period)
        assert calls == {}


def count_alone(period):
    model = LogsMuch()
    run = trainer(1, period, max_epochs=2)
    with torch.profiler.profile() as profile:
        run.fit(model, loader([5]), loader([2]))
    return dict(Counter(event.name for event in profile.events() if event.name.startswith("gloo:")))


class SyncsEachStep(Regression):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_step=True, sync_dist=True)
        return loss


class SyncsMetric(Regression):
    def __init__(self):
        super().__init__()
        self.mean = MeanMetric(dist_sync_on_step=True)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("mean", self.mean(loss))
        return loss


def warned(module, options, interval, folder, period=4):
    callbacks = [ModelCheckpoint(folder, train_time_interval=interval, every_n_train_steps=0)] if interval else []
    if folder and not interval:
        callbacks = [ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1)]
    run = trainer(2, period, callbacks=callbacks, enable_checkpointing=bool(callbacks), **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(module(), loader([4, 4]), loader([2, 2]))
    return [str(warning.message) for warning in caught if "free of communication" in str(warning.message)]


@pytest.mark.parametrize(
    ("module", "options", "interval", "cause"),
    [
        (SyncsEachStep, {}, None, "`self.log('loss', on_step=True, sync_dist=True)`"),
        (SyncsMetric, {}, None, "`MeanMetric(dist_sync_on_step=True)`"),
        (Regression, {"max_time": "00:01:00:00"}, None, "`Trainer(max_time=...)`"),
        (Regression, {}, True, "`ModelCheckpoint(train_time_interval=...)`"),
    ],
)
def test_what_makes_every_step_wait_is_named_once(module, options, interval, cause, tmp_path):
    folder = str(tmp_path) if interval else None
    interval = timedelta(hours=1) if interval else None
    for messages in run_workers(warned, 2, module, options, interval, folder):
        assert len(messages) == 1
        assert messages[0].startswith(cause)


def test_what_does_not_make_every_step_wait_is_not_warned_of(tmp_path):
    assert run_workers(warned, 2, LogsMuch, {}, None, str(tmp_path)) == [[], []]
    assert run_workers(warned, 2, SyncsEachStep, {}, None, None, 1) == [[], []]  # with gradients, all wait anyway
