"""Lightning's callbacks in rounds longer than a step: the same on every worker, and equal to a reference.

How they behave as with `DDPStrategy` is tested in `lightning_suite`; an EMA in `test_ema.py`.
"""

import os
import time
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    DeviceStatsMonitor,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    ThroughputMonitor,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader

from lightning_localsgd import LocalSGDStrategy, Schedule
from tests.models import Constant, Regression, Trajectory, batch, loader, network, rank, same, state_of, trainer
from tests.reference import average
from tests.versions import has, since
from tests.workers import Raised, run_workers


def batches(count):
    """Return a loader with a length, of this rank's own batches."""
    return DataLoader([batch(int(os.environ["LOCAL_RANK"]), index) for index in range(count)], batch_size=None)


# ----------------------------------------------------------------------------------------- stochastic weight averaging


def average_stochastically(norm):
    if norm:
        model = Regression(norm=True)
        callback = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)
    else:
        model = Constant()
        callback = StochasticWeightAveraging(swa_lrs=1.0, swa_epoch_start=2)
    trainer(2, 3, callbacks=[callback], max_epochs=3).fit(model, batches(4))
    assert "update_parameters" not in vars(callback)  # it is the class's again
    return model, state_of(callback._average_model)


def test_swa_is_the_mean_of_the_consensus_at_the_start_of_the_epochs():
    # Gradients 1 and 2, lr 1, so that the consensus is -1.5 t after t steps: -6 and -12 at the start of the second and
    # third epoch, in mid-round.
    for model, averaged in run_workers(average_stochastically, 2, False):
        assert model.weight.item() == averaged["weight"].item() == -9


@pytest.mark.filterwarnings("ignore:.*recompute the batch norm statistics")
def test_the_batch_norm_statistics_of_swa_are_those_of_its_model_on_all_data():
    (model, averaged), (other, other_averaged) = run_workers(average_stochastically, 2, True)
    assert same([state_of(model), state_of(other)])
    norm = model.net[1]
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    # The mean over all batches, by the averaged model. (The trained one is a step further: Lightning takes a last step,
    # with the last gradients, in the extra epoch in which the statistics are collected; on one device too.)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert torch.equal(averaged[name], other_averaged[name])
            parameter.copy_(averaged[name])
        norm.reset_running_stats()
        norm.momentum = None
        model.train()
        for worker in range(2):
            for index in range(4):
                model.net(batch(worker, index)[0])
    torch.testing.assert_close(mean, norm.running_mean)
    torch.testing.assert_close(var, norm.running_var)


# ------------------------------------------------------------------------------------------------------------- pruning


class Looks(Callback):
    """Before the pruning callback does something, looks at the consensus; then, at this worker's own replica."""

    def __init__(self):
        self.consensus, self.saved, self.own = [], [], []

    def on_train_epoch_end(self, trainer, pl_module):
        with trainer.strategy.consensus():
            self.consensus.append(state_of(pl_module.net[0]))

    def on_train_epoch_start(self, trainer, pl_module):
        self.own.append(state_of(pl_module.net[0]))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 5:
            with trainer.strategy.consensus():
                self.saved.append(state_of(pl_module.net[0]))


def prune_while_training(way, folder, lottery=False):
    torch.manual_seed(int(os.environ["LOCAL_RANK"]))  # random masks differ
    model, looks = Regression(), Looks()
    model.net = network(seed=int(os.environ["LOCAL_RANK"]))
    callback = ModelPruning(way, [(model.net[0], "weight")], amount=0.25, use_lottery_ticket_hypothesis=lottery)
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    run = trainer(2, 3, callbacks=[looks, callback, saver], max_epochs=3, enable_checkpointing=True)
    run.fit(model, loader([4, 4]))
    return looks.consensus, looks.saved, looks.own, state_of(model)


def test_pruning_by_magnitude_is_that_of_the_consensus(tmp_path):
    (consensus, saved, own, end), (other_consensus, _, other_own, other_end) = run_workers(
        prune_while_training, 2, "l1_unstructured", str(tmp_path)
    )
    assert same([end, other_end])
    twin = nn.Linear(6, 8)
    for epoch, (one, other) in enumerate(zip(consensus, other_consensus, strict=True)):
        assert same([one, other])
        # What torch makes of the consensus, mask upon mask. The last model was pruned once more, and for good.
        if epoch == 0:
            twin.weight.data.copy_(one["weight"])
        else:
            assert torch.equal(one["weight_mask"], twin.weight_mask)
            twin.weight_orig.data.copy_(one["weight_orig"])
            next(iter(twin._forward_pre_hooks.values()))(twin, None)
        prune.l1_unstructured(twin, "weight", 0.25)
    # Steps 4 and 8 are in mid-round: the replicas stay their own, under one mask.
    for one, other in zip(own[1:], other_own[1:], strict=True):
        assert torch.equal(one["weight_mask"], other["weight_mask"])
        assert not torch.equal(one["weight_orig"], other["weight_orig"])
    assert torch.equal(end["net.0.weight"] == 0, twin.weight_mask == 0)
    file = torch.load(tmp_path / "step=5.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(file["net.0.weight"], saved[0]["weight_orig"] * saved[0]["weight_mask"])
    assert torch.equal(file["net.0.bias"], saved[0]["bias"])


def test_random_pruning_takes_one_mask(tmp_path):
    (_, _, own, end), (_, _, other_own, other_end) = run_workers(
        prune_while_training, 2, "random_unstructured", str(tmp_path)
    )
    assert same([end, other_end])
    for one, other in zip(own[1:], other_own[1:], strict=True):
        assert torch.equal(one["weight_mask"], other["weight_mask"])
        assert set(one["weight_mask"].unique().tolist()) == {0, 1}


@since("2.6")  # before, it goes back to nothing: it writes into what the next forward pass computes anew
def test_the_lottery_goes_back_to_rank_0s_first_model(tmp_path):
    (_, _, own, end), (_, _, other_own, other_end) = run_workers(
        prune_while_training, 2, "l1_unstructured", str(tmp_path), True
    )
    first = network(seed=0)[0].weight
    assert torch.equal(own[1]["weight_orig"], first)
    assert torch.equal(other_own[1]["weight_orig"], first)
    assert same([end, other_end])


# --------------------------------------------------------------------------------- learning rates, parameters, batches


class WithBackbone(LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = network(seed=1)[:2], network(seed=2)[2]

    def forward(self, x):
        return self.head(self.backbone(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return ((self(x) - y) ** 2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def finetune():
    model = WithBackbone()
    callback = BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda _: 1.5, backbone_initial_lr=0.01)
    trainer(2, 3, callbacks=[callback], max_epochs=3).fit(model, loader([4, 4]))
    return state_of(model)


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
def test_finetuning_equals_the_serial_algorithm():
    models = [WithBackbone() for _ in range(2)]
    steps = [torch.optim.SGD(model.head.parameters(), lr=0.1, momentum=0.9) for model in models]
    for step in range(12):
        if step == 4:  # the second epoch
            for model, own in zip(models, steps, strict=True):
                own.add_param_group({"params": list(model.backbone.parameters()), "lr": 0.01})
        if step == 8:
            for own in steps:
                own.param_groups[1]["lr"] = 0.015
        for worker, (model, own) in enumerate(zip(models, steps, strict=True)):
            own.zero_grad()
            model.training_step(batch(worker, step % 4), step).backward()
            own.step()
        if (step + 1) % 3 == 0:
            average(models)
    first, second = run_workers(finetune, 2)
    assert same([first, second])
    for name, value in state_of(models[0]).items():
        torch.testing.assert_close(first[name], value, atol=1e-6, rtol=0)


def accumulate():
    model, trajectory = Constant(), Trajectory()
    run = trainer(2, 3, callbacks=[GradientAccumulationScheduler({1: 2}), trajectory], max_epochs=2)
    run.fit(model, loader([4, 4]))
    return trajectory.column("weight")


def test_a_round_counts_optimizer_steps_while_accumulation_changes():
    # Period 3. One batch to a step in the first epoch, two in the second: averages after steps 3 and 6.
    first, second = run_workers(accumulate, 2)
    assert first == [-1, -2, -4.5, -5.5, -5.5, -6.5, -6.5, -9]
    assert second == [-2, -4, -4.5, -6.5, -6.5, -8.5, -8.5, -9]


class Doubling(Schedule):
    def length(self, progress):
        return 2**progress.round


class WithRate(Regression):
    def __init__(self, lr):
        super().__init__()
        self.lr = lr

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def find_rate(folder, period):
    model, trajectory = WithRate(1e-3), Trajectory()
    finder = LearningRateFinder(num_training_steps=6, early_stop_threshold=None)
    run = trainer(2, LocalSGDStrategy(period), callbacks=[finder, trajectory], default_root_dir=folder)
    run.fit(model, loader([7, 7]))
    found = finder.optimal_lr.suggestion(skip_begin=1, skip_end=1)
    model.lr = run.optimizers[0].param_groups[0]["lr"]
    plain, plain_trajectory = WithRate(model.lr), Trajectory()
    trainer(2, LocalSGDStrategy(period), callbacks=[plain_trajectory]).fit(plain, loader([7, 7]))
    return found, model.lr, trajectory.states, plain_trajectory.states


@since("2.5.3")  # before, one step is trained after the search, with DDP also
@pytest.mark.parametrize("period", [3, Doubling()])
def test_after_the_learning_rate_finder_training_is_as_if_it_had_not_been(period, tmp_path):
    first, second = run_workers(find_rate, 2, str(tmp_path), period)
    assert first[:2] == second[:2]
    for _, _, states, plain in (first, second):
        assert len(states) == 7
        assert all(same([one, other]) for one, other in zip(states, plain, strict=True))
    assert list(tmp_path.glob("*.ckpt")) == []


class FindsInTraining(LearningRateFinder):
    def on_fit_start(self, *args):
        pass

    def on_train_epoch_start(self, trainer, pl_module):
        self.lr_find(trainer, pl_module)


def fit_with(callback, folder):
    model = WithRate(1e-3)
    model.batch_size = 2
    trainer(2, 3, callbacks=[callback], default_root_dir=folder).fit(model, loader([4, 4]))


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (FindsInTraining(num_training_steps=2), "A fit cannot run inside another one"),
        (BatchSizeFinder(), "Batch size finder is not supported with distributed strategies"),
    ],
)
def test_refused_on_all_workers(callback, message, tmp_path):
    for raised in run_workers(fit_with, 2, callback, str(tmp_path), timeout=60, catch=True):
        assert isinstance(raised, Raised)
        assert message in raised.message


class Slow(Constant):
    def training_step(self, batch, batch_idx):
        time.sleep(0.02 * (1 + rank()))
        return super().training_step(batch, batch_idx)


def train_by_the_clock(interval):
    model, trajectory = Slow(), Trajectory()
    timer = Timer(timedelta(seconds=0.3), interval=interval)
    trainer(2, 3, callbacks=[timer, trajectory], max_epochs=-1).fit(model, loader([4, 4]))
    return len(trajectory.states), model.weight.item()


@pytest.mark.filterwarnings("ignore:.*or a `Timer` with `interval='step'`")
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_timer_stops_all_at_the_same_step(interval):
    (steps, weight), other = run_workers(train_by_the_clock, 2, interval)
    assert (steps, weight) == other
    assert steps > 0
    assert weight == -1.5 * steps


# ------------------------------------------------------------------------------------------------------------ monitors


class Reports(CPUAccelerator):
    """Has something to report also where psutil is not installed."""

    def get_device_stats(self, device):
        return {"seconds": time.process_time()}


class Listens(Callback):
    """Counts what is sent between the second batch and the last."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:
            self.profile = torch.profiler.profile()
            self.profile.start()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 6:
            self.profile.stop()
            self.sent = [event.name for event in self.profile.events() if event.name.startswith("gloo:")]


class Decays(Regression):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), "interval": "step"}]


def monitor(folder, busy):
    trajectory, listens, rates = Trajectory(), Listens(), LearningRateMonitor("step")
    monitors = [
        rates,
        DeviceStatsMonitor(cpu_stats=True),
        ThroughputMonitor(lambda batch: len(batch[0]), window_size=4),
    ]
    run = trainer(
        2, 100, callbacks=[listens, *(monitors if busy else []), trajectory], accelerator=Reports(),
        logger=CSVLogger(folder, name="", version=0) if busy else False, log_every_n_steps=1,
    )  # fmt: skip
    run.fit(Decays(), loader([8, 8]))
    metrics = run.logger.experiment.metrics if busy and rank() == 0 else []
    return trajectory.states, listens.sent, [float(rate) for rate in rates.lrs.get("lr-SGD", [])], metrics


@pytest.mark.filterwarnings("ignore:.*you need to define a `flops_per_batch`")
def test_monitors_report_without_a_word_to_the_others(tmp_path):
    quiet = run_workers(monitor, 2, str(tmp_path), False)
    busy = run_workers(monitor, 2, str(tmp_path), True)
    for (states, _, _, _), (busy_states, sent, rates, _) in zip(quiet, busy, strict=True):
        assert all(same([one, other]) for one, other in zip(states, busy_states, strict=True))
        assert sent == []
        assert rates == [0.5 ** (step + 1) for step in range(8)]
    lines = (tmp_path / "version_0" / "metrics.csv").read_text().splitlines()
    header = lines[0].split(",")
    for name in ("lr-SGD", "DeviceStatsMonitor.on_train_batch_end/seconds", "train/device/samples_per_sec"):
        assert any(name in column for column in header), (name, header)


# --------------------------------------------------------------------------------------------------------- checkpoints


class Scores(Constant):
    def validation_step(self, batch, batch_idx):
        self.log("score", float(rank() + self.trainer.current_epoch), sync_dist=True)


def save_at_all_triggers(folder):
    savers = [
        ModelCheckpoint(f"{folder}/steps", filename="{step}", every_n_train_steps=2, save_top_k=-1),
        ModelCheckpoint(f"{folder}/epochs", filename="{step}", every_n_epochs=1, save_top_k=-1),
        ModelCheckpoint(
            f"{folder}/train-end", filename="{step}", every_n_epochs=2, save_on_train_epoch_end=True, save_top_k=-1
        ),
        ModelCheckpoint(f"{folder}/best", filename="{step}", monitor="score", save_top_k=2, save_last=True),
        ModelCheckpoint(
            f"{folder}/time", filename="{step}", train_time_interval=timedelta(microseconds=1), save_top_k=-1
        ),
    ]
    run = trainer(2, 3, callbacks=savers, max_epochs=3, enable_checkpointing=True)
    run.fit(Scores(), loader([4, 4]), loader([1, 1]))
    return [saver.best_model_path for saver in savers]


@pytest.mark.filterwarnings("ignore:.*train_time_interval")
def test_each_trigger_saves_the_consensus(tmp_path):
    first, second = run_workers(save_at_all_triggers, 2, str(tmp_path))
    assert first == second
    saved = {folder.name: set() for folder in tmp_path.iterdir()}
    for path in tmp_path.glob("*/*.ckpt"):
        file = torch.load(path, weights_only=False)
        assert file["state_dict"]["weight"] == -1.5 * file["global_step"]  # gradients 1 and 2, lr 1, SGD
        saved[path.parent.name].add(file["global_step"])
    last = 8 if has("2.6") else 12  # before, `last.ckpt` is written also where nothing else is
    assert saved == {
        "steps": {2, 4, 6, 8, 10, 12}, "epochs": {4, 8, 12}, "train-end": {8}, "best": {4, 8, last},
        "time": set(range(1, 13)),
    }  # fmt: skip


class Raises(Callback):
    """One rank raises at its fifth step, and from then on notes what it sends."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if rank() == 1 and batch_idx == 4:
            self.profile = torch.profiler.profile()
            self.profile.start()
            raise ZeroDivisionError


def fail_and_save(folder):
    begun, raises = time.monotonic(), Raises()
    saver = OnExceptionCheckpoint(f"{folder}/{os.environ['LOCAL_RANK']}")
    run = trainer(2, 4, callbacks=[raises, saver], enable_checkpointing=True)
    with pytest.raises(Exception) as error:  # noqa: PT011 - which one it is, is what is compared
        run.fit(Constant(), loader([20, 20]))
    if error.type is not ZeroDivisionError:
        return None, time.monotonic() - begun
    raises.profile.stop()
    sent = [event.name for event in raises.profile.events() if event.name.startswith("gloo:")]
    return sent, time.monotonic() - begun


@pytest.mark.filterwarnings("ignore:.*ckpt_path=None")  # Lightning looks for a last checkpoint,
@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")  # and finds none
def test_saving_on_one_rank_s_exception_sends_nothing_and_waits_for_nobody(tmp_path):
    (other, its_seconds), (sent, seconds) = run_workers(fail_and_save, 2, str(tmp_path), timeout=60)
    assert sent == []
    assert other is None  # it waits in the average until rank 1's process has gone
    assert max(seconds, its_seconds) < 45
