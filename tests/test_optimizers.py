"""Optimizers of every kind, whose state stays the worker's own, and the loss scales of GradScaler."""

import math
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from schedulefree import AdamWScheduleFree, SGDScheduleFree
from torch import nn
from torch.optim import Optimizer

from lightning_localsgd import LocalSGDStrategy, Mean
from lightning_localsgd.optimizers import Optimizers
from tests.models import Constant, Regression, Trajectory, batch, loader, network, rank, trainer
from tests.reference import pr_sgd
from tests.workers import run_workers

PERIOD, STEPS = 3, 8  # the last round is cut short


class Odd(Optimizer):
    """SGD with learning rate 1 / (t + 1), whose state has an int, a list, None, and a tensor of one element."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    t = state.get("step", 0) + 1
                    state.update(step=t, history=[*state.get("history", []), t], nothing=None, lr=torch.ones(1) / t)
                    p -= 0.1 * state["lr"] * p.grad


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "foreach": partial(torch.optim.AdamW, lr=0.01, amsgrad=True, foreach=True),
    "fused": partial(torch.optim.AdamW, lr=0.01, fused=True),
    "fused SGD": partial(
        torch.optim.SGD, lr=0.05, fused=True
    ),  # torch 2.13: no momentum that begins at different times
    "Adagrad, with state from the start": partial(torch.optim.Adagrad, lr=0.05),
    "Adadelta": torch.optim.Adadelta,
    "Adamax": torch.optim.Adamax,
    "ASGD": partial(torch.optim.ASGD, t0=2),
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "RMSprop": partial(torch.optim.RMSprop, centered=True, momentum=0.9),
    "Rprop": torch.optim.Rprop,
    "LBFGS": partial(torch.optim.LBFGS, lr=0.1, max_iter=4, history_size=3),
    "odd state": Odd,
}


def loss(model: nn.Module, worker: int, t: int) -> torch.Tensor:
    """Use one of two heads, in turns that differ between workers: states are created at different times."""
    x, y = batch(worker, t - 1, dtype=torch.float64)
    if t <= 5:
        return ((model.net(x) - y) ** 2).mean()
    return ((model.heads[worker](model.net(x)) - y) ** 2).mean()


class Heads(Regression):
    def __init__(self, make: Callable[[Any], Optimizer]) -> None:
        super().__init__()
        self.make = make
        self.net = network(dtype=torch.float64)
        self.heads = nn.ModuleList(nn.Linear(1, 1, dtype=torch.float64) for _ in range(3))
        for head in self.heads:
            nn.init.constant_(head.weight, 0.5)
            nn.init.zeros_(head.bias)

    def setup(self, stage: str) -> None:
        pass

    def training_step(self, _: Any, batch_idx: int) -> torch.Tensor:
        return loss(self, rank(), batch_idx + 1)

    def configure_optimizers(self) -> Optimizer:
        return self.make(self.parameters())


def differences(names: list[str]) -> dict[str, float]:
    """Return how far each optimizer's run, after each step, is from the serial algorithm."""
    found = {}
    for name in names:
        model, trajectory = Heads(OPTIMIZERS[name]), Trajectory()
        start = deepcopy(model)
        trainer(2, PERIOD, callbacks=[trajectory]).fit(model, loader([STEPS] * 2))
        reference = pr_sgd(start, 2, PERIOD, STEPS, lambda x, name=name: OPTIMIZERS[name](x.parameters()), loss)
        expected = [{key: value.clone() for key, value in xs[rank()].state_dict().items()} for xs in reference]
        states = [*trajectory.states[: STEPS - 1], model.state_dict()]  # the last average comes after the last hook
        found[name] = max(
            (state[key] - value).abs().max().item()
            for state, values in zip(states, expected, strict=True)
            for key, value in values.items()
        )
    return found


def test_every_optimizer_is_the_serial_algorithm():
    for found in run_workers(differences, 2, list(OPTIMIZERS)):
        assert {name: difference for name, difference in found.items() if not difference < 1e-12} == {}


# -------------------------------------------------------------------------------------------------------- schedule-free


class ScheduleFree(Constant):
    """The square of the distance to rank + 1."""

    def __init__(self, make):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.make, self.seen = make, []

    def training_step(self, batch, batch_idx):
        return (self.weight - rank() - 1).square().sum() / 2

    def validation_step(self, batch, batch_idx):
        self.seen.append(self.weight.item())

    def configure_optimizers(self):
        return self.make(self.parameters())

    def on_train_start(self):
        self.optimizers().train()

    def on_validation_model_eval(self):
        super().on_validation_model_eval()
        self.optimizers().eval()

    def on_validation_model_train(self):
        super().on_validation_model_train()
        self.optimizers().train()


def fit_schedule_free(make, validates):
    model, trajectory = ScheduleFree(make), Trajectory()
    options = {"val_check_interval": 1} if validates else {"limit_val_batches": 0}
    run = trainer(2, PERIOD, callbacks=[trajectory], num_sanity_val_steps=0, **options)
    run.fit(model, loader([7, 7]), loader([1, 1]))
    return trajectory.column("weight"), model.seen


def paper(beta, gamma, steps):
    """Schedule-free SGD of two workers that average x and z; yields the y of both and the mean of their x."""
    x, z, target = [0.0, 0.0], [0.0, 0.0], [1, 2]
    for t in range(1, steps + 1):
        for i in (0, 1):
            y = (1 - beta) * z[i] + beta * x[i]
            z[i] -= gamma * (y - target[i])
            x[i] = (1 - 1 / t) * x[i] + z[i] / t
        if t % PERIOD == 0 or t == steps:
            x, z = [sum(x) / 2] * 2, [sum(z) / 2] * 2
        yield [(1 - beta) * z[i] + beta * x[i] for i in (0, 1)], sum(x) / 2


def test_schedule_free_averages_both_of_its_models():
    make = partial(SGDScheduleFree, lr=0.5, momentum=0.9)
    ends = run_workers(fit_schedule_free, 2, make, True)
    expected = list(paper(0.9, 0.5, 7))
    for worker, (ys, seen) in enumerate(ends):
        assert ys[:6] == pytest.approx([y[worker] for y, _ in expected[:6]], rel=1e-12)
        assert seen == pytest.approx([x for _, x in expected], rel=1e-12)  # what is validated is the mean of the x
    assert ends[0][1] == ends[1][1]
    without = run_workers(fit_schedule_free, 2, make, False)
    assert [ys for ys, _ in ends] == [ys for ys, _ in without]  # bit for bit


def refuse_schedule_free():
    strategy = LocalSGDStrategy(PERIOD, mean=Mean(nonfinite="exclude"))
    trainer(2, strategy).fit(ScheduleFree(AdamWScheduleFree), loader([3, 3]))


def test_schedule_free_and_exclude_are_refused():
    for end in run_workers(refuse_schedule_free, 2, catch=True):
        assert end.type == "ValueError"
        assert "is wrong for AdamWScheduleFree: it keeps a part of the model there" in end.message


# ----------------------------------------------------------------------------------------------------------- GradScaler


class Skips(Constant):
    """Rank 1's gradient overflows in its second batch, and so does its weight if asked for."""

    def __init__(self, breaks):
        super().__init__()
        self.breaks, self.scales = breaks, []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if rank() == 1 and batch_idx == 1:
            if self.breaks:
                self.weight.data.fill_(math.nan)
            return loss * math.inf
        return loss

    def on_train_batch_end(self, *_):
        self.scales.append(self.trainer.precision_plugin.scaler.get_scale())


def scaled(mean):
    model, trajectory = Skips(mean.nonfinite == "exclude"), Trajectory()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024, growth_interval=2)
    precision = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    run = trainer(2, LocalSGDStrategy(PERIOD, mean=mean), callbacks=[trajectory], plugins=[precision])
    run.fit(model, loader([6, 6]))
    return trajectory.column("weight"), model.scales, scaler.state_dict()["_growth_tracker"]


@pytest.mark.filterwarnings("ignore:Rank 1 was left out")
def test_a_skipped_step_neither_shifts_rounds_nor_leaves_scales_apart():
    (first, scales, tracker), (second, other_scales, other_tracker) = run_workers(scaled, 2, Mean())
    assert first == [-1, -2, -3.5, -4.5, -5.5, -8]
    assert second == [-2, -2, -3.5, -5.5, -7.5, -8]
    # It doubles after 2 good steps, and halves after a bad one; the average takes the lower one, one step old.
    assert scales == [1024, 2048, 512, 1024, 1024, 2048]
    assert other_scales == [1024, 512, 512, 1024, 1024, 2048]
    assert tracker == other_tracker == 0


@pytest.mark.filterwarnings("ignore:Rank 1 was left out")
def test_a_worker_that_is_left_out_has_no_say_in_the_scale():
    for weights, scales, _ in run_workers(scaled, 2, Mean(nonfinite="exclude")):
        assert weights[2] == -3
        assert scales[2] == 2048


def test_loss_scales_are_in_the_order_of_their_numbers():
    def optimizers(scale, tracker):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler._init_growth_tracker = tracker
        return Optimizers(nn.Linear(1, 1), scaler)

    pairs = [(2.0**-140, 3), (1e-3, 7), (1.0, 0), (1.0, 1999), (65536.0, 5), (2.0**100, 0)]
    numbers = [optimizers(*pair).loss_scale for pair in pairs]
    assert numbers == sorted(numbers)
    assert all(0 < number < 2**63 for number in numbers)
    for number in numbers:
        other = optimizers(4.0, 4)
        other.loss_scale = number
        assert other.loss_scale == number
    assert Optimizers(nn.Linear(1, 1), None).loss_scale == 0
    assert Optimizers(nn.Linear(1, 1), torch.amp.GradScaler("cpu", enabled=False)).loss_scale == 0


# ---------------------------------------------------------------------------------------------------------------- reset


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_a_reset_optimizer_steps_like_a_new_one(name):
    def train(model, optimizer, steps):
        for t in steps:

            def closure(t=t):
                optimizer.zero_grad()
                value = loss(model, 0, t)
                value.backward()
                return value

            optimizer.step(closure)

    old, new = Heads(OPTIMIZERS[name]), Heads(OPTIMIZERS[name])
    used = old.configure_optimizers()
    optimizers = Optimizers(old, None)
    optimizers.attach(lambda: [used], may_reset=True)
    train(old, used, (1, 2, 3))
    old.load_state_dict(new.state_dict())
    optimizers.reset(gradients=True)
    assert all(parameter.grad is None for parameter in old.parameters())
    train(old, used, (4, 5))
    train(new, new.configure_optimizers(), (4, 5))
    for one, other in zip(old.parameters(), new.parameters(), strict=True):
        assert torch.equal(one, other)
