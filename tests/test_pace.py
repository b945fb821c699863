"""Paces: Algorithm 3 against its serial reference, and what everything means where workers take unequal steps."""

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback, seed_everything
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_localsgd import (
    DiLoCo,
    EveryEpoch,
    LocalSGDStrategy,
    Proportional,
)
from lightning_localsgd.pace import Dealt, counts, in_groups, places
from tests import reference
from tests.algorithms import RATES, nesterov
from tests.models import Regression, batch, network, optimizer, same, state_of, trainer
from tests.workers import run_workers

# ------------------------------------------------------------------------------------------------------------ the data

SHARES = st.lists(st.floats(0.05, 1), min_size=1, max_size=6)


@pytest.mark.drawn
@given(SHARES, st.integers(0, 500))
def test_counts_are_in_proportion(shares, samples):
    found = counts(samples, shares)
    assert sum(found) == samples
    for count, share in zip(found, shares, strict=True):
        assert abs(count - samples * share / sum(shares)) < 1


@pytest.mark.drawn
@given(SHARES, st.integers(1, 500), st.integers(0, 20))
def test_each_gets_at_least_so_many_if_there_are(shares, samples, at_least):
    found = counts(samples, shares, at_least=min(at_least, samples // len(shares)))
    assert sum(found) == samples
    assert min(found) >= min(at_least, samples // len(shares))


@pytest.mark.drawn
@given(st.lists(st.integers(0, 40), min_size=1, max_size=5))
def test_places_are_spread_evenly_and_each_is_had_once(counts):
    found = [places(counts, rank) for rank in range(len(counts))]
    assert sorted(place for of_rank in found for place in of_rank) == list(range(sum(counts)))
    for count, of_rank in zip(counts, found, strict=True):
        for index, place in enumerate(of_rank):
            assert abs(place - (index + 0.5) * sum(counts) / count) <= len(counts)


def dealt(samples, shares, size, drop_last=False, shuffle=True, epoch=0):
    samplers = []
    for number in range(len(shares)):
        stock = DistributedSampler(range(samples), len(shares), number, shuffle=shuffle, seed=3)
        sampler = Dealt(stock, lambda: shares, size, drop_last)
        sampler.set_epoch(epoch)
        samplers.append(sampler)
    return samplers


@pytest.mark.drawn
@given(SHARES, st.integers(6, 300), st.booleans(), st.integers(0, 3))
def test_each_sample_is_dealt_once_an_epoch(shares, samples, shuffle, epoch):
    samplers = dealt(samples, shares, 4, shuffle=shuffle, epoch=epoch)
    assert sorted(index for sampler in samplers for index in sampler) == list(range(samples))
    assert [len(list(sampler)) for sampler in samplers] == samplers[0].counts()
    assert {len(sampler) for sampler in samplers} == {max(samplers[0].counts())}


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_equal_shares_are_dealt_as_by_the_stock_sampler(workers):
    for number, sampler in enumerate(dealt(24, [0.5] * workers, 4, epoch=2)):
        stock = DistributedSampler(range(24), workers, number, seed=3)
        stock.set_epoch(2)
        assert list(sampler) == list(stock)


def test_orders_differ_between_epochs():
    first, second = (list(dealt(40, [1, 0.5], 4, epoch=epoch)[0]) for epoch in (0, 1))
    assert first != second


def test_batches_are_counted_with_drop_last():
    (sampler, *_) = dealt(30, [1, 0.5], 4)
    assert sampler.counts() == [20, 10]
    assert sampler.batches() == [5, 3]
    (sampler, *_) = dealt(30, [1, 0.5], 4, drop_last=True)
    assert sampler.batches() == [5, 2]


def test_refuses_fewer_batches_than_workers():
    with pytest.raises(ValueError, match="There must be a batch for each of the 3 workers, got 2 samples"):
        dealt(2, [1, 1, 1], 1)
    with pytest.raises(ValueError, match="got 11 samples in batches of 4"):
        dealt(11, [1, 1, 1], 4, drop_last=True)


def test_speeds_that_differ_by_less_than_a_tenth_count_as_equal():
    assert in_groups([1.0, 0.95, 0.91]) == (1.0, 1.0, 1.0)
    assert in_groups([0.5, 0.89, 1.0]) == (0.5, 0.89, 1.0)
    assert in_groups([2.0]) == (1.0,)


# ------------------------------------------------------------------------------------------- against the reference


class Points(Dataset):
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        (x,), (y,) = batch(0, index, size=1)
        return x, y, index


def falling(t):
    """The learning rate of step t, from 1, as a multiple of the first."""
    return 1 / (1 + 0.1 * (t - 1))


@dataclass
class Setting:
    """A run of Algorithm 3; each worker has `speeds[rank] / sum(speeds)` of the samples."""

    speeds: dict[int, tuple[float, ...]] = field(default_factory=lambda: {1: (1,), 2: (1, 0.3), 4: (1, 0.5, 0.3, 0.1)})
    period: Any = 4
    length: Any = 4  # of a round, in the fastest worker's steps, or None for a pass
    average: str = "uniform"
    outer: Any = None
    begin: Any = reference.plain
    optimizer_state: str = "keep"
    optimizer: str = "momentum"
    samples: int = 170
    epochs: int = 3
    options: dict[str, Any] = field(default_factory=dict)
    accumulate: int = 1


SETTINGS = {
    "Every": Setting(),
    "the first is slowest": Setting(speeds={1: (3,), 2: (0.2, 1), 4: (0.25, 1, 1, 1)}),
    "equal": Setting(speeds={1: (1,), 2: (2, 2), 4: (1, 1, 1, 1)}, samples=160),
    "EveryEpoch": Setting(period=EveryEpoch(), length=None, epochs=5),
    "longer than an epoch": Setting(period=30, length=30, samples=100, epochs=12),
    "by steps": Setting(average="steps"),
    "FedNova": Setting(average="fednova"),
    "DiLoCo": Setting(outer=DiLoCo(), begin=nesterov(), optimizer="adamw"),
    "DiLoCo by steps": Setting(outer=DiLoCo(), begin=nesterov(), average="steps"),
    "average state": Setting(optimizer_state="average", speeds={1: (1,), 2: (1, 0.3), 4: (1, 0.9, 0.5, 0.4)}),
    "up to max_steps": Setting(options={"max_epochs": -1, "max_steps": 38}),
    "fewer batches than there are": Setting(options={"limit_train_batches": 10}, epochs=4),
}


class Model(Regression):
    def __init__(self, setting):
        super().__init__(setting.optimizer)
        self.setting = setting
        self.batches, self.rates = [], []

    def training_step(self, batch, batch_idx):
        x, y, index = batch
        self.batches.append(index.tolist())
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        return self.loss((x, y))

    def configure_optimizers(self):
        made = optimizer(self.name, self.parameters())
        scheduler = torch.optim.lr_scheduler.LambdaLR(made, lambda step: falling(step + 1))
        return {"optimizer": made, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Rounds(Callback):
    """Keeps the model, the steps of this worker and the common step where a round has ended."""

    def __init__(self):
        self.ends = []
        self.steps = 0

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.steps += 1
        self.look(trainer, pl_module)

    def look(self, trainer, pl_module):
        clock = trainer.strategy.worker.clock
        if clock.taken == 0 and (not self.ends or self.ends[-1][0] < clock.start):
            self.ends.append((clock.start, self.steps, trainer.global_step, state_of(pl_module)))

    def on_train_end(self, trainer, pl_module):
        self.look(trainer, pl_module)


def fit(workers, setting, **options):
    seed_everything(1, verbose=False)
    model, rounds = Model(setting), Rounds()
    strategy = LocalSGDStrategy(
        setting.period,
        outer=setting.outer,
        optimizer_state=setting.optimizer_state,
        pace=Proportional(setting.speeds[workers], average=setting.average),
    )
    more = {"max_epochs": setting.epochs, "use_distributed_sampler": True} | setting.options | options
    run = trainer(workers, strategy, callbacks=[rounds], **more)
    run.fit(model, DataLoader(Points(setting.samples), batch_size=4, shuffle=True))
    return model, rounds, run


def run_all(workers):
    found = {}
    for name, setting in SETTINGS.items():
        model, rounds, run = fit(workers, setting)
        found[name] = rounds.ends, model.batches, model.rates, run.global_step, run.current_epoch
    return found


def steps_of_rounds(setting, epochs, samples):
    """Return the steps of each worker in each round, by the rule: when the fastest has taken u of its E steps of an
    epoch, worker i has taken floor(u E_i / E) of its own."""
    total = setting.options.get("max_steps", math.inf)
    limit = setting.options.get("limit_train_batches", math.inf)
    e = [math.ceil(count / 4) for count in samples]
    fastest = min(max(e), limit)
    e = [max(1, count * fastest // max(e)) for count in e]
    done, rounds, at, length = [0] * len(e), [], 0, 0
    for epoch in range(epochs):
        for u in range(1, fastest + 1):
            length += 1
            at += 1
            ends = length == setting.length or (setting.length is None and u == fastest)
            if ends or at == total or (epoch == epochs - 1 and u == fastest):
                now = [epoch * count + u * count // fastest for count in e]
                rounds.append([a - b for a, b in zip(now, done, strict=True)])
                done, length = now, 0
            if at == total:
                return rounds
    return rounds


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_equals_the_serial_reference_after_every_round(workers):
    ranks = run_workers(run_all, workers, workers, timeout=90)
    if workers == 1:
        return  # with one worker there is nobody to wait for: that it trains is all
    for name, setting in SETTINGS.items():
        found = [of_rank[name] for of_rank in ranks]
        speeds = setting.speeds[workers]
        samples = counts(setting.samples, [speed / max(speeds) for speed in speeds], at_least=4)
        epochs = 3 if "max_steps" in setting.options else setting.epochs
        rounds = steps_of_rounds(setting, epochs, samples)
        assert len(rounds) >= 5, name
        data = [batches for _, batches, *_ in found]
        fastest = max(range(workers), key=lambda i: speeds[i])
        assert [len(batches) for batches in data] == [sum(of) for of in zip(*rounds, strict=True)], name

        def loss(x, i, k, data=data):
            return (
                (
                    x(torch.stack([Points(999)[j][0] for j in data[i][k]]))
                    - torch.stack([Points(999)[j][1] for j in data[i][k]])
                )
                ** 2
            ).mean()

        made = reference.heterogeneous(
            network(seed=0),
            workers,
            rounds,
            lambda x_i, setting=setting: optimizer(setting.optimizer, x_i.parameters()),
            loss,
            setting.begin,
            gamma=lambda t, setting=setting: RATES[setting.optimizer] * falling(t),
            weigh=setting.average,
            state=setting.optimizer_state,
        )
        ends = {start: state for start, _, _, state in found[fastest][0]}
        t = 0
        for I_s, xs in zip(rounds, made, strict=True):
            t += max(I_s)
            for key, value in xs[0].state_dict().items():
                torch.testing.assert_close(ends[t][f"net.{key}"], value, atol=1e-6, rtol=1e-5, msg=f"{name}, {t}")
        assert {of_rank[3] for of_rank in found} == {t}, name  # `global_step` counts the fastest worker's
        for of_rank in found:
            for start, _, global_step, state in of_rank[0]:
                assert global_step == start, name
                assert same([state, ends[start]]), name
        # The learning rate is the common one at the start of each round.
        for i, (_, _, rates, *_) in enumerate(found):
            t, k = 0, 0
            for I_s in rounds:
                expected = [RATES[setting.optimizer] * falling(t + 1 + j) for j in range(I_s[i])]
                assert rates[k : k + I_s[i]] == pytest.approx(expected), name
                t, k = t + max(I_s), k + I_s[i]
