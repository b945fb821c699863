"""Averages that land some steps after their round: where, what is seen meanwhile, and what if something fails."""

import time
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback, callbacks
from torch import nn

from lightning_localsgd import AtEnd, AverageState, DiLoCo, Every, EveryEpoch, LocalSGDStrategy, Mean, Stages
from tests.models import Constant, Regression, Trajectory, loader, same, state_of, trainer
from tests.workers import run_workers


def fit(strategy, model, lengths, *watch, **options):
    run = trainer(len(lengths), strategy, callbacks=list(watch), **options)
    run.fit(model, loader(lengths))
    return run


class Looks(Trajectory):
    """Keeps the consensus after each step, too."""

    def __init__(self):
        super().__init__()
        self.consensus = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        super().on_train_batch_end(trainer, pl_module, *args)
        with trainer.strategy.consensus():
            self.consensus.append(pl_module.weight.item())
        assert pl_module.weight.item() == self.states[-1]["weight"].item()


class Synchronizes(Trajectory):
    def on_train_batch_end(self, trainer, pl_module, batch, outputs, batch_idx):
        if batch_idx == 3:
            trainer.strategy.synchronize()
        super().on_train_batch_end(trainer, pl_module)


class Unfreezes(Regression):
    """Trains its second layer only from this batch on."""

    def __init__(self, batch=5):
        super().__init__()
        self.batch = batch

    def setup(self, stage):
        super().setup(stage)
        self.net[-1].requires_grad_(False)

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == self.batch:
            self.net[-1].requires_grad_(True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Counts(Regression):
    """Has batch norm, and a buffer of each kind that counts or says something."""

    def __init__(self):
        super().__init__("adamw", norm=True)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int16))
        self.register_buffer("seen", torch.zeros(2, dtype=torch.bool))

    def training_step(self, batch, batch_idx):
        self.steps += 1
        self.seen[self.global_rank] = True
        return super().training_step(batch, batch_idx)


class Aliases(Constant):
    """Has its one weight under two names that are not tied."""

    def __init__(self):
        super().__init__()
        self.other = nn.Parameter(torch.zeros(1))
        self.other.data = self.weight.data


class Starts(Callback):
    """Keeps the buffers after each step."""

    def __init__(self):
        self.buffers = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.buffers.append({name: value.clone() for name, value in pl_module.named_buffers()})


def many():
    """Return what several runs of two workers have found."""
    found = {}
    for delay in (0, 1, 2, 3):
        watch = Looks()
        model = Constant()
        run = fit(LocalSGDStrategy(3, mean=Mean(delay=delay)), model, [8, 8], watch)
        found[delay] = watch.column("weight"), watch.consensus, model.weight.item(), run.strategy._last.clock.round
    watch = Synchronizes()
    model = Constant()
    fit(LocalSGDStrategy(3, mean=Mean(delay=3)), model, [8, 8], watch)
    found["synchronize"] = watch.column("weight"), model.weight.item()
    for wire in ("float32", "int8"):
        watch, model = Trajectory(), Unfreezes()
        fit(LocalSGDStrategy(3, mean=Mean(delay=2, wire=wire)), model, [14, 14], watch)
        found["unfreezes", wire] = watch.states, state_of(model)
    for frozen in ("send", "skip"):  # in flight
        watch, model = Trajectory(), Unfreezes(4)
        fit(LocalSGDStrategy(3, mean=Mean(delay=2, frozen=frozen)), model, [14, 14], watch)
        found["in flight", frozen] = watch.states, state_of(model)
    watch, model = Trajectory(), Aliases()
    fit(LocalSGDStrategy(3, mean=Mean(delay=2)), model, [8, 8], watch)
    found["aliases"] = watch.column("weight"), model.weight.item(), model.other.item()
    watch, model = Starts(), Counts()
    fit(LocalSGDStrategy(4, mean=Mean(delay=2)), model, [14, 14], watch)
    found["buffers"] = watch.buffers, state_of(model)
    watch, model = Trajectory(), Constant()
    run = fit(LocalSGDStrategy(3, mean=Mean(delay=2), outer=DiLoCo()), model, [4, 11], watch, max_epochs=2)
    found["uneven"] = watch.column("weight"), model.weight.item()
    model = Constant()
    fit(LocalSGDStrategy(EveryEpoch(), mean=Mean(delay=9)), model, [5, 5], max_epochs=2)
    found["longer than a round"] = model.weight.item()
    return found


@pytest.fixture(scope="module")
def ranks():
    return run_workers(many, 2, timeout=200)


def test_on_paper(ranks):
    # Gradients 1 and 2, learning rate 1. A round of 3 ends at -3 and -6, whose mean is -4.5; each goes on from there
    # with what it has done meanwhile.
    expected = {
        0: ([-1, -2, -4.5, -5.5, -6.5, -9, -10, -11], [-2, -4, -4.5, -6.5, -8.5, -9, -11, -13]),
        1: ([-1, -2, -3, -5.5, -6.5, -7.5, -10, -11], [-2, -4, -6, -6.5, -8.5, -10.5, -11, -13]),
        2: ([-1, -2, -3, -4, -6.5, -7.5, -8.5, -11], [-2, -4, -6, -8, -8.5, -10.5, -12.5, -13]),
        3: ([-1, -2, -3, -4, -5, -7.5, -8.5, -9.5], [-2, -4, -6, -8, -10, -10.5, -12.5, -14.5]),
    }
    for delay, trajectories in expected.items():
        for rank, (own, consensus, end, rounds) in enumerate(found[delay] for found in ranks):
            assert own == trajectories[rank], delay
            assert consensus == [(one + other) / 2 for one, other in zip(*trajectories, strict=True)], delay
            assert (end, rounds) == (-12, 3), delay


def test_synchronize_averages_at_once(ranks):
    # At step 3 an average of -3 and -6 takes off; at step 4, at -4 and -8, it lands: -5.5 and -6.5, whose mean is -6.
    for rank, (own, end) in enumerate(found["synchronize"] for found in ranks):
        assert own[:4] == [[-1, -2, -3, -6], [-2, -4, -6, -6]][rank]
        assert end == -12


@pytest.mark.parametrize("wire", ["float32", "int8"])
def test_what_is_unfrozen_starts_equal_on_all_workers(ranks, wire):
    (one, end), (other, other_end) = (found["unfreezes", wire] for found in ranks)
    # The round in which a layer was unfrozen ends at once, after step 6, and after step 9 averages have a delay again.
    agree = [same([a, b]) for a, b in zip(one, other, strict=True)]
    assert agree == [step == 6 for step in range(1, 15)]
    assert same([end, other_end])


def test_what_is_unfrozen_in_flight_lands_with_the_rest(ranks):
    (one, end), (other, other_end) = (found["in flight", "send"] for found in ranks)
    (same_one, same_end), (same_other, _) = (found["in flight", "skip"] for found in ranks)
    for a, b in zip([*one, *other, end, other_end], [*same_one, *same_other, same_end, same_end], strict=True):
        assert same([a, b])
    assert same([end, other_end])


def test_two_names_of_one_memory(ranks):
    assert [found["aliases"] for found in ranks] == [
        ([-1, -2, -3, -4, -6.5, -7.5, -8.5, -11], -12, -12),
        ([-2, -4, -6, -8, -8.5, -10.5, -12.5, -13], -12, -12),
    ]


def test_buffers_take_their_mean_and_counters_lose_nothing(ranks):
    (one, end), (other, other_end) = (found["buffers"] for found in ranks)
    assert same([end, other_end])
    for step, (a, b) in enumerate(zip(one, other, strict=True), start=1):
        assert a["steps"].item() == b["steps"].item() == step
        assert a["net.1.num_batches_tracked"].item() == step
        assert a["net.1.running_mean"].equal(b["net.1.running_mean"]) == (step in (6, 10, 14))
    assert one[4]["seen"].tolist() == [True, False]
    assert one[5]["seen"].tolist() == [True, True]


def test_uneven_data_and_long_delays(ranks):
    (one, end), (other, other_end) = (found["uneven"] for found in ranks)
    assert end == other_end
    assert len(one) == 8
    assert len(other) == 22
    # Rounds of a pass, of 5 steps: the first average lands where the next round ends, before the fit does.
    assert [found["longer than a round"] for found in ranks] == [-15, -15]


def fails(where):
    """Rank 1 leaves while an average is under way; return how soon."""

    class Fails(Constant):
        def training_step(self, batch, batch_idx):
            if batch_idx == 4 and self.global_rank == 1:
                raise OSError("disk is gone")
            time.sleep(0.05)
            return super().training_step(batch, batch_idx)

    start = time.monotonic()
    strategy = LocalSGDStrategy(Every(4), mean=Mean(delay=where), timeout=timedelta(seconds=60))
    try:
        fit(strategy, Fails(), [40, 40])
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return None


@pytest.mark.parametrize("delay", [1, 4])
def test_who_leaves_in_flight_lets_no_one_hang(delay):
    others, leaver = run_workers(fails, 2, delay, timeout=50)
    assert leaver[:2] == ("OSError", "disk is gone")
    assert others[0] == "RuntimeError"
    assert "another worker has left" in others[1]
    assert max(leaver[2], others[2]) < 20


class Explodes(Constant):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * torch.inf if self.global_rank == 1 and batch_idx == 1 else loss


def excludes():
    model, watch = Explodes(), Trajectory()
    fit(LocalSGDStrategy(3, mean=Mean(delay=2, nonfinite="exclude")), model, [7, 7], watch)
    return watch.column("weight"), model.weight.item()


@pytest.mark.filterwarnings("ignore:Rank 1 was left out")
def test_who_is_not_finite_restarts_where_the_average_of_the_others_lands():
    (one, end), (other, other_end) = run_workers(excludes, 2)
    # Rank 0 alone counts: -3 at step 3, and lands at step 5 where it is; rank 1 restarts there, without its own steps.
    assert one == [-1, -2, -3, -4, -5, -6, -7]
    assert other[4:6] == [-3, -5]
    assert end == other_end


def ema(delay):
    average = callbacks.EMAWeightAveraging(decay=0.5)
    model = Constant()
    fit(LocalSGDStrategy(3, mean=Mean(delay=delay)), model, [9, 9], average)
    return model.weight.item()  # the average is in it now


@pytest.mark.skipif(not hasattr(callbacks, "EMAWeightAveraging"), reason="of lightning 2.6")
def test_an_average_of_weights_follows_the_starts_of_rounds():
    # Of the starts -4.5, -9 and -13.5, each for 3 steps; a delay leaves them the same where gradients are constant.
    assert run_workers(ema, 2, 0) == run_workers(ema, 2, 2) == [-12.8671875, -12.8671875]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"period": 4, "mean": Mean(delay=5)}, "`delay` must be at most the period, .*, got 5 with Every"),
        ({"period": AtEnd(), "mean": Mean(delay=1)}, "`delay` must be 0 with `AtEnd`"),
        ({"period": 1, "mean": Mean(delay=1)}, "`mean` has no effect"),
        ({"period": 1, "mean": Mean(wire="int8")}, "`mean` has no effect"),
        ({"period": 4, "mean": Mean(delay=1), "optimizer_state": "average"}, '`optimizer_state` must be "keep" or'),
        (
            {"period": AtEnd(), "mean": Mean(delay=1), "optimizer_state": AverageState()},
            '`optimizer_state` must be "keep" or',
        ),
    ],
)
def test_what_has_no_effect_or_no_meaning_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LocalSGDStrategy(**arguments)


class Slice(Constant):
    def __init__(self):
        super().__init__()
        self.part = nn.Parameter(torch.zeros(4, 6)[:, :3])


def trains_a_slice():
    fit(LocalSGDStrategy(Stages({0: 2}), mean=Mean(delay=1)), Slice(), [3])


def test_a_slice_cannot_be_trained_with_a_delay():
    (raised,) = run_workers(trains_a_slice, 1, catch=True)
    assert raised.type == "ValueError"
    assert "memory of their own, and `part` is a slice" in raised.message


def alone():
    plain, delayed = Regression("momentum"), Regression("momentum")
    fit(LocalSGDStrategy(4), plain, [10])
    fit(LocalSGDStrategy(4, mean=Mean(delay=2, wire="int4")), delayed, [10])
    return state_of(plain), state_of(delayed)


def test_one_worker_is_plain_training():
    ((plain, delayed),) = run_workers(alone, 1)
    assert same([plain, delayed])
