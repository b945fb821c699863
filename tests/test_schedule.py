"""Schedules: pure, so tested without processes, against the papers' rules in exact arithmetic."""

import math
import pickle
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_localsgd import (
    QSR,
    AdaComm,
    AtEnd,
    CommBudget,
    Corollary,
    DriftLimit,
    Epochs,
    Every,
    EveryEpoch,
    Listed,
    PostLocal,
    Progress,
    RoundLR,
    Schedule,
    Stages,
    TimeVarying,
)
from lightning_localsgd.progress import Measured, Report
from lightning_localsgd.schedule import require_known_needs


def at(step=0, round=0, workers=4, **known):  # noqa: A002
    return Progress(step, round, workers, **known)


EVERY_KIND = [
    Every(8),
    EveryEpoch(2),
    AtEnd(),
    PostLocal(warmup=500, then=QSR(alpha=0.01, base=4)),
    Stages({0: 4, 100: AtEnd()}),
    TimeVarying(),
    Listed((1, 2, 4)),
    Corollary(),
    QSR(alpha=0.01, base=4),
    AdaComm(16, every=100),
    CommBudget(0.05),
    DriftLimit(1.0, check=4),
]


@pytest.mark.parametrize("schedule", EVERY_KIND, ids=lambda schedule: type(schedule).__name__)
def test_a_schedule_is_a_value(schedule):
    again = pickle.loads(pickle.dumps(schedule))
    assert (again, hash(again), repr(again)) == (schedule, hash(schedule), repr(schedule))
    assert repr(schedule).startswith(type(schedule).__name__)
    require_known_needs(schedule)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        *((lambda bad=bad: Every(bad), "`period` must be an int of at") for bad in (0, -1, 2.0, "8", True, None)),
        (lambda: EveryEpoch(0), "`n` must be an int of at least 1, got 0"),
        (lambda: PostLocal(-1, then=4), "`warmup` must be an int of at least 0 or \"decay\", got -1"),
        (lambda: PostLocal("end", then=4), "`warmup` must be an int of at least 0 or \"decay\", got 'end'"),
        (lambda: PostLocal(3, then=0), "`then` must be an int of at least 1 or a schedule, got 0"),
        (lambda: Stages({1: 4}), r"`periods` must have a period from 0 on, got \{1: 4\}"),
        (lambda: Stages({0: 4, -1: 8}), "The keys of `periods` must be ints of at least 0"),
        (lambda: Stages({0: 0}), "`periods` must be an int of at least 1 or a schedule, got 0"),
        (lambda: Stages({0: 4}, unit="round"), "`unit` must be \"step\" or \"epoch\", got 'round'"),
        (lambda: Listed(()), "`intervals` must not be empty"),
        (lambda: Listed((1, 0)), "`intervals` must be an int of at least 1, got 0"),
        (lambda: Listed((1,), rates=(0.0,)), "`rates` must be a number above 0, got 0.0"),
        (lambda: Corollary(0), "`total_steps` must be an int of at least 1, got 0"),
        (lambda: QSR(0, base=1), "`alpha` must be a number above 0, got 0"),
        (lambda: QSR(1.0, base=0), "`base` must be an int of at least 1, got 0"),
        (lambda: QSR(1.0, base=1, warmup=-2), "`warmup` must be an int of at least 0 or None, got -2"),
        (lambda: AdaComm(1, every=8), "`period` must be an int of at least 2, got 1"),
        (lambda: AdaComm(8, every=0), "`every` must be an int of at least 1, got 0"),
        (lambda: CommBudget(1.0), "`share` must be a number above 0 and below 1, got 1.0"),
        (lambda: CommBudget(math.nan), "`share` must be a number above 0 and below 1, got nan"),
        (lambda: CommBudget(at_least=4, at_most=3), "`at_most` must be an int of at least `at_least` and 2"),
        (lambda: CommBudget(first=1), "`first` must be an int of at least 2, got 1"),
        (lambda: DriftLimit(0.0), "`limit` must be a number above 0, got 0.0"),
        (lambda: DriftLimit(1.0, check=-1), "`check` must be an int of at least 0, got -1"),
        (lambda: DriftLimit(1.0, check=4, at_most=4), "`check` must be below `at_most`, got 4 and 4"),
        (lambda: require_known_needs(Needs()), "`needs` of a schedule must be some of .*, got weather"),
        (lambda: require_known_needs(Checks()), "`check` of a schedule must be an int of at least 0, got 0.5"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(make, told):
    with pytest.raises(ValueError, match=told):
        make()


class Needs(Schedule):
    needs = frozenset({"loss", "weather"})

    def length(self, progress):
        return 1


class Checks(Needs):
    needs = frozenset()
    check = 0.5


def test_passes_and_the_end():
    assert EveryEpoch().length(at(step=7)) == Epochs(1)
    assert EveryEpoch(3).length(at(epoch=5)) == Epochs(3)
    assert AtEnd().length(at(step=100, epoch=9)) == Epochs(math.inf)


def test_post_local_has_gradients_first_and_then_what_follows():
    schedule = PostLocal(warmup=3, then=Stages({0: 5, 10: 7}))
    assert [schedule.length(at(step, step)) for step in (0, 2, 3, 9, 10)] == [1, 1, 5, 5, 7]
    assert [schedule.warms_up(at(step)) for step in (0, 2, 3)] == [True, True, False]
    assert not schedule.warms_up(at(1, averages_models=True))  # a reducer does not come back


def test_post_local_until_the_first_decay():
    schedule, peak, lengths = PostLocal("decay", then=6), 0.0, []
    assert schedule.needs == {"learning_rate"}
    for rate in (0.1, 0.2, 0.4, 0.4, 0.3, 0.4):  # a warm-up, a plateau, a decay, and up again when models are averaged
        peak = max(peak, rate)
        known = {"learning_rate": rate, "peak_learning_rate": peak, "averages_models": 6 in lengths}
        lengths.append(schedule.length(at(**known)))
    assert lengths == [1, 1, 1, 1, 6, 6]


@given(st.dictionaries(st.integers(1, 50), st.integers(1, 20), max_size=5), st.integers(0, 60))
def test_a_stage_begins_at_its_step_or_epoch(later, now):
    stages = {0: 3, **later}
    expected = [stages[start] for start in sorted(stages) if start <= now][-1]
    assert Stages(stages).length(at(step=now, epoch=99)) == expected
    assert Stages(stages, unit="epoch").length(at(step=9999, epoch=now)) == expected


def test_stages_ask_for_all_that_their_parts_need():
    schedule = Stages({0: DriftLimit(1.0, check=4), 9: PostLocal(5, then=DriftLimit(1.0, check=6)), 20: CommBudget()})
    assert schedule.needs == {"drift", "seconds"}
    assert schedule.check == 2


# ------------------------------------------------------------------------------------------------------ the paper's own


@given(st.integers(1, 10**15), st.integers(1, 64))
def test_the_sequence_of_lengths_is_exact(s, workers):
    k = TimeVarying().interval(s, workers)
    assert (k * workers) ** 3 >= s  # k >= s^(1/3) / N ...
    assert k == 1 or ((k - 1) * workers) ** 3 < s  # ... and no smaller one is


@given(st.integers(1, 8), st.lists(st.integers(0, 3000), min_size=1, max_size=5))
def test_which_round_it_is_follows_from_the_step(workers, steps):
    schedule, ends, s = TimeVarying(), [0], 0
    while ends[-1] <= max(steps):
        s += 1
        ends.append(ends[-1] + schedule.interval(s, workers))
    for step in steps:
        s = sum(end <= step for end in ends)
        assert schedule.round_at(step, workers) == (s, ends[s] - step)
        assert schedule.length(at(step, workers=workers)) == ends[s] - step


@pytest.mark.parametrize("workers", [1, 4])
def test_the_learning_rates_go_with_the_rounds(workers):
    schedule = TimeVarying()
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)], "lr": 0.02}], lr=0.1)
    scheduler = RoundLR(optimizer, schedule, workers=workers, at_most=0.15)
    for step in range(40):
        s, _ = schedule.round_at(step, workers)
        expected = [min(0.15, eta * workers / s ** (2 / 3)) for eta in (0.1, 0.02)]
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected)
        optimizer.step()
        scheduler.step()
        state, of_optimizer = scheduler.state_dict(), optimizer.state_dict()
        assert all(isinstance(value, int | float | list) for value in state.values())
        scheduler = RoundLR(optimizer, schedule, workers=workers, at_most=0.15)
        scheduler.load_state_dict(state)
        optimizer.load_state_dict(of_optimizer)


def test_another_pair_of_sequences():
    pair = Listed((1, 2, 4), rates=(1.0, 0.5))
    assert [pair.interval(s, 8) for s in (1, 2, 3, 4, 9)] == [1, 2, 4, 4, 4]
    assert [pair.rate(s, 8) for s in (1, 2, 3)] == [1.0, 0.5, 0.5]
    assert [pair.length(at(step)) for step in (0, 1, 2, 3, 6, 7)] == [1, 2, 1, 4, 1, 4]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sequences": Every(4)}, "`sequences` must be a `Sequences`"),
        ({"workers": 0}, "`workers` must be an int of at least 1, got 0"),
        ({"at_most": 0.0}, "`at_most` must be a number above 0, got 0.0"),
    ],
)
def test_a_learning_rate_of_something_else_is_refused(options, told):
    with pytest.raises(ValueError, match=told):
        RoundLR(torch.optim.SGD([torch.zeros(1)], lr=0.1), **({"sequences": TimeVarying()} | options))


@given(st.integers(1, 10**18), st.integers(1, 64))
def test_the_corollary_is_exact(total, workers):
    interval = Corollary(total).length(at(workers=workers))
    assert interval == 1 or interval**4 * workers**3 <= total
    assert (interval + 1) ** 4 * workers**3 > total
    assert Corollary().length(at(step=total // 3, round=1, workers=workers, steps_left=total - total // 3)) == interval


def test_the_corollary_needs_the_number_of_steps():
    assert Corollary(15**4 * 8).length(at(workers=2)) == 15  # a double's fourth root of 50625 is below 15
    with pytest.raises(ValueError, match="give `total_steps`"):
        Corollary().length(at())


# ------------------------------------------------------------------------------------------------------------- adaptive


@given(st.integers(1, 100), st.integers(1, 100), st.integers(1, 20))
def test_qsr_is_its_formula(alpha, rate, base):
    exact = max(base, math.floor((Fraction(alpha) / rate) ** 2))  # in thousandths: 0.3 / 0.1 is 3
    schedule = QSR(alpha / 1000, base, warmup=0)
    assert schedule.length(at(learning_rate=rate / 1000)) == exact
    assert schedule.length(at(learning_rate=rate / 1000, steps_left=5)) == min(exact, 5)


def test_qsr_keeps_its_base_while_the_learning_rate_warms_up():
    schedule = QSR(alpha=1.0, base=3)
    assert schedule.length(at(learning_rate=0.1)) == 3  # it may be the first of a warm-up
    assert schedule.length(at(learning_rate=0.2, last_learning_rate=0.1)) == 3
    assert schedule.length(at(learning_rate=0.2, last_learning_rate=0.2)) == 25
    assert schedule.length(at(learning_rate=0.1, last_learning_rate=0.2)) == 100
    given = QSR(alpha=1.0, base=3, warmup=10)
    assert [given.length(at(step, learning_rate=0.1, last_learning_rate=0.1)) for step in (9, 10)] == [3, 100]


def test_qsr_at_a_learning_rate_of_0():
    schedule = QSR(alpha=1.0, base=3, warmup=0)
    assert schedule.length(at(learning_rate=0.0, steps_left=70)) == 70
    with pytest.raises(ValueError, match="at a learning rate of 0 needs the number of steps left"):
        schedule.length(at(learning_rate=0.0))


def test_adacomm_in_both_forms():
    known = {"averages_models": True, "last_length": 16, "last_start": 84, "first_loss": 4.0}
    plain, with_rate = AdaComm(16, every=100), AdaComm(16, every=100, learning_rate=True)
    assert plain.length(at()) == 16
    assert plain.length(at(100, loss=1.0, **known)) == 8  # 16 sqrt(1 / 4)
    assert plain.length(at(100, loss=1.1, **known)) == math.ceil(16 * math.sqrt(1.1 / 4))
    assert plain.length(at(100, loss=8.0, **known)) == 8  # it has not fallen: half
    assert plain.length(at(99, loss=1.0, **known)) == 16  # between two decisions
    rates = {"learning_rate": 0.1, "peak_learning_rate": 0.4}
    assert with_rate.length(at(100, loss=4.0, **rates, **known)) == 32  # 16 sqrt(0.4 / 0.1)
    assert with_rate.needs == {"loss", "learning_rate"}
    with pytest.raises(ValueError, match="needs a `training_step` that returns the loss"):
        plain.length(at(100, **known))


@given(st.floats(1e-4, 1.0), st.floats(1e-5, 10.0), st.floats(0.01, 0.5), st.integers(1, 400))
def test_the_budget_is_met_by_the_shortest_round(step, average, share, last):
    known = {"averages_models": True, "seconds_per_step": step, "seconds_per_average": average, "last_length": last}
    length = CommBudget(share).length(at(**known))
    assert math.ceil(last / 2) <= length <= 2 * last
    enough = average / (average + length * step) <= share * (1 + 1e-6)
    needed = length == 1 or average / (average + (length - 1) * step) > share * (1 - 1e-6)
    assert enough or length == 2 * last
    assert needed or length == math.ceil(last / 2)


def test_the_budget_begins_with_models_and_keeps_its_limits():
    assert CommBudget().length(at()) == 8
    assert CommBudget(at_most=4).length(at()) == 4
    known = {"averages_models": True, "seconds_per_step": 1.0, "last_length": 8}
    assert CommBudget(at_most=10).length(at(**known, seconds_per_average=100.0)) == 10
    assert CommBudget(at_least=6).length(at(**known, seconds_per_average=0.0)) == 6
    assert CommBudget().length(at(**(known | {"last_length": 2}), seconds_per_average=0.0)) == 1


def rounds_of(averages, steps=(0.02, 0.02)):
    """The lengths that a budget of 5 % names when averages take these seconds, and each worker's steps those."""
    measured, length, lengths = Measured(frozenset({"seconds"})), None, []
    for round_, seconds in enumerate([math.nan, *averages]):  # the first header knows of no average yet
        if round_:
            reports = [Report(average_seconds=seconds, step_seconds=step) for step in steps]
            measured.hear(reports, ends_round=True)
        known = {"averages_models": round_ > 0, "last_length": length}
        length = CommBudget(0.05).length(measured.progress(0, round_, len(steps), **known))
        lengths.append(length)
    return lengths[1:]


def test_the_budget_holds_where_averages_take_one_of_two_times():
    # As measured on a fast link, where the odd average waits for a tick of the scheduler: medians would name 2 and 4.
    averages = [0.0015, 0.0015, 0.0045, 0.0015, 0.0045, 0.0015, 0.0045, 0.0015, 0.0015, 0.0015] * 4
    lengths = rounds_of(averages)
    assert set(lengths[10:]) == {3}
    seconds = [average + 0.02 * length for average, length in zip(averages[11:], lengths[10:], strict=False)]
    assert sum(averages[11:]) / sum(seconds) < 0.05


def test_the_budget_is_not_moved_by_one_slow_average_and_follows_a_network_that_slows():
    steady = [0.0205] * 15
    assert rounds_of(steady)[:3] == [16, 20, 20]
    assert set(rounds_of([*steady, 5.0, *steady])[1:]) == {20}
    slower = rounds_of([*steady, *[0.082] * 20])[15:]
    assert slower == sorted(slower)
    assert slower[9:] == [78] * 11  # all of the last ten
    assert all(later <= 2 * sooner for sooner, later in pairwise([20, *slower]))


@pytest.mark.parametrize("slow", [0.03, 0.08])
def test_a_slow_worker_does_not_lengthen_rounds(slow):
    for workers in (2, 3, 5):
        assert set(rounds_of([0.0205] * 20, [0.02] * (workers - 1) + [slow])[2:]) == {20}


def test_drift_shortens_rounds_and_its_lack_lengthens_them():
    known = {"averages_models": True, "drift_length": 12, "last_length": 10}
    schedule = DriftLimit(1.0)
    assert [schedule.length(at(**known, drift=drift)) for drift in (1.0, 1.5, 0.75, 100.0, 0.0)] == [12, 8, 16, 5, 20]
    assert schedule.length(at()) == 8
    assert DriftLimit(1.0, at_most=11).length(at(**known, drift=1.0)) == 11


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=5))
def test_a_check_ends_a_round_only_where_the_limit_is_surely_passed(moves):
    # Workers that have moved along one line, which is the least drift that these distances allow.
    mean = sum(moves) / len(moves)
    drift = math.sqrt(sum((move - mean) ** 2 for move in moves) / len(moves)) / mean
    for limit in (drift * 0.99, drift * 1.01):
        if limit:
            ends = DriftLimit(limit, check=2).ends_round(at(distances=tuple(moves)))
            assert ends == (drift > limit and len(moves) > 1)


@dataclass(frozen=True)
class Doubling(Schedule):
    first: int = 1

    def length(self, progress: Progress) -> int:
        return self.first * 2**progress.round


def test_one_of_your_own_combines_with_ours():
    schedule = PostLocal(2, then=Doubling(first=1))
    assert [schedule.length(at(step, round_)) for step, round_ in ((0, 0), (1, 1), (2, 2), (6, 3))] == [1, 1, 4, 8]
