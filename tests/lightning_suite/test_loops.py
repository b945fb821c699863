"""How a fit is walked through: which hooks are called, on which batches, how often, and when it ends."""

import math
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import CombinedLoader

from tests.lightning_suite.compare import catch, loader, same_as_ddp
from tests.lightning_suite.recorder import WithData, recorded
from tests.models import Regression, state_of


def progress(trainer):
    epoch_loop = trainer.fit_loop.epoch_loop
    return {
        "global_step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "should_stop": trainer.should_stop,
        "state": str(trainer.state),
        "batches": (trainer.num_training_batches, trainer.num_val_batches, trainer.num_sanity_val_batches),
        "loops": trainer.fit_loop.state_dict(),
        "attributes": [sorted(vars(loop)) for loop in (trainer.fit_loop, epoch_loop, epoch_loop.val_loop)],
    }


@same_as_ddp
@pytest.mark.filterwarnings("ignore:.*barebones")  # which switches off what it finds switched on
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fast_dev_run": True},
        {"fast_dev_run": 3},
        {"limit_train_batches": 3, "limit_val_batches": 1},
        {"limit_train_batches": 0.5, "limit_val_batches": 0},
        {"limit_train_batches": 0},
        {"max_steps": 5},
        {"max_steps": 0},
        {"max_epochs": 0},
        {"min_epochs": 2, "max_steps": 3},
        {"val_check_interval": 1},
        {"val_check_interval": 3},
        {"val_check_interval": 0.5},
        {"val_check_interval": 6, "check_val_every_n_epoch": None},
        {"check_val_every_n_epoch": 2},
        {"accumulate_grad_batches": 3},
        {"accumulate_grad_batches": 2, "max_steps": 3},
        {"overfit_batches": 1},
        {"reload_dataloaders_every_n_epochs": 1},
        {"num_sanity_val_steps": 0},
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "norm"},
        {"detect_anomaly": True, "inference_mode": False},
        {"barebones": True, "default_root_dir": None},
    ],
    ids=str,
)
def test_fit_calls_the_same_hooks(setting, options):
    model, callback, calls = recorded()
    trainer = setting.trainer(callbacks=[callback], **options)
    trainer.fit(model)
    return {"calls": calls, "progress": progress(trainer), "model": state_of(model)}


@same_as_ddp
def test_entry_points_before_and_after_fit(setting):
    model, callback, calls = recorded()
    trainer = setting.trainer(callbacks=[callback])
    seen = []
    for _ in range(2):
        seen.append(trainer.validate(model, verbose=False))
        seen.append(trainer.test(model, verbose=False))
        seen.append(trainer.predict(model))
        seen.append(str(trainer.state))
        trainer.fit(model)
    return {"calls": calls, "seen": seen, "progress": progress(trainer), "model": state_of(model)}


@same_as_ddp
def test_second_fit_goes_on_with_more_epochs(setting):
    model, callback, calls = recorded(optimizer="adamw")
    trainer = setting.trainer(callbacks=[callback])
    trainer.fit(model)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model)
    return {"calls": calls, "progress": progress(trainer), "model": state_of(model)}


@same_as_ddp
def test_another_trainer_goes_on_with_the_module(setting):
    model = WithData(optimizer="momentum")
    seen = []
    for _ in range(2):
        trainer = setting.trainer(max_steps=3)
        trainer.fit(model)
        seen.append(progress(trainer))
    return {"seen": seen, "model": state_of(model)}


PER_BATCH = ("on_train_batch_start", "on_train_batch_end")


class Ends(Callback):
    """Ends something in a hook, in one of the ways that Lightning knows."""

    def __init__(self, hook, how, batch=2):
        def end(trainer, pl_module, *args):
            if hook not in PER_BATCH or args[-1] == batch:
                if how == "should_stop":
                    trainer.should_stop = True
                else:
                    raise ArithmeticError(f"in {hook}")

        setattr(self, hook, end)


@same_as_ddp
@pytest.mark.parametrize(
    ("hook", "minimum"),
    [
        ("on_train_start", {}),
        ("on_train_batch_start", {}),
        ("on_train_batch_end", {}),
        ("on_train_batch_end", {"min_steps": 7}),
        ("on_train_batch_end", {"min_epochs": 2}),
        ("on_validation_end", {}),
        ("on_train_epoch_end", {"min_steps": 7}),
    ],
    ids=str,
)
def test_should_stop(setting, hook, minimum):
    model, callback, calls = recorded()
    trainer = setting.trainer(max_epochs=3, callbacks=[callback, Ends(hook, "should_stop")], **minimum)
    trainer.fit(model)
    return {"calls": calls, "progress": progress(trainer), "model": state_of(model)}


@same_as_ddp
@pytest.mark.parametrize(
    "hook",
    ["on_fit_start", "on_before_zero_grad", "on_train_batch_end", "on_validation_start", "on_train_end"],
)
def test_exception(setting, hook):
    model, callback, calls = recorded()
    trainer = setting.trainer(callbacks=[callback, Ends(hook, "raise")])
    error = catch(trainer.fit, model)
    return {"error": error, "calls": calls, "progress": progress(trainer), "state": state_of(model)}


@same_as_ddp
@pytest.mark.parametrize("batch", [0, 3])
def test_on_train_batch_start_returning_minus_one_leaves_the_epoch(setting, batch):
    model, callback, calls = recorded()
    model.on_train_batch_start = lambda _, index: -1 if index == batch else None
    trainer = setting.trainer(callbacks=[callback])
    trainer.fit(model)
    return {"calls": calls, "progress": progress(trainer), "model": state_of(model)}


@same_as_ddp
@pytest.mark.filterwarnings("ignore:.*makes the workers wait for each other at every training step")  # as it does
def test_max_time_ends_the_fit(setting):
    model = WithData()
    trainer = setting.trainer(max_time=timedelta(milliseconds=300))
    trainer.fit(model)
    return {"stopped": trainer.should_stop, "some": trainer.global_step > 0, "max_epochs": trainer.max_epochs}


class TakesIterator(WithData):
    """A training step that fetches its own batches."""

    def training_step(self, dataloader_iter):
        batch, batch_idx, dataloader_idx = next(dataloader_iter)
        self.log("seen", batch_idx + dataloader_idx, batch_size=2)
        return self.loss(batch)


@same_as_ddp
@pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument")  # Lightning calls it experimental
def test_training_step_with_dataloader_iter(setting):
    model = TakesIterator()
    trainer = setting.trainer()
    trainer.fit(model)
    return {"progress": progress(trainer), "logged": trainer.logged_metrics, "model": state_of(model)}


class TakesDictionary(WithData):
    """Batches from two loaders at a time."""

    def training_step(self, batch, batch_idx):
        return sum(self.loss(part) for part in batch.values() if part is not None)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_loss", self.loss(batch), sync_dist=True)


@same_as_ddp
@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
def test_combined_loader(setting, mode):
    model = TakesDictionary()
    trainer = setting.trainer()
    train = CombinedLoader({"a": loader(2), "b": loader(4)}, mode)
    trainer.fit(model, train, CombinedLoader([loader(1), loader(3)], "sequential"))
    return {"progress": progress(trainer), "metrics": trainer.callback_metrics, "model": state_of(model)}


class Returns(WithData):
    """A training step that returns something else than a tensor."""

    def __init__(self, what):
        super().__init__()
        self.what = what

    def training_step(self, batch, batch_idx):
        return {"loss": self.loss(batch), "more": batch_idx} if self.what is dict else self.what


@same_as_ddp
@pytest.mark.parametrize("what", [dict, None, 3, "text"], ids=str)
def test_training_step_output(setting, what):
    model = Returns(what)
    outputs = []
    callback = Callback()
    callback.on_train_batch_end = lambda trainer, module, out, batch, index: outputs.append(out)
    trainer = setting.trainer(callbacks=[callback])
    error = None if what is dict else catch(trainer.fit, model)
    if what is dict:
        trainer.fit(model)
    return {"error": error, "outputs": outputs, "progress": progress(trainer)}


class Schedules(Regression):
    """Writes down its learning rate at each step."""

    def __init__(self, interval, frequency, plateau=False):
        super().__init__()
        self.interval, self.frequency, self.plateau, self.rates = interval, frequency, plateau, []

    def training_step(self, batch, batch_idx):
        self.rates.append(str(self.optimizers().param_groups[0]["lr"]))
        return self.loss(batch)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        if self.plateau:  # a threshold that no loss passes: the rate falls at each step of the scheduler
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e9)
        else:
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        names = {"interval": self.interval, "frequency": self.frequency, "monitor": "val_loss"}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **names}}


@same_as_ddp
@pytest.mark.parametrize(
    ("interval", "frequency", "plateau", "accumulate"),
    [
        ("step", 1, False, 1),
        ("step", 3, False, 2),
        ("epoch", 1, False, 1),
        ("epoch", 2, False, 2),
        ("epoch", 1, True, 1),
    ],
)
def test_learning_rates(setting, interval, frequency, plateau, accumulate):
    model = Schedules(interval, frequency, plateau)
    trainer = setting.trainer(max_epochs=3, accumulate_grad_batches=accumulate)
    trainer.fit(model, loader(), loader(1))
    return {"rates": model.rates, "progress": progress(trainer), "model": state_of(model)}


@same_as_ddp
def test_gradients_are_clipped_before_the_step(setting):
    model = Regression()
    norms = []
    callback = Callback()
    callback.on_before_optimizer_step = lambda trainer, module, optimizer: norms.append(grad_norm(module) > 0.01)
    callback.on_before_zero_grad = lambda trainer, module, optimizer: norms.append(grad_norm(module) <= 0.01001)
    trainer = setting.trainer(gradient_clip_val=0.01, callbacks=[callback])
    trainer.fit(model, loader())
    assert all(norms[1:])  # before the first step there is no gradient yet
    return {"norms": norms, "model": state_of(model)}


def grad_norm(module):
    return math.hypot(*(p.grad.norm().item() for p in module.parameters() if p.grad is not None))
