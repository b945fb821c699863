"""The monitor: what it tells is known on paper, and the training is that without it, bit for bit."""

import csv
import math
import sys
from collections import Counter
from functools import partial

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import LearningRateFinder, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn

from lightning_localsgd import (
    AdaComm,
    AtEnd,
    AverageState,
    DiLoCo,
    DriftLimit,
    Every,
    EveryEpoch,
    LocalSGDMonitor,
    LocalSGDStrategy,
    Mean,
    Outer,
    PostLocal,
    Round,
    Schedule,
    SlowMo,
    Spread,
)
from lightning_localsgd import monitor as module_of_monitor
from tests.models import Constant, Regression, Trajectory, loader, rank, same, state_of, trainer
from tests.workers import Raised, run_workers


class Logs(Constant):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


class Ears(LocalSGDMonitor):
    """Keeps what it hears."""

    def __init__(self, anchor=False):
        super().__init__(anchor)
        self.rounds, self.spreads = [], []

    def _hear_round(self, one):
        super()._hear_round(one)
        self.rounds.append(one)

    def _hear_spread(self, one):
        super()._hear_spread(one)
        self.spreads.append(one)


# ----------------------------------------------------------------------------------------------- what is known on paper


def heard(period, lengths, anchor=True, every=1):
    """Gradient rank + 1, learning rate 1: in a round of I steps worker i moves by I (i + 1)."""
    ears = Ears(anchor)
    run = trainer(len(lengths), LocalSGDStrategy(period), callbacks=[ears], log_every_n_steps=every)
    run.fit(Constant(), loader(lengths))
    return ears.rounds, ears.spreads, ears.totals.compute()


def test_rounds_and_spreads():
    for rounds, spreads, totals in run_workers(heard, 2, 3, [7, 7]):
        assert [(one.number, one.step, one.steps, one.averaged) for one in rounds] == [
            (0, 3, 3, "models"), (1, 6, 3, "models"), (2, 7, 1, "models"),
        ]  # fmt: skip
        # One float32: an all-reduce in a ring of 2 sends 2 (2 - 1) / 2 times 4 bytes, DDP that in each step.
        assert [(one.sent, one.sent_by_ddp) for one in rounds] == [(4, 12), (4, 12), (4, 4)]
        for one in rounds:
            assert 0 < one.average_seconds <= one.blocked_seconds < one.seconds
            assert one.share == one.blocked_seconds / one.seconds
            assert one.slowest in (0, 1)
        # From 0: to -3 and -6, mean -4.5; from there as far; and one step more.
        assert spreads == [
            Spread(0, apart=(1.5, 1.5), moved=(3, 6), together=4.5),
            Spread(1, apart=(1.5, 1.5), moved=(3, 6), together=4.5),
            Spread(2, apart=(0.5, 0.5), moved=(1, 2), together=1.5),
        ]
        assert totals["period"] == 7 / 3
        assert totals["bytes_sent"] == 4
        assert totals["bytes_saved"] == 28 / 3 - 4
        assert totals["drift"] == pytest.approx(math.sqrt((1.5**2 + 1.5**2 + 0.5**2) / 3))
        assert totals["drift_relative"] == pytest.approx(1 / 3)
        assert totals["noise"] == pytest.approx(0.25)  # (4.5 + 4.5 + 0.5) / (18 + 18 + 2)
        spared = sum((one.steps - 1) * one.average_seconds for one in rounds)
        assert totals["total_spared_seconds"] == pytest.approx(spared)


def heard_of(mean, every=1):
    ears = Ears()
    run = trainer(2, LocalSGDStrategy(3, mean=mean), callbacks=[ears], log_every_n_steps=every)
    run.fit(Constant(), loader([8, 8]))
    return ears.rounds, ears.spreads


def test_delays_and_wires():
    for rounds, spreads in run_workers(heard_of, 2, Mean(delay=2, wire="int8")):
        assert [(one.number, one.step, one.steps) for one in rounds] == [(0, 3, 3), (1, 6, 3), (2, 8, 2)]
        # One parameter is a block of 128 integers and its scale for each owner; it is counted as a part of one.
        assert all(one.sent == 130 // 128 for one in rounds)
        # Each round moves the workers by 3 and 6 from where the last one's mean leads, whenever that lands.
        assert [one.apart for one in spreads] == [pytest.approx((1.5, 1.5), rel=0.06)] * 2 + [
            pytest.approx((1.0, 1.0), rel=0.06)
        ]
    (raised,) = run_workers(asks_for_moves, 1, catch=True)
    assert raised.type == "ValueError"
    assert "listen without `moves`" in raised.message


@pytest.mark.parametrize(("period", "every", "numbers"), [(3, 5, [0, 2, 4]), (3, 50, [0]), (2, 4, [0, 2, 4, 6])])
@pytest.mark.parametrize("anchor", [False, True])
def test_in_so_many_steps_the_drift_is_measured_once(period, every, numbers, anchor):
    # Rounds begin at the steps 0, 3, 6, 9, 12; 0, 6 and 12 are the first of 0 to 4, 5 to 9, 10 to 14.
    for rounds, spreads, totals in run_workers(heard, 2, period, [14, 14], anchor, every):
        assert len(rounds) == math.ceil(14 / period)
        assert [one.number for one in spreads] == numbers
        whole = [one for one in spreads if one.number < 14 // period]
        assert all(one.apart == (period / 2, period / 2) for one in whole)
        assert [one.moved == (period, 2 * period) for one in whole] == [anchor] * len(whole)
        assert totals["drift"] == pytest.approx(math.sqrt(sum(one.drift**2 for one in spreads) / len(spreads)))


def test_that_holds_for_averages_that_land_late():
    for rounds, spreads in run_workers(heard_of, 2, Mean(delay=2), 5):
        assert [one.number for one in rounds] == [0, 1, 2]
        assert [(one.number, one.apart) for one in spreads] == [(0, (1.5, 1.5)), (2, (1, 1))]


def asks_for_moves():
    trainer(1, LocalSGDStrategy(3, mean=Mean(delay=1)), callbacks=[Ears(anchor=True)]).fit(Constant(), loader([3]))


def test_who_has_not_worked_does_not_count():
    rounds, spreads, _ = run_workers(heard, 3, 2, [2, 4, 4])[0]
    assert [one.steps for one in rounds] == [2, 2]
    # To -2, -4, -6, mean -4; then without rank 0 to -8 and -10, mean -9.
    assert spreads[0] == Spread(0, apart=(2, 0, 2), moved=(2, 4, 6), together=4)
    assert spreads[1].apart[1:] == (1, 1)
    assert spreads[1].moved[1:] == (4, 6)
    assert math.isnan(spreads[1].apart[0])
    assert math.isnan(spreads[1].moved[0])
    assert spreads[1].together == 5
    assert spreads[1].drift == 1


def test_without_an_anchor_there_is_the_drift_alone():
    _, spreads, totals = run_workers(heard, 2, 3, [3, 3], False)[1]
    assert [one.apart for one in spreads] == [(1.5, 1.5)]
    assert math.isnan(spreads[0].together)
    assert totals["drift"] == 1.5
    assert not totals.keys() & {"drift_relative", "cosine", "noise"}


def test_while_gradients_are_averaged():
    rounds, spreads, totals = run_workers(heard, 2, PostLocal(2, then=Every(3)), [8, 8])[0]
    assert [(one.step, one.averaged) for one in rounds] == [
        (1, "gradients"), (2, "gradients"), (5, "models"), (8, "models"),
    ]  # fmt: skip
    assert all(one.sent == one.sent_by_ddp == 4 for one in rounds[:2])
    assert math.isnan(rounds[0].average_seconds)
    assert math.isnan(rounds[0].share)
    assert rounds[0].slowest is None
    assert [one.number for one in spreads] == [2, 3]
    assert (totals["rounds"], totals["local_rounds"], totals["local_steps"]) == (4, 2, 6)


def test_one_worker():
    ((rounds, spreads, totals),) = run_workers(heard, 1, 3, [7])
    assert [one.steps for one in rounds] == [3, 3, 1]
    assert all(one.sent == 0 and one.slowest is None for one in rounds)
    assert spreads == []
    assert "drift" not in totals


def test_moments_are_counted():
    def sent(rounds):
        return [one.sent for one in rounds]

    plain, every, one = run_workers(of_moments, 2)[0]
    assert sent(plain) == [4 * 65] * 2  # the network has 65 parameters
    assert sent(every) == [3 * 4 * 65] * 2
    assert sent(one) == [4 * 65, 2 * 4 * 65]


def of_moments():
    found = []
    for state in ("keep", "average", AverageState(every={"exp_avg": 2})):
        ears = Ears()
        trainer(2, LocalSGDStrategy(3, optimizer_state=state), callbacks=[ears]).fit(
            Regression("adamw"), loader([6, 6])
        )
        found.append(ears.rounds)
    return found


def test_the_numbers_of_a_spread():
    apart = math.sqrt(0.5)
    crossed = Spread(0, apart=(apart, apart), moved=(1, 1), together=apart)  # (1, 0) and (0, 1)
    assert crossed.cosine == pytest.approx(0)
    assert crossed.relative == pytest.approx(1)
    assert crossed.variance == pytest.approx(1)
    assert crossed.signal == pytest.approx(0)
    against = Spread(0, apart=(1, 1), moved=(1, 1), together=0)  # (1) and (-1)
    assert against.cosine == -1
    assert math.isnan(against.relative)
    assert math.isnan(against.noise)
    three = Spread(0, apart=(3, 0, 3), moved=(3, 6, 9), together=6)
    assert three.drift == math.sqrt(6)
    assert three.cosine == 1
    assert three.noise == pytest.approx(9 / 33)
    alone = Spread(0, apart=(math.nan, 0), moved=(math.nan, 6), together=6)
    assert alone.drift == 0
    assert math.isnan(alone.cosine)
    assert math.isnan(alone.noise)


def test_who_is_slowest():
    times = Round(0, 8, 8, "models", 1.0, 0.1, 0.2, 0, 0, step_seconds=(0.1, math.nan, 0.3, 0.3))
    assert times.slowest == 2


# --------------------------------------------------------------------------------------------- the training is the same


class Mixed(Regression):
    """Trained and frozen parameters, and buffers, of sizes that no bucket fits."""

    def __init__(self, optimizer="adamw"):
        super().__init__(optimizer, norm=True)
        torch.manual_seed(rank())
        self.frozen = nn.Linear(6, 37).requires_grad_(False)
        self.last = nn.Parameter(torch.randn(5))

    def loss(self, batch):
        x, y = batch
        return ((self.net(x) + self.last.mean() + self.frozen(x).mean() - y) ** 2).mean()


class Curious(Schedule):
    """Says that it needs nothing, and remembers all that it is told."""

    def __init__(self):
        self.told = []

    def length(self, progress):
        self.told.append(progress)
        return 2


WAYS = {
    "every": lambda: LocalSGDStrategy(3),
    "small buckets": lambda: LocalSGDStrategy(3, mean=Mean(1e-4)),
    "one": lambda: LocalSGDStrategy(1),
    "epoch": lambda: LocalSGDStrategy(EveryEpoch()),
    "end": lambda: LocalSGDStrategy(AtEnd()),
    "post-local": lambda: LocalSGDStrategy(PostLocal(4, then=3)),
    "adacomm": lambda: LocalSGDStrategy(AdaComm(4, every=4)),
    "drift": lambda: LocalSGDStrategy(DriftLimit(1.0, first=2, check=2)),
    "diloco": lambda: LocalSGDStrategy(3, outer=DiLoCo()),
    "shapes": lambda: LocalSGDStrategy(3, outer=Outer(partial(torch.optim.Adafactor, lr=0.1))),
    "slowmo": lambda: LocalSGDStrategy(3, outer=SlowMo(0.5)),
    "states": lambda: LocalSGDStrategy(3, optimizer_state="average"),
    "skip": lambda: LocalSGDStrategy(3, mean=Mean(frozen="skip")),
    "curious": lambda: LocalSGDStrategy(Curious()),
}


def trained(monitors):
    """Return for each way the states after each step, the optimizer's included, and what else must not differ."""
    found = {}
    for name, make in WAYS.items():
        for monitor in monitors:
            strategy, trajectory = make(), Trajectory()
            callbacks = [trajectory] if monitor is None else [trajectory, Ears(monitor and name != "one")]
            model = Mixed()
            run = trainer(5, strategy, callbacks=callbacks, max_epochs=2, log_every_n_steps=1)
            run.fit(model, loader([7] * 5), loader([1] * 5))
            moments = run.optimizers[0].state_dict()["state"]
            states = [*trajectory.states, state_of(model)]
            states += [{key: value for key, value in one.items() if torch.is_tensor(value)} for one in moments.values()]
            told = strategy.schedule.told if name == "curious" else []
            spreads = [] if monitor is None else [one.number for one in callbacks[1].spreads]
            found.setdefault(name, []).append((states, told, spreads))
    return found


def test_the_training_is_the_same_bit_for_bit():
    # Five workers: the order in which five numbers are added depends on their places in the buckets.
    for found in run_workers(trained, 5, [None, False, True], timeout=300):
        assert list(found) == list(WAYS)
        for name, ((plain, told, _), *others) in found.items():
            assert len(plain) > 14
            for states, told_then, spreads in others:
                assert all(same([one, other]) for one, other in zip(plain, states, strict=True)), name
                assert told_then == told, name
                assert bool(spreads) == (name != "one"), name


def restarted():
    ears = Ears()
    finder = LearningRateFinder(num_training_steps=5, update_attr=False)
    run = trainer(2, 3, callbacks=[ears, finder])
    run.fit(Tuned(), loader([6, 6]))
    return ears.totals.compute()["rounds"], run.global_step


class Tuned(Regression):
    def __init__(self):
        super().__init__()
        self.lr = 0.1


def test_a_search_for_the_learning_rate_is_not_counted():
    for rounds, steps in run_workers(restarted, 2):
        assert 1 <= steps <= 6  # Lightning 2.5.0 goes on in the epoch where the search has left it
        assert rounds == math.ceil(steps / 3)


# ------------------------------------------------------------------------------------------------------ what it costs


def collectives(period, anchor):
    callbacks = [] if anchor is None else [LocalSGDMonitor(anchor)]
    run = trainer(2, LocalSGDStrategy(period), callbacks=callbacks, log_every_n_steps=1)
    with torch.profiler.profile() as profile:
        run.fit(Mixed(), loader([8, 8]))
    return Counter(event.name for event in profile.events() if event.name.startswith("gloo:"))


def all_collectives():
    return [
        (period, [collectives(period, anchor) for anchor in (None, False, *([True] if period != 1 else []))])
        for period in (1, 3, PostLocal(3, then=Every(2)))
    ]


def test_it_sends_nothing():
    for found in run_workers(all_collectives, 2):
        for period, (plain, *others) in found:
            assert plain, period
            assert others == [plain] * len(others), period


# --------------------------------------------------------------------------------------------------- where it is shown


def logged(folder, every, tensorboard):
    loggers = [CSVLogger(folder, name="", version="csv")]
    if tensorboard:
        loggers.append(TensorBoardLogger(folder, name="", version="tb"))
    bar = TQDMProgressBar()
    run = trainer(
        2,
        LocalSGDStrategy(PostLocal(2, then=Every(3))),
        callbacks=[LocalSGDMonitor(anchor=True), bar],
        logger=loggers,
        log_every_n_steps=every,
        enable_progress_bar=True,
    )
    run.fit(Logs(), loader([11, 11]))
    return bar.get_metrics(run, run.lightning_module)


def installed(name):
    try:
        __import__(name)
    except ImportError:
        return False
    return True


ROUNDS = ("step", "localsgd/step", "localsgd/round", "localsgd/period", "localsgd/drift", "localsgd/bytes_sent")


def written(folder):
    with (folder / "csv" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_loggers_and_the_progress_bar(tmp_path):
    tensorboard = installed("tensorboard")
    shown, _ = run_workers(logged, 2, str(tmp_path), 1, tensorboard)
    assert (shown["round"], shown["period"]) == (5, 3)
    table = written(tmp_path)
    *rows, totals = [tuple(row[name] and float(row[name]) for name in ROUNDS) for row in table if not row["loss"]]
    # Under the step of the batch that ended the round, as Lightning counts: from 0. The drift comes a round late.
    assert rows == [
        (0, 1, 1, 1, "", 4),
        (1, 2, 2, 1, "", 4),
        (4, 5, 3, 3, "", 4),
        (7, 8, 4, 3, 1.5, 4),
        (10, 11, 5, 3, 1.5, 4),
        (11, "", "", "", 1.5, ""),
    ]
    assert totals == (11, "", "", "", "", "")
    assert float(table[-1]["localsgd/total/local_steps"]) == 9
    names = [name for name in table[0] if name.startswith("localsgd/") and "/total/" not in name]
    assert names == [
        "localsgd/" + name
        for name in (
            "averaging_seconds", "blocked_seconds", "blocked_share", "bytes_saved", "bytes_sent", "cosine", "drift",
            "drift_of_rank/0", "drift_of_rank/1", "drift_relative", "noise", "period", "round", "slowest", "step",
        )
    ]  # fmt: skip
    assert {row["step"]: row["loss"] for row in table if row["loss"]}["4"] != ""
    if tensorboard:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "tb")).Reload()
        assert [(one.step, one.value) for one in events.Scalars("localsgd/drift")] == [(7, 1.5), (10, 1.5), (11, 1.5)]


def test_what_is_not_written_at_once_is_in_the_next_mean(tmp_path):
    run_workers(logged, 2, str(tmp_path), 4, False)
    table = written(tmp_path)
    *rows, totals = [tuple(row[name] and float(row[name]) for name in ROUNDS) for row in table if not row["loss"]]
    # Rounds end at 1, 2, 5, 8, 11: written when a multiple of 4 is passed. Three of 1, 1 and 3 steps first.
    assert rows == [
        (4, 5, 3, 5 / 3, "", 4),
        (7, 8, 4, 3, 1.5, 4),
        (11, 11, 5, 3, 1.5, 4),
    ]
    assert totals == (11, "", "", "", "", "")


class Breaks(Logs):
    def training_step(self, batch, batch_idx):
        if batch_idx == 7:
            raise RuntimeError("enough")
        return super().training_step(batch, batch_idx)


def breaks(folder):
    run = trainer(
        1, 3, callbacks=[LocalSGDMonitor()], logger=CSVLogger(folder, name="", version="csv"), log_every_n_steps=100
    )
    with pytest.raises(RuntimeError, match="enough"):
        run.fit(Breaks(), loader([9]))
    run.logger.save()


def test_a_fit_that_fails_has_its_rounds_written(tmp_path):
    run_workers(breaks, 1, str(tmp_path))
    row, totals = written(tmp_path)
    assert (row["localsgd/round"], row["localsgd/step"]) == ("2.0", "6.0")
    assert totals["localsgd/total/rounds"] == "2.0"


TOTALS = {
    "rounds": 104.0, "local_rounds": 4.0, "local_steps": 34.0, "total_averaging_seconds": 0.5,
    "total_blocked_seconds": 0.75, "blocked_share": 0.031, "total_sent": 1.2e9, "total_sent_by_ddp": 34e9,
    "total_spared_seconds": 3.75, "drift": 0.125, "drift_relative": 0.5, "cosine": 0.75, "noise": 2.5,
}  # fmt: skip


def test_the_table(capsys, monkeypatch):
    lines = module_of_monitor.rows(TOTALS)
    assert lines == [
        ("steps that averaged gradients", "100"),
        ("rounds that averaged models", "4, of 8.5 steps"),
        ("seconds in averages", "0.5"),
        ("seconds blocked by them", "0.75 (3.1% of the time)"),
        ("sent by each worker", "1.20 GB (34.00 GB by DDP)"),
        ("seconds spared, at an average a step", "3.75"),
        ("drift of the replicas", "0.125 (0.5 of the way)"),
        ("cosine of the workers' updates", "0.75"),
        ("noise of the workers' updates", "2.5"),
    ]
    module_of_monitor.show("Rounds", lines)
    with_rich = capsys.readouterr().out
    assert all(word in with_rich for line in lines for word in line)
    for name in ("rich", "rich.console", "rich.table"):
        monkeypatch.setitem(sys.modules, name, None)
    module_of_monitor.show("Rounds", lines[:2])
    assert capsys.readouterr().out == (
        "Rounds\n  steps that averaged gradients  100\n  rounds that averaged models    4, of 8.5 steps\n"
    )


# ------------------------------------------------------------------------------------------------------ what it refuses


def refused(strategy, monitor, workers=1):
    trainer(workers, strategy, callbacks=[monitor]).fit(Constant(), loader([1] * workers))


@pytest.mark.parametrize(
    ("strategy", "anchor", "told"),
    [
        ("ddp", False, "`LocalSGDMonitor` tells of the rounds of `LocalSGDStrategy`, got a DDPStrategy."),
        (1, True, "`anchor` must be False with a `period` of 1, which averages no models, got True."),
    ],
)
def test_what_it_refuses(strategy, anchor, told):
    for raised in run_workers(refused, 2, strategy, LocalSGDMonitor(anchor), 2, catch=True):
        assert raised == Raised("ValueError", told)


@pytest.mark.parametrize("every", [0, True, 2.0])
def test_a_listener_that_is_refused(every):
    with pytest.raises(ValueError, match=f"`every` must be an int of at least 1, got {every!r}"):
        LocalSGDStrategy(3).listen(print, print, every=every)


@pytest.mark.parametrize(("moves", "every"), [(True, 1), (False, 2)])
def test_what_nobody_would_hear_is_refused(moves, every):
    with pytest.raises(ValueError, match="`moves` and `every` have no effect without `on_spread`, got"):
        LocalSGDStrategy(3).listen(print, moves=moves, every=every)


def test_what_no_one_could_mean():
    with pytest.raises(ValueError, match=r"`anchor` must be True or False, got 1\."):
        LocalSGDMonitor(1)


def too_late():
    class Late(LightningModule):
        def on_fit_start(self):
            self.trainer.strategy.listen(print)

    class Both(Late, Constant):
        pass

    trainer(1, 3).fit(Both(), loader([1]))


def test_to_listen_too_late():
    (raised,) = run_workers(too_late, 1, catch=True)
    assert raised == Raised(
        "RuntimeError", "`listen` must be called before the model is set up, as in a callback's `setup`."
    )


def twice():
    ears = Ears()
    run = trainer(1, 3, callbacks=[ears])
    run.fit(Constant(), loader([6]))
    run.fit_loop.max_epochs = 2
    run.fit(Constant(), loader([6]))
    run.validate(Regression(), loader([1]), verbose=False)
    return len(ears.rounds), ears.totals.compute()["rounds"]


def test_two_fits_are_told_apart():
    ((heard, last),) = run_workers(twice, 1)
    assert last == 2
    assert heard == 4


def test_the_other_namespace():
    from pytorch_lightning import Callback

    from lightning_localsgd import pytorch_lightning as other

    assert issubclass(other.LocalSGDMonitor, Callback)
    assert not issubclass(LocalSGDMonitor, Callback)
