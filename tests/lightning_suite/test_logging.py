"""What `self.log`, loggers, torchmetrics and the progress bar show."""

import pytest
import torch
import torchmetrics
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger

from tests.lightning_suite.compare import catch, same_as_ddp
from tests.lightning_suite.recorder import WithData
from tests.models import rank

pytestmark = [
    # where a case logs so, it is meant
    pytest.mark.filterwarnings("ignore:.*makes the workers wait for each other at every training step"),
    # Lightning 2.6 with torch 2.13: inside Lightning's own `all_gather`
    pytest.mark.filterwarnings("ignore:torch.distributed.nn.functional.all_gather is deprecated"),
]


def metrics(trainer):
    return {
        "callback": trainer.callback_metrics,
        "logged": trainer.logged_metrics,
        "progress_bar": trainer.progress_bar_metrics,
    }


def known(value):
    return {key: str(float(number)) for key, number in value.items()}


class Counts(WithData):
    """Logs numbers known on paper, in every way, with and without `sync_dist`."""

    def training_step(self, batch, batch_idx):
        for sync in (False, True):
            for reduce_fx in ("mean", "sum", "max", "min"):
                for when in ("step", "epoch", "both"):
                    self.log(
                        f"{when}_{reduce_fx}_{sync}",
                        float(10 * batch_idx + rank() + 1),
                        on_step=when != "epoch",
                        on_epoch=when != "step",
                        sync_dist=sync,
                        reduce_fx=reduce_fx,
                        prog_bar=reduce_fx == "sum",
                    )
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("validation", float(batch_idx + rank()), sync_dist=True, on_step=True, on_epoch=True)
        self.log("rank", float(rank()), sync_dist=True, reduce_fx="max", batch_size=1)

    def test_step(self, batch, batch_idx):
        self.log_dict({"a": float(rank()), "b": float(batch_idx)}, sync_dist=True)


@same_as_ddp
def test_numbers_known_on_paper(setting):
    trainer = setting.trainer()
    model = Counts()
    trainer.fit(model)
    seen = {name: known(values) for name, values in metrics(trainer).items()}
    assert seen["callback"]["epoch_mean_True"] == str((1 + 11 + 21 + 31 + 2 + 12 + 22 + 32) / 8)
    assert seen["callback"]["epoch_sum_False"] == str(float(1 + 11 + 21 + 31 + 4 * rank()))
    return seen | {"tested": [known(line) for line in trainer.test(model, verbose=False)]}


class LogsEverywhere(WithData):
    """Logs from every hook that may log."""


def _logs(name):
    def hook(self, *args):
        self.log(name, float(len(args)), sync_dist=True)
        self.log_dict({f"{name}.a": 1.0, f"{name}.b": float(rank())}, prog_bar=True)

    return hook


for _name in (
    *("on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_zero_grad", "on_before_backward"),
    *("on_after_backward", "on_before_optimizer_step", "on_train_batch_end", "on_train_epoch_end"),
    *("on_validation_start", "on_validation_epoch_start", "on_validation_batch_start", "on_validation_batch_end"),
    *("on_validation_epoch_end", "on_test_epoch_end"),
):
    setattr(LogsEverywhere, _name, _logs(_name))


class LogsFromCallback(Callback):
    """Logs from a callback."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.log("callback_step", float(batch_idx), on_step=True, on_epoch=True, sync_dist=True)

    def on_train_epoch_end(self, trainer, pl_module):
        self.log("callback_epoch", float(trainer.current_epoch), sync_dist=True)


@same_as_ddp
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "val_check_interval": 2}], ids=str)
def test_log_in_every_hook(setting, options):
    trainer = setting.trainer(callbacks=[LogsFromCallback()], **options)
    model = LogsEverywhere()
    trainer.fit(model)
    seen = metrics(trainer)
    return seen | {"tested": trainer.test(model, verbose=False)}


@same_as_ddp
@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_end", "on_fit_end", "on_validation_end", "configure_model"])
def test_hooks_that_may_not_log(setting, hook):
    model = WithData()
    setattr(model, hook, lambda: model.log("no", 1.0))
    return catch(setting.trainer().fit, model)


class Measures(WithData):
    """Metrics of torchmetrics, logged as objects and as values."""

    def __init__(self, on_step):
        super().__init__()
        self.on_step = on_step
        self.error = torchmetrics.MeanSquaredError(dist_sync_on_step=on_step)
        self.mean = torchmetrics.MeanMetric()
        self.all = torchmetrics.CatMetric()
        self.both = torchmetrics.MetricCollection([torchmetrics.MeanAbsoluteError(), torchmetrics.R2Score()])

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self.net(x)
        self.error(out, y)
        self.mean(float(batch_idx + rank()))
        self.both(out, y)
        self.log("error", self.error, on_step=True, on_epoch=True)
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        self.log_dict(self.both, on_step=False, on_epoch=True)
        return ((out - y) ** 2).mean()

    def validation_step(self, batch, batch_idx):
        self.all.update(torch.full((1 + rank(),), float(batch_idx)))  # ranks differ in the size of this state

    def on_validation_epoch_end(self):
        self.log("cat", self.all.compute().sum())
        self.all.reset()


@same_as_ddp
@pytest.mark.parametrize("on_step", [False, True])
def test_torchmetrics(setting, on_step):
    trainer = setting.trainer()
    trainer.fit(Measures(on_step))
    assert trainer.callback_metrics["mean"] == (0 + 1 + 2 + 3 + 1 + 2 + 3 + 4) / 8
    assert trainer.callback_metrics["cat"] == 3 * (0 + 1 + 2)
    return metrics(trainer)


class Talks(WithData):
    """Uses the collectives that Lightning offers to modules."""

    def __init__(self):
        super().__init__()
        self.heard = []

    def on_train_epoch_start(self):
        strategy = self.trainer.strategy
        ours = torch.tensor([1.0 + rank()])
        self.heard += [
            self.all_gather(ours),
            self.all_gather({"a": ours, "b": [2 * ours]}),
            strategy.broadcast(f"from {rank()}"),
            strategy.broadcast({"rank": rank()}, src=1),
            strategy.reduce(ours.clone(), reduce_op="sum"),
            strategy.reduce(ours.clone()),
            strategy.reduce_boolean_decision(rank() == 0),
            strategy.reduce_boolean_decision(rank() == 0, all=False),
        ]
        strategy.barrier()

    def validation_step(self, batch, batch_idx):
        self.heard.append(self.all_gather(torch.tensor(float(batch_idx + rank()))))

    on_train_end = on_validation_start = on_train_epoch_start


@same_as_ddp
def test_collectives(setting):
    model = Talks()
    setting.trainer().fit(model)
    return _plain(model.heard)


def _plain(value):
    return str([item.tolist() if isinstance(item, torch.Tensor) else item for item in value])


class GathersGradients(WithData):
    """A loss on the outputs of all workers, through `all_gather(sync_grads=True)`."""

    def training_step(self, batch, batch_idx):
        return self.all_gather(self.loss(batch), sync_grads=True).mean()


@same_as_ddp
def test_all_gather_with_gradients(setting):
    model = GathersGradients()
    trainer = setting.trainer()
    trainer.fit(model)
    return {"step": trainer.global_step, "model": model.state_dict()}


class Bar(ProgressBar):
    """Writes down what a progress bar would show."""

    def __init__(self):
        super().__init__()
        self.shown = []

    def disable(self):
        pass

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.shown.append((batch_idx, self.total_train_batches, self.get_metrics(trainer, pl_module)))


@same_as_ddp
def test_progress_bar(setting):
    bar = Bar()
    setting.trainer(callbacks=[bar], enable_progress_bar=True).fit(Counts())
    return [(batch, total, sorted(values)) for batch, total, values in bar.shown]


@same_as_ddp
@pytest.mark.parametrize("every", [1, 3])
def test_csv_logger(setting, every):
    logger = CSVLogger(setting.path, name="logs")
    model = Counts()
    model.save_hyperparameters({"width": 8})
    trainer = setting.trainer(logger=logger, log_every_n_steps=every, max_steps=7)
    trainer.fit(model)
    trainer.strategy.barrier()
    files = sorted(str(file.relative_to(setting.path)) for file in setting.path.rglob("*.*"))
    lines = (setting.path / "logs/version_0/metrics.csv").read_text().splitlines()
    return {"files": files, "lines": lines, "version": logger.version, "step": trainer.global_step}


class Remembers(DummyLogger):
    """A logger that keeps what it is told."""

    def __init__(self):
        super().__init__()
        self.told = []

    def log_metrics(self, metrics, step=None):
        self.told.append((step, sorted(metrics)))

    def finalize(self, status):
        self.told.append(status)

    def after_save_checkpoint(self, checkpoint_callback):
        self.told.append("saved")


@same_as_ddp
def test_what_a_logger_is_told(setting):
    logger = Remembers()
    trainer = setting.trainer(logger=logger, log_every_n_steps=2, enable_checkpointing=True)
    model = Counts()
    trainer.fit(model)
    trainer.test(model, verbose=False)
    return {"told": logger.told, "main": trainer.is_global_zero}
