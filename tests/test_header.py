"""What is decided from a header: pure, so tested for every mixture of wants."""

import itertools

import pytest

from lightning_localsgd.header import Decision, Header, Message, ReplicasDiffer, Want, decide
from lightning_localsgd.progress import Report

SERVED_FOR_SOME = [Want.BARRIER, Want.FILES, Want.BROADCAST, Want.REDUCE, Want.GATHER, Want.CONSENSUS]
# What a rank may want while another one is still in the same epoch.
IN_EPOCH = [*SERVED_FOR_SOME, Want.VALIDATE, Want.ROUND, Want.SIGNAL, Want.ENDED]
BESIDE_A_SIGNAL = {  # what is decided where one rank has read of a signal, and who is served
    Want.VALIDATE: (Want.SIGNAL, (1,)),
    Want.ALL_GATHER: (Want.GO_ON, (1,)),
    Want.PLAN: (Want.PLAN, (0, 2)),
    Want.CHECK: (Want.GO_ON, (1,)),
    Want.ROUND: (Want.HOLD, (0, 2)),
    Want.STEP: (Want.GO_ON, (1,)),
    Want.ENDED: (Want.SIGNAL, (1,)),
    Want.EPOCH: (Want.SIGNAL, (1,)),
    Want.OVER: (Want.SIGNAL, (1,)),
} | {want: (want, (0, 2)) for want in SERVED_FOR_SOME}


def wants(*messages):
    return decide([message if isinstance(message, Message) else Message(message) for message in messages])


@pytest.mark.parametrize("want", list(Want))
def test_what_all_want_is_done_by_all(want):
    decision = wants(want, want, want)
    assert (decision.want, decision.askers, decision.unanimous) == (want, (0, 1, 2), True)


@pytest.mark.parametrize("mixture", list(itertools.combinations(IN_EPOCH, 2)), ids=str)
def test_every_mixture_within_an_epoch_serves_somebody(mixture):
    if Want.SIGNAL in mixture and BESIDE_A_SIGNAL[min({*mixture} - {Want.SIGNAL})][0] is not min(mixture):
        return  # the next test's
    for order in itertools.permutations([*mixture, mixture[0]]):
        decision = wants(*order)
        assert decision.want == min(mixture)
        assert decision.askers == tuple(rank for rank, want in enumerate(order) if want == min(mixture))


@pytest.mark.parametrize(("want", "decided"), BESIDE_A_SIGNAL.items())
def test_who_has_read_of_a_signal_disturbs_nothing_that_all_must_do_alike(want, decided):
    decision = wants(want, Want.SIGNAL, want)
    assert (decision.want, decision.askers) == decided
    assert not decision.takes_mean or want is Want.CONSENSUS


def test_a_round_that_is_ended_by_the_user_is_not_left_open():
    decision = wants(Message(Want.ROUND, detail=1), Want.SIGNAL, Want.ROUND)
    assert (decision.want, decision.askers) == (Want.GO_ON, (1,))
    assert wants(Message(Want.ROUND, detail=1), Want.ROUND).unanimous


@pytest.mark.parametrize("want", SERVED_FOR_SOME)
@pytest.mark.parametrize("elsewhere", [Want.STEP, Want.EPOCH, Want.OVER, Want.LEAVE])
def test_collectives_of_lightning_are_served_wherever_the_others_wait(want, elsewhere):
    assert wants(elsewhere, want).askers == (1,)


def test_ranks_that_ask_for_different_things_of_a_kind_are_served_in_turn():
    decision = wants(Message(Want.REDUCE, detail=7), Message(Want.REDUCE, detail=9), Message(Want.REDUCE, detail=7))
    assert (decision.askers, decision.detail) == ((0, 2), 7)


def test_one_rank_that_has_ended_its_fit_ends_it_for_all():
    decision = wants(Want.EPOCH, Want.OVER, Want.EPOCH)
    assert (decision.want, decision.askers) == (Want.OVER, (0, 2))


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        (Want.STEP, Want.ENDED, "rank 0 starts a training step at its step 5 while rank 1 has no more data"),
        (Want.ENDED, Want.STEP, "rank 1 starts a training step at its step 5 while rank 0 has no more data"),
        (Want.STEP, Want.ROUND, "rank 1 ends a round at its step 5 while rank 0 starts a training step"),
        (Want.ALL_GATHER, Want.ENDED, "rank 0 calls `all_gather` at its step 5 while rank 1 has no more data"),
        (Want.ENDED, Want.EPOCH, "come apart"),
    ],
)
def test_what_cannot_be_had_is_the_same_error_everywhere(first, second, says):
    with pytest.raises(RuntimeError, match=says):
        wants(Message(first, step=5), Message(second, step=5))


def test_a_step_needs_the_same_parameters_everywhere():
    with pytest.raises(RuntimeError, match=r"same parameters with `requires_grad`.*: 2, 2, 0"):
        wants(Message(Want.STEP, detail=2), Message(Want.STEP, detail=2), Message(Want.STEP, detail=0))


def test_weights_are_those_who_stepped_or_else_those_who_ran_a_training_step():
    assert wants(Message(Want.ROUND, stepped=1, touched=1), Message(Want.ENDED, touched=1)).weights == (1, 0)
    assert wants(Message(Want.CONSENSUS, touched=1), Message(Want.CONSENSUS)).weights == (1, 0)
    assert wants(Message(Want.CONSENSUS), Message(Want.CONSENSUS)).weights == (0, 0)


def test_the_step_is_the_largest_and_signals_are_united():
    decision = wants(Message(Want.ROUND, step=8, signals=1), Message(Want.ENDED, step=3, signals=2))
    assert (decision.step, decision.signals) == (8, 3)


@pytest.mark.parametrize("part", ["layout", "frozen"])
def test_another_replica_is_refused_by_rank(part):
    for numbers, odd, one in [((4, 0, 5), 2, 0), ((0, 4, 5), 2, 1), ((4, 4, 5), 2, 0)]:
        messages = [
            Message(Want.ROUND, **({"layout": number and 7} | {part: number}))  # 0: offers no replica
            for number in numbers
        ]
        with pytest.raises(ReplicasDiffer) as found:
            wants(*messages)
        assert (found.value.one, found.value.odd) == (one, odd)


def test_digests_are_counted_when_leaving():
    alike, unlike = wants(Message(Want.LEAVE, 11), Message(Want.LEAVE, 11)), wants(Message(Want.LEAVE, 11), Want.LEAVE)
    assert (alike.detail, alike.weights) == (1, (0, 0))
    assert (unlike.detail, unlike.weights) == (2, (1, 1))


@pytest.mark.parametrize(
    ("messages", "takes_mean"),
    [
        ((Want.ROUND, Want.ENDED), True),
        ((Want.CONSENSUS, Want.ENDED), True),
        ((Want.VALIDATE, Want.VALIDATE), True),
        ((Want.VALIDATE, Want.ENDED), False),
        ((Want.OVER, Want.OVER), True),
        ((Want.OVER, Want.EPOCH), False),
        ((Want.LEAVE, Want.LEAVE), True),
        ((Want.BARRIER, Want.ROUND), False),
    ],
)
def test_when_a_mean_is_taken(messages, takes_mean):
    assert wants(*messages).takes_mean == takes_mean


def test_one_worker_decides_for_itself():
    assert Header(0, 1).exchange(Message(Want.ROUND, stepped=1, step=3)) == Decision(
        Want.ROUND, (0,), 1, 0, (1,), 3, 0, bad=(0,), loss_scales=(0,), steps=(3,), reports=(Report(),)
    )
