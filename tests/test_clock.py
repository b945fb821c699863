"""The clock: pure, so tested without processes."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_localsgd import Epochs, Every, EveryEpoch, Schedule
from lightning_localsgd.clock import Clock
from lightning_localsgd.progress import Measured


class Lengths(Schedule):
    """The given lengths in turn, the last one for ever."""

    def __init__(self, *lengths):
        self.lengths = lengths
        self.asked = []

    def length(self, progress):
        self.asked.append(progress)
        return self.lengths[min(progress.round, len(self.lengths) - 1)]


def plan(clock, epoch=0):
    clock.plan(clock.progress(Measured(clock.schedule.needs), epoch))


def new(schedule, workers=2, state=None):
    clock = Clock(schedule, workers, state)
    if not clock.is_planned:
        plan(clock)
    return clock


def tick(clock):
    """Take a step, and start the next round if it was the last one; return whether it was."""
    over = clock.tick()
    if over:
        clock.next_round(clock.step)
        plan(clock)
    return over


@given(st.integers(1, 20), st.integers(0, 100))
def test_rounds_end_exactly_after_period_steps(period, steps):
    clock = new(Every(period))
    ends = [step for step in range(1, steps + 1) if tick(clock)]
    assert ends == list(range(period, steps + 1, period))
    assert clock.step == steps
    assert clock.round == len(ends)


def test_a_schedule_is_asked_once_for_each_round():
    schedule = Lengths(2, 1, 3)
    clock = new(schedule, workers=4)
    for _ in range(6):
        tick(clock)
    seen = [(p.step, p.round, p.workers, p.last_length, p.last_start, p.averages_models) for p in schedule.asked]
    assert seen == [(0, 0, 4, None, None, False), (2, 1, 4, 2, 0, True), (3, 2, 4, 1, 2, True), (6, 3, 4, 3, 3, True)]


def test_models_are_averaged_from_the_first_longer_round_on():
    clock = new(Lengths(1, 1, 2, 1))
    seen = []
    for _ in range(5):
        seen.append(clock.averages_models)
        tick(clock)
    assert seen == [False, False, True, True, True]


def test_the_clock_goes_on_from_its_state():
    schedule = Lengths(5, 5, 7)
    clock = new(schedule)
    for _ in range(8):
        tick(clock)
    again = Clock(schedule, 2, state=clock.state_dict())
    assert len(schedule.asked) == 2  # not again for the round that has begun
    assert vars(again) == vars(clock)
    assert [tick(again), tick(again)] == [False, True]


def test_a_new_round_begins_where_one_was_left():
    clock = new(Every(5))
    for _ in range(8):
        tick(clock)
    left = Clock(Every(5), 2, Clock.new_round(clock.state_dict()))
    assert (left.step, left.round, left.taken, left.is_planned, left.averages_models) == (8, 2, 0, False, True)
    assert left.progress(Measured(frozenset()), 0).last_start == 5
    for _ in range(2):
        tick(clock)
    at_an_end = Clock.new_round(clock.state_dict())
    assert (at_an_end["start"], at_an_end["round"]) == (10, 2)  # that round has not begun


def test_a_round_of_passes_ends_with_them():
    clock = new(EveryEpoch(2))
    assert clock.averages_models
    assert not any(clock.tick() for _ in range(100))
    assert not clock.ends_with_pass()
    clock.passes += 1
    assert clock.ends_with_pass()
    assert Clock(EveryEpoch(2), 2, clock.state_dict()).ends_with_pass()
    forever = new(Lengths(Epochs(math.inf)))
    forever.passes = 10**6
    assert not Clock(forever.schedule, 2, forever.state_dict()).ends_with_pass()


@pytest.mark.parametrize("length", [0, 1.5, None, True])
def test_a_schedule_must_answer_with_a_length(length):
    told = f"`Lengths.length` must return an int of at least 1 or `Epochs`, got {length!r}"
    with pytest.raises(ValueError, match=told):
        new(Lengths(length))
