"""Lightning's own callbacks, and the tuner."""

from datetime import timedelta

import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BasePredictionWriter,
    EarlyStopping,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateMonitor,
    ModelPruning,
    ModelSummary,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch import nn

from tests.lightning_suite.compare import catch, loader, same_as_ddp
from tests.lightning_suite.recorder import WithData
from tests.models import Regression, network, rank, state_of
from tests.versions import has, since

if has("2.6"):
    from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
else:  # where their tests are skipped
    EMAWeightAveraging = WeightAveraging = StochasticWeightAveraging


class Scored(WithData):
    """Logs given validation scores, one for each epoch; they differ between ranks unless synchronised."""

    def __init__(self, scores, sync_dist=True):
        super().__init__()
        self.scores, self.sync_dist = scores, sync_dist

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            score = self.scores[self.trainer.current_epoch] + rank() / 100
            self.log("score", torch.tensor(score), sync_dist=self.sync_dist)


@same_as_ddp
@pytest.mark.parametrize(
    ("options", "scores", "sync_dist"),
    [
        ({"patience": 2}, [5, 4, 3, 3, 3, 2, 1], True),
        ({"patience": 2}, [5, 4, 3, 3, 3, 2, 1], False),
        ({"patience": 0, "mode": "max"}, [1, 2, 2, 3], True),
        ({"stopping_threshold": 2.005}, [5, 4, 2, 1], False),  # passed on rank 0 only
        ({"divergence_threshold": 9.0}, [5, 4, 10, 1], True),
        ({"check_finite": True}, [5, float("nan"), 3], True),
        ({"check_on_train_epoch_end": True, "patience": 1}, [5, 6, 7, 8], True),
    ],
    ids=str,
)
def test_early_stopping(setting, options, scores, sync_dist):
    callback = EarlyStopping("score", **options)
    model = Scored(scores, sync_dist)
    trainer = setting.trainer(callbacks=[callback], max_epochs=len(scores))
    trainer.fit(model)
    seen = {"stopped": callback.stopped_epoch, "waited": callback.wait_count, "best": str(callback.best_score)}
    return seen | {"epoch": trainer.current_epoch, "step": trainer.global_step, "model": state_of(model)}


@same_as_ddp
def test_early_stopping_on_a_missing_metric(setting):
    return catch(setting.trainer(callbacks=[EarlyStopping("nowhere")]).fit, WithData())


class EveryFewSteps(WeightAveraging):
    """An average that is taken at steps, and at the end of each epoch."""

    def should_update(self, step_idx=None, epoch_idx=None):
        return epoch_idx is not None or step_idx % 2 == 0


@same_as_ddp
@pytest.mark.parametrize(
    "average",
    [
        pytest.param(EMAWeightAveraging, marks=since("2.6")),
        pytest.param(EveryFewSteps, marks=since("2.6")),
        StochasticWeightAveraging,
    ],
    ids=lambda kind: kind.__name__,
)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.filterwarnings("ignore:.*recompute the batch norm statistics")
@pytest.mark.filterwarnings("ignore:Swapping scheduler")
def test_weight_averaging(setting, average, norm):
    model = WithData(norm=norm)
    callback = average(swa_lrs=0.01, swa_epoch_start=1) if average is StochasticWeightAveraging else average()
    trainer = setting.trainer(callbacks=[callback], max_epochs=4)
    trainer.fit(model)
    # not the statistics of BatchNorm, and the loss that depends on them: DDP keeps rank 0's, we average them
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    seen = {"step": trainer.global_step, "callback": sorted(callback.state_dict()), "model": parameters}
    return seen | {"metrics": sorted(trainer.callback_metrics) if norm else trainer.callback_metrics}


@same_as_ddp
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_learning_rate_monitor(setting, interval):
    model = WithData("momentum")
    monitor = LearningRateMonitor(interval, log_momentum=True)

    def configure():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    model.configure_optimizers = configure
    logger = CSVLogger(setting.path, name="rates")
    trainer = setting.trainer(callbacks=[monitor], logger=logger, log_every_n_steps=1)
    trainer.fit(model)
    trainer.strategy.barrier()
    lines = (setting.path / "rates/version_0/metrics.csv").read_text().splitlines()
    return {
        "rates": {key: str(value) for key, value in monitor.lrs.items()},
        "lines": lines[:2],
        "model": state_of(model),
    }


@same_as_ddp
def test_lambda_callback(setting):
    calls = []
    names = ["setup", "on_train_start", "on_train_epoch_end", "on_validation_end", "on_train_end", "teardown"]
    callback = LambdaCallback(**{name: lambda *_, name=name, **__: calls.append(name) for name in names})
    setting.trainer(callbacks=[callback]).fit(WithData())
    return calls


@same_as_ddp
def test_timer(setting):
    timer = Timer(timedelta(seconds=0), interval="epoch")
    trainer = setting.trainer(callbacks=[timer], max_epochs=5)
    trainer.fit(WithData())
    elapsed = [timer.time_elapsed(stage) > 0 for stage in ("train", "validate", "test")]
    return {"epoch": trainer.current_epoch, "step": trainer.global_step, "elapsed": elapsed}


@same_as_ddp
def test_gradient_accumulation_scheduler(setting):
    model = WithData()
    trainer = setting.trainer(callbacks=[GradientAccumulationScheduler({1: 2, 2: 4})], max_epochs=3)
    trainer.fit(model)
    return {"step": trainer.global_step, "model": state_of(model)}


class WithBackbone(Regression):
    """A backbone that is frozen at first."""

    def __init__(self):
        super().__init__()
        self.net = network()
        self.backbone = nn.Sequential(nn.Linear(6, 6), nn.Tanh())

    def setup(self, stage):
        pass  # the first model is the constructor's

    def loss(self, batch):
        x, y = batch
        return super().loss((self.backbone(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


@same_as_ddp
@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")  # at each unfrozen epoch
def test_backbone_finetuning(setting):
    model = WithBackbone()
    callback = BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.5, backbone_initial_lr=0.01)
    trainer = setting.trainer(callbacks=[callback], max_epochs=3, unused_parameters=True)
    trainer.fit(model, loader())
    groups = [(len(group["params"]), str(group["lr"])) for group in trainer.optimizers[0].param_groups]
    grads = [p.requires_grad for p in model.parameters()]
    # Not the model: DDP never averages the gradients of what was frozen when it wrapped the module. Ours does.
    return {"groups": groups, "grads": grads, "step": trainer.global_step}


class Alike(WithData):
    """Starts from the same model on all ranks, to which the callback goes back."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def setup(self, stage):
        pass  # the first model is the constructor's


@same_as_ddp
@pytest.mark.parametrize("lottery", [True, False])
def test_pruning(setting, lottery):
    model = Alike()
    pruned = [(model.net[0], "weight"), (model.net[2], "weight")]
    ways = {"use_lottery_ticket_hypothesis": lottery, "make_pruning_permanent": lottery}
    callback = ModelPruning("l1_unstructured", pruned, amount=0.3, **ways)
    trainer = setting.trainer(callbacks=[callback], max_epochs=3)
    trainer.fit(model)
    zeros = [int((p == 0).sum()) for p in (model.net[0].weight, model.net[2].weight)]
    return {"keys": list(model.state_dict()), "zeros": zeros, "step": trainer.global_step, "model": state_of(model)}


@same_as_ddp
@pytest.mark.parametrize("interval", ["batch", "epoch"])
def test_prediction_writer(setting, interval):
    class Writer(BasePredictionWriter):
        def write_on_batch_end(self, trainer, pl_module, prediction, indices, batch, batch_idx, dataloader_idx):
            torch.save((prediction, indices), setting.path / f"batch-{batch_idx}-{trainer.global_rank}.pt")

        def write_on_epoch_end(self, trainer, pl_module, predictions, indices):
            torch.save((predictions, indices), setting.path / f"epoch-{trainer.global_rank}.pt")

    setting.path.mkdir(exist_ok=True)
    model = WithData()
    trainer = setting.trainer(callbacks=[Writer(interval)])
    trainer.fit(model)
    trainer.predict(model)
    trainer.strategy.barrier()
    return [(file.name, torch.load(file, weights_only=False)) for file in sorted(setting.path.glob("*.pt"))]


@same_as_ddp
def test_learning_rate_finder(setting):
    model = Regression()
    model.lr = 0.1
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=model.lr)
    setting.path.mkdir(exist_ok=True)
    trainer = setting.trainer(max_epochs=2)
    found = Tuner(trainer).lr_find(model, loader(20), num_training=12, update_attr=True)
    rates = [str(rate) for rate in found.results["lr"]]
    trainer.strategy.barrier()  # until rank 0 has removed its file
    after = {"step": trainer.global_step, "files": [file.name for file in setting.path.iterdir()]}
    trainer.fit(model, loader())
    seen = {"rates": rates, "losses": found.results["loss"], "found": found.suggestion(), "rate": model.lr}
    return seen | after | {"final": trainer.global_step, "model": state_of(model)}


@same_as_ddp
def test_batch_size_finder_refuses_several_workers(setting):
    model = WithData()
    model.batch_size = 2
    return catch(Tuner(setting.trainer()).scale_batch_size, model)


@same_as_ddp
def test_model_summary(setting):
    callback = ModelSummary(max_depth=2)
    trainer = setting.trainer(callbacks=[callback], enable_model_summary=True, fast_dev_run=True)
    trainer.fit(WithData())
    return str(callback._summary(trainer, trainer.lightning_module))
