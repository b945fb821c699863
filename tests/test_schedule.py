"""Schedules and the clock: pure, so tested without processes."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_localsgd import Every, Progress, Schedule
from lightning_localsgd.schedule import Clock


class Lengths(Schedule):
    """The given lengths in turn, the last one for ever."""

    def __init__(self, *lengths):
        self.lengths = lengths
        self.asked = []

    def length(self, progress):
        self.asked.append(progress)
        return self.lengths[min(progress.round, len(self.lengths) - 1)]


@pytest.mark.parametrize("period", [0, -1, 2.0, "8", True, None])
def test_every_refuses_what_is_not_a_count(period):
    with pytest.raises(ValueError, match=f"`period` must be an int of at least 1, got {period!r}"):
        Every(period)


def test_every_is_a_value():
    assert Every(8) == pickle.loads(pickle.dumps(Every(8)))
    assert repr(Every(8)) == "Every(period=8)"


@given(st.integers(1, 20), st.integers(0, 100))
def test_rounds_end_exactly_after_period_steps(period, steps):
    clock = Clock(Every(period), workers=2)
    ends = []
    for _ in range(steps):
        if clock.tick():
            ends.append(clock.step)
            clock.next_round(clock.step)
    assert ends == list(range(period, steps + 1, period))
    assert clock.step == steps
    assert clock.round == len(ends)


def test_a_schedule_is_asked_once_at_the_start_of_each_round():
    schedule = Lengths(2, 1, 3)
    clock = Clock(schedule, workers=4)
    for _ in range(6):
        if clock.tick():
            clock.next_round(clock.step)
    assert schedule.asked == [Progress(0, 0, 4), Progress(2, 1, 4), Progress(3, 2, 4), Progress(6, 3, 4)]


def test_models_are_averaged_from_the_first_longer_round_on():
    clock = Clock(Lengths(1, 1, 2, 1), workers=2)
    seen = []
    for _ in range(5):
        seen.append(clock.averages_models)
        if clock.tick():
            clock.next_round(clock.step)
    assert seen == [False, False, True, True, True]


def test_the_clock_goes_on_from_its_state():
    clock = Clock(Every(5), workers=2)
    for _ in range(8):
        if clock.tick():
            clock.next_round(clock.step)
    again = Clock(Every(5), workers=2, state=clock.state_dict())
    assert (again.step, again.round, again.taken, again.length, again.averages_models) == (8, 1, 3, 5, True)
    assert [again.tick(), again.tick()] == [False, True]


@pytest.mark.parametrize("length", [0, 1.5, None])
def test_a_schedule_must_answer_with_a_count(length):
    with pytest.raises(ValueError, match=f"`Lengths.length` must return an int of at least 1, got {length!r}"):
        Clock(Lengths(length), workers=2)
