"""Degenerate settings: period 1 is DDP, one worker is plain training, twice is twice."""

import os

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_localsgd import LocalSGDStrategy, Progress, Schedule
from tests.models import Regression, Trajectory, loader, network, rank, same, state_of, trainer
from tests.workers import run_workers


class Unused(Regression):
    """Uses one of its two heads, another one on each rank; a third is never used."""

    def __init__(self, name):
        super().__init__(name)
        self.heads = nn.ModuleList(nn.Linear(1, 1) for _ in range(3))

    def setup(self, stage):
        super().setup(stage)
        for head in self.heads:
            nn.init.constant_(head.weight, 0.5)
            nn.init.zeros_(head.bias)

    def loss(self, batch):
        x, y = batch
        return ((self.heads[rank() % 2](self.net(x)) - y) ** 2).mean()


class Norm(Regression):
    def __init__(self, name):
        super().__init__(name, norm=True)


class Gan(LightningModule):
    """Two networks, two optimizers, toggled by hand."""

    def __init__(self, name):
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = network(1)[:2], network(2)

    def training_step(self, batch, batch_idx):
        generate, criticise = self.optimizers()
        noise = batch[0]
        self.toggle_optimizer(generate)
        generate.zero_grad()
        self.manual_backward(self.critic(self.generator(noise)[:, :6]).mean())
        generate.step()
        self.untoggle_optimizer(generate)
        self.toggle_optimizer(criticise)
        criticise.zero_grad()
        fake = self.generator(noise)[:, :6].detach()
        self.manual_backward(((self.critic(noise) - 1) ** 2).mean() + (self.critic(fake) ** 2).mean())
        criticise.step()
        self.untoggle_optimizer(criticise)

    def configure_optimizers(self):
        return [torch.optim.Adam(net.parameters(), lr=0.01) for net in (self.generator, self.critic)]


def fit(module, name, strategy, workers, options):
    torch.manual_seed(3)
    model, trajectory = module(name), Trajectory()
    run = trainer(workers, strategy, callbacks=[trajectory], max_epochs=2, **options)
    run.fit(model, loader([6] * workers))
    optimizers = [optimizer.state_dict() for optimizer in run.optimizers]
    return trajectory.states, state_of(model), optimizers


def ddp():
    return DDPStrategy(find_unused_parameters=True)


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize(
    ("module", "name", "options"),
    [
        (Regression, "sgd", {}),
        (Regression, "momentum", {"gradient_clip_val": 0.5}),
        (Regression, "adamw", {"accumulate_grad_batches": 4}),
        (Regression, "adamw", {"precision": "bf16-mixed"}),
        (Unused, "adamw", {}),
        (Gan, "", {}),
    ],
)
def test_period_1_is_ddp(module, name, options, workers):
    ours = run_workers(fit, workers, module, name, 1, workers, options)
    theirs = run_workers(fit, workers, module, name, ddp(), workers, options)
    for (states, end, optimizers), (other_states, other_end, other_optimizers) in zip(ours, theirs, strict=True):
        assert len(states) == len(other_states)
        assert same([end, other_end])
        for one, other in zip(states, other_states, strict=True):
            assert same([one, other])
        torch.testing.assert_close(optimizers, other_optimizers, rtol=0, atol=0)
    assert same([end for _, end, _ in ours])


def test_period_1_averages_the_buffers_of_which_ddp_keeps_rank_0s():
    ours = run_workers(fit, 2, Norm, "sgd", 1, 2, {})
    theirs = run_workers(fit, 2, Norm, "sgd", ddp(), 2, {})
    for one, other in zip(ours[0][0], ours[1][0], strict=True):
        assert same([one, other])
    # Both workers start from the same statistics, so the mean after one step is known from DDP's two.
    first, second = (states[0] for states, _, _ in theirs)
    mean = (first["net.1.running_mean"] + second["net.1.running_mean"]) / 2
    torch.testing.assert_close(ours[0][0][0]["net.1.running_mean"], mean)
    assert torch.equal(ours[0][1]["net.0.weight"], theirs[0][1]["net.0.weight"])


@pytest.mark.parametrize("period", [1, 3, 100])
@pytest.mark.parametrize(
    ("module", "name", "options"),
    [
        (Norm, "momentum", {"accumulate_grad_batches": 2}),
        (Regression, "adamw", {"precision": "bf16-mixed"}),
        (Gan, "", {}),
    ],
)
def test_one_worker_is_plain_training(module, name, options, period):
    (ours,) = run_workers(fit, 1, module, name, period, 1, options)
    (plain,) = run_workers(fit, 1, module, name, "auto", 1, options)
    for one, other in zip(ours[0], plain[0], strict=True):
        assert same([one, other])
    torch.testing.assert_close(ours[2], plain[2], rtol=0, atol=0)


def test_one_worker_with_lbfgs_is_plain_training():
    (ours,) = run_workers(fit, 1, Regression, "lbfgs", 2, 1, {})
    (plain,) = run_workers(fit, 1, Regression, "lbfgs", "auto", 1, {})
    assert same([ours[1], plain[1]])


@pytest.mark.parametrize(
    ("module", "name", "options"),
    [
        (Regression, "lbfgs", {}),
        (Gan, "", {}),
        (Unused, "adamw", {}),
        (Norm, "adamw", {"accumulate_grad_batches": 4}),
        (Norm, "momentum", {"precision": "bf16-true"}),
    ],
)
def test_replicas_are_equal_after_each_average_and_only_then(module, name, options):
    ranks = run_workers(fit, 2, module, name, 3, 2, options)
    batches = options.get("accumulate_grad_batches", 1)
    # With accumulation an epoch of 6 batches has 2 steps, after its 4th and its last batch.
    steps = [0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 4] if batches > 1 else list(range(1, 13))
    for step, before, states in zip(
        steps, [0, *steps], zip(*(states for states, _, _ in ranks), strict=True), strict=False
    ):
        if step > before:
            assert same(list(states)) == (step % 3 == 0), step
    assert same([end for _, end, _ in ranks])


class RawSteps(Gan):
    """Steps its optimizers past Lightning."""

    def training_step(self, batch, batch_idx):
        for net, optimizer in zip((self.generator, self.critic), self.optimizers(), strict=True):
            optimizer.zero_grad()
            net(batch[0]).mean().backward()
            optimizer.optimizer.step()


def test_steps_past_lightnings_optimizers_count_too():
    ranks = run_workers(fit, 2, RawSteps, "", 3, 2, {})
    pairs = zip(*(states for states, _, _ in ranks), strict=True)
    assert [same(list(pair)) for pair in pairs] == [False, False, True] * 4


class StepsLater(Gan):
    """Steps its optimizers in the hook after the training step."""

    def training_step(self, batch, batch_idx):
        for net, optimizer in zip((self.generator, self.critic), self.optimizers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(net(batch[0]).mean())

    def on_train_batch_end(self, *_):
        for optimizer in self.optimizers():
            optimizer.step()


def test_steps_in_a_later_hook_count_with_the_next_training_step():
    ranks = run_workers(fit, 2, StepsLater, "", 3, 2, {})
    moved = [
        torch.stack([state["critic.0.weight"] for state in pair]) for pair in zip(ranks[0][0], ranks[1][0], strict=True)
    ]
    apart = [(pair[0] - pair[1]).abs().max() for pair in moved]
    # Callbacks see the weights before the hook's step: after the 4th and the 7th training step they have just been
    # averaged, 3 steps each.
    assert [distance == 0 for distance in apart[:8]] == [True, False, False, True, False, False, True, False]


class Unfreezes(Norm):
    """Trains its first layer from the third batch on."""

    def setup(self, stage):
        super().setup(stage)
        self.net[0].requires_grad_(False)

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 2:
            self.net[0].requires_grad_(True)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_are_averaged_also_of_what_is_unfrozen_later(accumulate):
    first, second = run_workers(fit, 2, Unfreezes, "momentum", 1, 2, {"accumulate_grad_batches": accumulate})
    moved = [states["net.0.weight"] for states in first[0]]
    assert torch.equal(moved[0], moved[1])
    assert not torch.equal(moved[1], moved[3])
    for batch in range(accumulate - 1, 12, accumulate):
        assert same([first[0][batch], second[0][batch]]), batch


class Lengths(Schedule):
    def __init__(self, *lengths):
        self.lengths = lengths

    def length(self, progress: Progress):
        return self.lengths[min(progress.round, len(self.lengths) - 1)]


def fit_and_look_for_the_reducer(lengths):
    model, wrapped, trajectory = Norm("momentum"), [], Trajectory()

    class Looks(Trajectory):
        def on_train_batch_end(self, trainer, *_):
            wrapped.append(isinstance(trainer.strategy.model, DistributedDataParallel))

    run = trainer(2, LocalSGDStrategy(Lengths(*lengths)), callbacks=[trajectory, Looks()])
    run.fit(model, loader([8, 8]))
    hooks = sum(len(param._backward_hooks or {}) for param in model.parameters())
    return trajectory.states, wrapped, hooks


def test_from_gradients_to_models_and_not_back():
    # Rounds of 1, 1, 3, then 1: the reducer is gone after step 2, and comes back neither for step 6 nor later.
    (first, wrapped, hooks), (second, other, _) = run_workers(fit_and_look_for_the_reducer, 2, [1, 1, 3, 1])
    assert wrapped == other == [True] + [False] * 7
    assert hooks == 0
    equal = [same([one, two]) for one, two in zip(first, second, strict=True)]
    assert equal == [True, True, False, False, True, True, True, True]


def fit_twice(period):
    model = Norm("adamw")
    data, trajectory = loader([5, 5]), Trajectory()
    run = trainer(2, period, callbacks=[trajectory])
    before = run.validate(model, loader([2, 2]), verbose=False)
    run.fit(model, data)
    once = state_of(model)
    run.fit_loop.max_epochs = 2
    run.fit(model, data)
    twice = state_of(model)
    after = run.validate(model, loader([2, 2]), verbose=False)
    tested = trainer(2, period).test(Evaluated(model), loader([2, 2]), verbose=False)
    predicted = trainer(2, period).predict(Evaluated(model), loader([2, 2]))
    again = trainer(2, period, callbacks=[trajectory])
    again.fit(model, data)
    return once, twice, before, after, tested, len(predicted), state_of(model), trajectory.states


class Evaluated(LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.model.loss(batch), sync_dist=True)

    def predict_step(self, batch, batch_idx):
        return self.model.net(batch[0])


@pytest.mark.parametrize("period", [1, 4])
def test_a_second_fit_and_evaluation_before_and_after(period):
    first, second = run_workers(fit_twice, 2, period)
    for i in (0, 1, 6):
        assert same([first[i], second[i]])
    assert not same([first[0], first[1]])
    assert first[2:6] == second[2:6]
    assert first[3][0]["val_loss"] == pytest.approx(first[4][0]["test_loss"])
    assert first[5] == 2
    equal = [same([one, two]) for one, two in zip(first[7], second[7], strict=True)]
    assert equal == [True] * 15 if period == 1 else equal == [False, False, False, True, False] * 3


def fit_compiled():
    model = Regression("adamw")
    trajectory = Trajectory()
    run = trainer(2, 3, callbacks=[trajectory])
    run.fit(torch.compile(model), loader([6, 6]))
    return trajectory.states, os.environ["LOCAL_RANK"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's own compiler calls it
def test_a_compiled_module_trains_the_same():
    compiled = run_workers(fit_compiled, 2, timeout=200)
    plain = run_workers(fit, 2, Regression, "adamw", 3, 2, {})
    for (states, _), (other, _, _) in zip(compiled, plain, strict=True):
        for one, two in zip(states, other[:6], strict=True):
            for name, value in one.items():
                torch.testing.assert_close(value, two[name], atol=1e-5, rtol=0)
    assert same([states[5] for states, _ in compiled])
