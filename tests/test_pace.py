"""Paces: Algorithm 3 against its serial reference, and what everything means where workers take unequal steps."""

import math
import os
import time
import warnings
from dataclasses import dataclass, field
from socket import gethostname
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader, Dataset, DistributedSampler, WeightedRandomSampler

from lightning_localsgd import (
    QSR,
    CommBudget,
    DiLoCo,
    DriftLimit,
    EveryEpoch,
    LocalSGDStrategy,
    PostLocal,
    Proportional,
    Schedule,
    SlowMo,
)
from lightning_localsgd.pace import Dealt, counts, in_groups, places, whole_steps
from tests import reference
from tests.algorithms import RATES, nesterov
from tests.models import Regression, batch, loader, network, optimizer, rank, same, state_of, trainer
from tests.versions import WEIGHTS_ONLY
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


def test_measured_speeds_are_cut_to_whole_steps_in_a_round():
    assert whole_steps([1.0, 0.5, 0.24], 8) == (1.0, 0.5, 0.25)  # 1.92 steps: hardly late with 2
    assert whole_steps([1.0, 0.34], 8) == (1.0, 0.25)  # 2.72 steps: the third would be late
    assert whole_steps([0.05, 1.0], 8) == (0.05, 1.0)
    assert whole_steps([1.0, 0.33], 100) == (1.0, 0.33)


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
    falls: bool = True  # the learning rate, which is put level at the ends of epochs too, also within a round

    def rate(self, t):
        return falling(t) if self.falls else 1.0


SETTINGS = {
    "Every": Setting(),
    "the first is slowest": Setting(speeds={1: (3,), 2: (0.2, 1), 4: (0.25, 1, 1, 1)}),
    "equal": Setting(speeds={1: (1,), 2: (2, 2), 4: (1, 1, 1, 1)}, samples=160),
    "EveryEpoch": Setting(period=EveryEpoch(), length=None, epochs=5),
    "longer than an epoch": Setting(period=30, length=30, samples=100, epochs=12, falls=False),
    "by steps": Setting(average="steps"),
    "FedNova": Setting(average="fednova"),
    "DiLoCo": Setting(outer=DiLoCo(), begin=nesterov(), optimizer="adamw"),
    "DiLoCo by steps": Setting(outer=DiLoCo(), begin=nesterov(), average="steps"),
    "average state": Setting(optimizer_state="average", speeds={1: (1,), 2: (1, 0.3), 4: (1, 0.9, 0.5, 0.4)}),
    "up to max_steps": Setting(options={"max_epochs": -1, "max_steps": 38}),
    "fewer batches than there are": Setting(options={"limit_train_batches": 10}, epochs=4, falls=False),
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
        scheduler = torch.optim.lr_scheduler.LambdaLR(made, lambda step: self.setting.rate(step + 1))
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
    """Return the steps of each worker in each round, by the rule.

    When the fastest has taken u of its E steps of an epoch, worker i has taken floor(u E_i / E) of its own.
    """
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
            gamma=lambda t, setting=setting: RATES[setting.optimizer] * setting.rate(t),
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
                expected = [RATES[setting.optimizer] * setting.rate(t + 1 + j) for j in range(I_s[i])]
                assert rates[k : k + I_s[i]] == pytest.approx(expected), name
                t, k = t + max(I_s), k + I_s[i]


# ---------------------------------------------------------------------------------------------- what everything means


@dataclass
class Plan:
    """A run for what it does to the rest of Lightning."""

    pace: Any = "equal"
    period: Any = 4
    samples: int = 96
    outer: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    checkpoint: Any = None  # a ModelCheckpoint's options
    slow: float = 0.0  # seconds by which rank 1's steps are longer
    resume: Any = None
    saves_at: int = 0  # rank 0's batch after which it saves
    exact: bool = False
    stops: bool = False  # by EarlyStopping


class Watched(Model):
    """Notes at which step it validates, and which samples it has had in each epoch."""

    def __init__(self, plan):
        super().__init__(Setting())
        self.plan, self.validated, self.epochs, self.counts = plan, [], {}, []

    def training_step(self, batch, batch_idx):
        time.sleep(self.plan.slow if rank() == 1 else 0.0)
        self.epochs.setdefault(self.current_epoch, []).extend(batch[2].tolist())
        self.counts.append(self.trainer.num_training_batches)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch[:2]), sync_dist=True)

    def on_validation_start(self):
        self.validated.append((self.trainer.global_step, self.trainer.strategy.worker.clock.start))


class Saves(Callback):
    def __init__(self, at, path):
        self.at, self.path = at, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if rank() == 0 and trainer.fit_loop.total_batch_idx + 1 == self.at:
            trainer.save_checkpoint(self.path)


def go(workers, plan, folder=None):
    seed_everything(1, verbose=False)
    model, rounds = Watched(plan), Rounds()
    callbacks = [rounds]
    if plan.checkpoint:
        callbacks.append(ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **plan.checkpoint))
    if plan.stops:
        callbacks.append(EarlyStopping("val_loss", patience=2, min_delta=100.0))
    if plan.saves_at:
        callbacks.append(Saves(plan.saves_at, f"{folder}/saved.ckpt"))
    strategy = LocalSGDStrategy(
        plan.period, outer=plan.outer, pace=plan.pace, checkpoint="exact" if plan.exact else "consensus"
    )
    options = {"max_epochs": 2, "use_distributed_sampler": True, "num_sanity_val_steps": 0} | plan.options
    run = trainer(workers, strategy, callbacks=callbacks, enable_checkpointing=plan.checkpoint is not None, **options)
    data = DataLoader(Points(plan.samples), batch_size=4, shuffle=True)
    validation = DataLoader(Points(8), batch_size=4) if any("val" in name for name in plan.options) else None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        start = time.perf_counter()
        run.fit(model, data, validation, ckpt_path=plan.resume, **(WEIGHTS_ONLY if plan.resume else {}))
        seconds = time.perf_counter() - start
    return {
        "ends": [(start, steps, state) for start, steps, _, state in rounds.ends],
        "state": state_of(model),
        "steps": rounds.steps,
        "global_step": run.global_step,
        "validated": model.validated,
        "epochs": model.epochs,
        "rates": model.rates,
        "batches": model.counts,
        "seconds": seconds,
        "said": [str(one.message) for one in said if "lightning_localsgd" in str(one.filename)],
    }


def go_all(workers, plans, folder=None):
    return {name: go(workers, plan, f"{folder}/{name}") for name, plan in plans.items()}


def run_plans(workers, plans, folder=None, **options):
    """Return for each plan what each rank returned."""
    ranks = run_workers(go_all, workers, workers, plans, folder, **options)
    return {name: [of_rank[name] for of_rank in ranks] for name in plans}


@pytest.mark.parametrize("workers", [2, 3])
def test_given_equal_speeds_it_is_the_equal_pace_bit_for_bit(workers):
    validates = {"val_check_interval": 4}
    pairs = {
        "plain": Plan(options=validates),
        "DiLoCo": Plan(outer=DiLoCo(), period=5),
        "PostLocal": Plan(period=PostLocal(6, then=4), options=validates),
        "accumulated": Plan(options={"accumulate_grad_batches": 2}),
        "stopped": Plan(options={"max_steps": 13, "max_epochs": -1}),
    }
    plans = {}
    for name, plan in pairs.items():
        plans[name] = plan
        plans[f"{name}, paced"] = Plan(**vars(plan) | {"pace": Proportional([2.0] * workers)})
    found = run_plans(workers, plans)
    for name in pairs:
        for one, other in zip(found[name], found[f"{name}, paced"], strict=True):
            assert same([one["state"], other["state"]]), name
            for what in ("rates", "epochs", "steps", "global_step"):
                assert one[what] == other[what], (name, what)
            if name != "PostLocal":  # there the pace puts a validation within a round off to its end
                assert [step for step, _ in one["validated"]] == [step for step, _ in other["validated"]], name


QUARTER = Proportional((1, 0.25))  # of 96 samples in batches of 4: 20 steps and 5


def test_everything_keeps_its_meaning(tmp_path):
    plans = {
        "epochs": Plan(QUARTER),
        "max_steps": Plan(QUARTER, options={"max_steps": 30, "max_epochs": -1}),
        "val": Plan(QUARTER, options={"val_check_interval": 0.25}),
        "val int": Plan(QUARTER, period=3, options={"val_check_interval": 7}),
        "val over epochs": Plan(QUARTER, period=3, options={"val_check_interval": 15, "check_val_every_n_epoch": None}),
        "val at the end": Plan(QUARTER, period=12, options={"val_check_interval": 1.0}),
        "checkpoint": Plan(QUARTER, checkpoint={"every_n_train_steps": 6}),
        "limit": Plan(QUARTER, options={"limit_train_batches": 0.5}),
        "fast dev run": Plan(QUARTER, options={"fast_dev_run": 3}),
        "uneven": Plan(QUARTER, period=PostLocal(5, then=4), samples=97),
        "stopped early": Plan(QUARTER, options={"val_check_interval": 4, "max_epochs": 3}, stops=True),
        "DDP first": Plan(QUARTER, period=PostLocal(15, then=4)),
        "gradients, then models in mid-epoch": Plan(QUARTER, period=PostLocal(5, then=4)),
        "reloaded": Plan(QUARTER, options={"reload_dataloaders_every_n_epochs": 1}),
        "QSR": Plan(QUARTER, period=QSR(0.1, 3)),
        "CommBudget, measured": Plan("proportional", period=CommBudget(0.3, at_most=6)),
        "SlowMo": Plan(QUARTER, outer=SlowMo(1.0, 0.4)),
    }
    found = run_plans(2, plans, tmp_path)
    everyone = {
        name: [[one[what] for one in ranks] for what in ("steps", "global_step")] for name, ranks in found.items()
    }
    # An epoch is the fastest worker's 20 steps, in which each sample is had once.
    assert everyone["epochs"] == [[40, 10], [40, 40]]
    assert everyone["max_steps"] == [[30, 7], [30, 30]]
    assert everyone["limit"] == [[20, 4], [20, 20]]
    assert everyone["fast dev run"] == [[3, 1], [3, 3]]
    assert everyone["reloaded"] == everyone["QSR"] == everyone["SlowMo"] == [[40, 10], [40, 40]]
    # While gradients are averaged all take the same steps: in the first epoch, 12, of which 15 are more.
    assert everyone["DDP first"] == [[24, 24], [24, 24]]
    assert everyone["gradients, then models in mid-epoch"] == [[32, 17], [32, 32]]
    for name in ("epochs", "val", "DDP first", "gradients, then models in mid-epoch"):
        for epoch in (0, 1):
            had = [index for one in found[name] for index in one["epochs"][epoch]]
            assert sorted(had) == list(range(96)), name
    # 49 samples and 48: 12 batches each, since the thirteenth would be one worker's alone.
    assert [len(one["epochs"][0]) for one in found["uneven"]] == [48, 48]
    assert [one["validated"] for one in found["stopped early"]] == [[(4, 4), (8, 8), (12, 12)]] * 2
    # Validation is where a round ends, all are there and all hold the same model.
    validated = {name: [one["validated"] for one in ranks] for name, ranks in found.items() if "val" in name}
    assert validated["val"] == [[(step, step) for step in (8, 12, 16, 20, 28, 32, 36, 40)]] * 2
    assert validated["val int"] == [[(step, step) for step in (9, 15, 27, 36)]] * 2
    assert validated["val over epochs"] == [[(15, 15), (30, 30)]] * 2
    assert [[step for step, _ in one] for one in validated["val at the end"]] == [[20, 40]] * 2
    # Checkpoints by steps are saved at the first end of a round that reaches them.
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == [
        f"step={step}.ckpt" for step in (12, 20, 24, 32, 36, 8)
    ]
    for ranks in found.values():
        assert same([one["state"] for one in ranks])
        assert not any(one["said"] for one in ranks), ranks[0]["said"]


def test_a_run_goes_on_where_the_fastest_was(tmp_path):
    """From the consensus in mid-epoch, saved in mid-round by the slow worker or the fast one, and at an epoch's end."""
    plans = {
        "slow": Plan(Proportional((0.25, 1)), saves_at=2),
        "fast": Plan(QUARTER, saves_at=10),
        "end": Plan(
            Proportional((0.25, 1)), period=12, checkpoint={"every_n_epochs": 1, "save_on_train_epoch_end": True}
        ),  # in the midst of a round
    }
    run_plans(2, plans, tmp_path)
    resumed = {
        name: Plan(plan.pace, plan.period, resume=f"{tmp_path}/{name}/{'step=20' if name == 'end' else 'saved'}.ckpt")
        for name, plan in plans.items()
    }
    found = run_plans(2, resumed)
    # The slow worker has had 2 of its 5 steps where the fast one has had 8 of 20; or the fast one 10, and the slow 2.
    # From step 10 on the slow one has no step before the second round, which begins with step 15.
    for name, firsts, steps in (("slow", (9, 9), (8, 32)), ("fast", (11, 15), (30, 7)), ("end", (21, 21), (5, 20))):
        assert [one["steps"] for one in found[name]] == list(steps), name
        assert [one["global_step"] for one in found[name]] == [40, 40], name
        assert [one["rates"][0] for one in found[name]] == pytest.approx([0.05 * falling(t) for t in firsts]), name
        assert same([one["state"] for one in found[name]])


def test_a_sleeping_worker_gets_less_to_do():
    pace = {"pace": Proportional(), "options": {"max_epochs": 4}, "samples": 240}
    found = run_plans(2, {"slow": Plan(**pace, slow=0.06), "equal": Plan(**pace)})
    first, *later = [[len(one["epochs"][epoch]) for one in found["slow"]] for epoch in range(4)]
    assert first == [120, 120]
    for fast, slow in later:
        assert fast + slow == 240
        assert fast > 2.5 * slow
    # Lightning counts the batches of the fastest, which has more from the second epoch on.
    assert [one["batches"][0] for one in found["slow"]] == [30, 30]
    last = [one["batches"][-1] for one in found["slow"]]
    assert last[0] == last[1] == math.ceil(later[-1][0] / 4)
    for ranks in found.values():
        for epoch in range(4):
            assert sorted(index for one in ranks for index in one["epochs"][epoch]) == list(range(240))


class Noting(Schedule):
    """Rounds of 4 steps; notes what is known at the start of each."""

    needs = frozenset({"seconds"})

    def __init__(self):
        self.known = []

    def length(self, progress):
        self.known.append(progress)
        return 4


def wait_for_the_slow_one(slow):
    schedule = Noting()
    go(2, Plan(period=schedule, slow=slow))
    return [(known.seconds_waiting, known.seconds_per_step) for known in schedule.known]


def test_waiting_for_a_slower_worker_is_reported_apart():
    first, second = run_workers(wait_for_the_slow_one, 2, 0.05)
    assert first == second
    assert first[0] == (None, None)
    waiting, step = first[-1]
    assert waiting > 3 * 0.05  # of the 4 steps, of which each is so much longer
    assert step < 0.05  # the lower median of two is the fast worker's


# ------------------------------------------------------------------------------------------------------------- refused


def test_refuses_what_is_no_pace():
    for pace in ("fast", None, 2):
        with pytest.raises(ValueError, match='`pace` must be "equal", "proportional" or a `Proportional`, got'):
            LocalSGDStrategy(8, pace=pace)
    for speeds in ((), (1, 0), (1, -1), (1, math.inf), (1, True), "fast", 3):
        with pytest.raises(ValueError, match="`speeds` must be a number above 0 for each rank, got"):
            Proportional(speeds)
    with pytest.raises(ValueError, match='`average` must be "uniform", "steps" or "fednova", got'):
        Proportional(average="mean")


def test_refuses_where_it_has_no_effect_or_no_meaning():
    with pytest.raises(ValueError, match="`pace` has no effect"):
        LocalSGDStrategy(1, pace="proportional")
    with pytest.raises(ValueError, match="asks in a round whether it ends"):
        LocalSGDStrategy(DriftLimit(0.5, check=2), pace="proportional")


class Manual(Regression):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Stepwise(Regression):
    def __init__(self, frequency):
        super().__init__()
        self.frequency = frequency

    def configure_optimizers(self):
        made = optimizer("sgd", self.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(made, 1)
        how = {"scheduler": scheduler, "interval": "step", "frequency": self.frequency}
        return {"optimizer": made, "lr_scheduler": how}


def refuse():
    """Return what is said to each; nothing is trained."""
    points = Points(40)
    map_style = DataLoader(points, batch_size=4)
    sampled = DataLoader(points, batch_size=4, sampler=WeightedRandomSampler([1.0] * 40, 40))
    local = int(os.environ["LOCAL_RANK"])
    uneven = DataLoader(points, batch_size=4 + local)
    dropping = DistributedSampler(points, 2, local, drop_last=True)
    dealt = {"use_distributed_sampler": True}
    cases = {
        "speeds": (Regression(), map_style, dealt, Proportional((1, 1, 1))),
        "stream": (Regression(), loader([4, 4]), dealt, "proportional"),
        "not dealt": (Regression(), map_style, {"use_distributed_sampler": False}, "proportional"),
        "sampler": (Regression(), sampled, dealt, "proportional"),
        "drops": (
            Regression(),
            DataLoader(points, sampler=dropping),
            {"use_distributed_sampler": False},
            "proportional",
        ),
        "one of them": (Regression(), loader([4, 4]) if local else map_style, dealt, "proportional"),
        "uneven": (Regression(), uneven, dealt, "proportional"),
        "loaders": (Regression(), [map_style, map_style], dealt, "proportional"),
        "manual": (Manual(), map_style, dealt, "proportional"),
        "frequency": (Stepwise(2), map_style, dealt, "proportional"),
        "few": (Regression(), DataLoader(Points(1)), dealt, "proportional"),
    }
    said = {}
    for name, (model, data, options, pace) in cases.items():
        try:
            trainer(2, LocalSGDStrategy(4, pace=pace), **options).fit(model, data)
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def test_refuses_data_and_modules_that_follow_each_workers_own_steps():
    first, second = run_workers(refuse, 2)
    of_one, of_other = (said.pop("one of them") for said in (first, second))
    assert of_one.startswith(
        f"RuntimeError: Rank 1 on host {gethostname()} failed where all ranks must succeed: ValueError: `pace` must be"
    )
    assert of_other.startswith("ValueError: `pace` must be 'equal' where the samples are not dealt")
    assert first == second
    for name, words in {
        "drops": "drops samples or deals to others than the 2 workers, got drop_last=True and num_replicas=2.",
        "speeds": "`speeds` must have one for each of the 2 workers, got (1, 1, 1).",
        "stream": "got a DataLoader with `_InfiniteConstantSampler` and `NoneType`",
        "not dealt": "got a DataLoader with `SequentialSampler` and `BatchSampler`",
        "sampler": "other samplers of one's own, got a DataLoader with `DistributedSamplerWrapper`",
        "uneven": "the workers' loaders differ in (samples, batch size, drop_last, shuffle, seed), got on the ranks",
        "loaders": "`pace` must be 'equal' with more than one training loader, got 2.",
        "manual": "`pace` must be 'equal' with manual optimization",
        "frequency": "must have the frequency 1 and not look for a plateau where `pace` is not 'equal', got StepLR",
        "few": "There must be a batch for each of the 2 workers, got 1 samples in batches of 1.",
    }.items():
        assert first[name].startswith("ValueError"), (name, first[name])
        assert words in first[name], (name, first[name])
