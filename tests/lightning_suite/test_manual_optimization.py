"""Optimizer steps: the user's own, several optimizers, closures, precision, `torch.compile`."""

import pytest
import torch
from torch import nn

from tests.lightning_suite.compare import catch, loader, same_as_ddp
from tests.models import Regression, network, optimizer, state_of


def optimizer_states(trainer):
    return [optimizer.state_dict() for optimizer in trainer.optimizers]


class Manual(Regression):
    """Manual optimization in one of several ways."""

    def __init__(self, way, optimizer="sgd"):
        super().__init__(optimizer)
        self.automatic_optimization = False
        self.way, self.closures = way, 0

    def training_step(self, batch, batch_idx):
        getattr(self, self.way)(self.optimizers(), batch, batch_idx)

    def plain(self, optimizer, batch, batch_idx):
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()

    def accumulated(self, optimizer, batch, batch_idx):
        self.manual_backward(self.loss(batch) / 2)
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()

    def accumulated_without_sync(self, optimizer, batch, batch_idx):
        with optimizer.toggle_model(sync_grad=batch_idx % 2 == 1):
            self.manual_backward(self.loss(batch) / 2)
            if batch_idx % 2:
                optimizer.step()
                optimizer.zero_grad()

    def with_closure(self, optimizer, batch, batch_idx):
        def closure():
            self.closures += 1
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)

    def clipped(self, optimizer, batch, batch_idx):
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
        optimizer.step()

    def thrice(self, optimizer, batch, batch_idx):
        for _ in range(3):
            self.plain(optimizer, batch, batch_idx)

    def sometimes(self, optimizer, batch, batch_idx):
        if batch_idx != 1:
            self.plain(optimizer, batch, batch_idx)


@same_as_ddp
@pytest.mark.parametrize(
    "way",
    ["plain", "accumulated", "accumulated_without_sync", "with_closure", "clipped", "sometimes"],
)
def test_manual(setting, way):
    model = Manual(way, optimizer="momentum")
    trainer = setting.trainer()
    trainer.fit(model, loader(), loader(1))
    seen = {"step": trainer.global_step, "closures": model.closures, "optimizer": optimizer_states(trainer)}
    return seen | {"model": state_of(model)}


@same_as_ddp
def test_manual_optimization_refuses_what_it_cannot_do(setting):
    return [
        catch(setting.trainer(gradient_clip_val=1.0).fit, Manual("plain"), loader()),
        catch(setting.trainer(accumulate_grad_batches=2).fit, Manual("plain"), loader()),
    ]


class Adversaries(Regression):
    """A GAN in outline: the second network learns to tell the first one's outputs, in turns."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.judge = network(seed=5)
        self.trained = []

    def setup(self, stage):
        pass  # the first model is the constructor's

    def training_step(self, batch, batch_idx):
        generator, judge = self.optimizers()
        x, y = batch
        for current, loss in ((generator, self.fooled), (judge, self.judged)):
            self.toggle_optimizer(current)
            self.trained.append([p.requires_grad for p in self.parameters()])
            value = loss(x, y)
            current.zero_grad()
            self.manual_backward(value)
            current.step()
            self.untoggle_optimizer(current)
            self.log("loss", value, on_epoch=True, sync_dist=True)
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def fooled(self, x, y):
        return (self.judge(x * self.net(x)) ** 2).mean()

    def judged(self, x, y):
        return ((self.judge(x * self.net(x).detach()) - 1) ** 2).mean() + (self.judge(x * y) ** 2).mean()

    def configure_optimizers(self):
        optimizers = [optimizer("momentum", self.net.parameters()), optimizer("adamw", self.judge.parameters())]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in optimizers]


@same_as_ddp
@pytest.mark.filterwarnings("ignore:.*makes the workers wait for each other at every training step")  # as it does
def test_several_optimizers_in_turns(setting):
    model = Adversaries()
    trainer = setting.trainer(unused_parameters=True)
    trainer.fit(model, loader())
    rates = [str(optimizer.param_groups[0]["lr"]) for optimizer in trainer.optimizers]
    seen = {"step": trainer.global_step, "trained": model.trained, "rates": rates, "logged": trainer.logged_metrics}
    return seen | {"optimizers": optimizer_states(trainer), "model": state_of(model)}


@same_as_ddp
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sgd", {}),
        ("momentum", {}),
        ("adamw", {}),
        ("momentum", {"accumulate_grad_batches": 3}),
        ("adamw", {"gradient_clip_val": 0.05}),
    ],
    ids=str,
)
def test_automatic(setting, name, options):
    model = Regression(name)
    trainer = setting.trainer(**options)
    trainer.fit(model, loader())
    return {"step": trainer.global_step, "optimizer": optimizer_states(trainer), "model": state_of(model)}


class SkipsSteps(Regression):
    """Steps only at every second call."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


@same_as_ddp
def test_overridden_optimizer_step(setting):
    model = SkipsSteps("adamw")
    trainer = setting.trainer()
    trainer.fit(model, loader())
    return {"step": trainer.global_step, "optimizer": optimizer_states(trainer), "model": state_of(model)}


@same_as_ddp
def test_two_automatic_optimizers_are_refused(setting):
    model = Regression()
    model.configure_optimizers = lambda: [optimizer("sgd", model.parameters()) for _ in range(2)]
    return catch(setting.trainer().fit, model, loader())


@same_as_ddp
@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")  # as it does here
def test_no_optimizer(setting):
    model = Regression()
    model.configure_optimizers = lambda: None
    trainer = setting.trainer()
    trainer.fit(model, loader(), loader(1))
    return {"step": trainer.global_step, "model": state_of(model)}


@same_as_ddp
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision(setting, precision):
    model = Regression("momentum")
    trainer = setting.trainer(precision=precision)
    trainer.fit(model, loader(), loader(1))
    return {"step": trainer.global_step, "optimizer": optimizer_states(trainer), "model": state_of(model)}


@same_as_ddp
def test_compiled_module(setting):
    torch._dynamo.reset()
    model = Regression("momentum")
    trainer = setting.trainer()
    trainer.fit(torch.compile(model, backend="aot_eager"), loader(), loader(1))
    return {"step": trainer.global_step, "metrics": trainer.callback_metrics, "model": state_of(model)}


class Partly(Regression):
    """A module with a frozen part, tied weights, and a buffer."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.tied = nn.Linear(6, 8)
        self.tied.weight = self.net[0].weight
        self.register_buffer("seen", torch.zeros(1))

    def setup(self, stage):
        pass  # the first model is the constructor's

    def loss(self, batch):
        self.seen += 1
        x, y = batch
        return super().loss((self.frozen(x), y)) + self.tied(x).mean()


@same_as_ddp
def test_frozen_and_tied_parameters_and_buffers(setting):
    model = Partly()
    trainer = setting.trainer()
    trainer.fit(model, loader())
    tied = model.tied.weight is model.net[0].weight
    grads = [p.requires_grad for p in model.parameters()]
    return {"tied": tied, "requires_grad": grads, "keys": list(model.state_dict()), "model": state_of(model)}
