"""WHAT NEXT: before every collective each rank says what it wants, and all decide alike from what all said.

A header is one small all-gather of fixed size. A rank sends one whenever it reaches a point where it would wait for
the others, and goes on once its want has been served; until then it takes part in what the others want. So no two
ranks are ever in different collectives, however their data, their epochs or their callbacks differ: each header
serves the want of at least one rank, or all ranks raise the same error.
"""

import atexit
import operator
import time
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import astuple, dataclass, field, replace
from datetime import timedelta
from enum import IntEnum
from functools import cache, reduce
from socket import gethostname
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_localsgd.progress import Report
from lightning_localsgd.signals import Board, Signals

# What ranks must have in common to understand each other. Raise it by one with every change of what travels, or
# of when: a number in a `Message` or a `Report`, a `Want`, their order, and what is sent after a header or beside it.
PROTOCOL = 2
_DROPPED = 0.3  # seconds in which Gloo's threads have dropped what they held, on a busy machine too

_LISTEN = timedelta(seconds=1)  # how long a wait is deaf to Ctrl-C, and to what others have left in writing

INSISTS, AT_ONCE = 1, 2  # of who wants the end of a round: it cannot be held; the average has no delay

T = TypeVar("T")


class Want(IntEnum):
    """What a rank that sends a header wants, in the order in which wants are served."""

    # Collectives of Lightning: served for those who ask, while the others contribute nothing.
    BARRIER = 0
    FILES = 1  # write or remove a checkpoint: each worker does its part
    BROADCAST = 2
    REDUCE = 3
    GATHER = 4
    # Ours.
    CONSENSUS = 5  # look at the mean of all replicas; the others only contribute
    MOMENTS = 6  # look at the mean of an optimizer's moments; the others only contribute
    VALIDATE = 7  # done by all, or put off to the end of the epoch
    ALL_GATHER = 8  # Lightning's, whose result has a row for each rank: done by all or not at all
    PLAN = 9  # first step of a round whose length depends on the learning rate, or after which nodes step alone
    CHECK = 10  # inside a round: does it end here?
    ROUND = 11  # end of a round: average, for all
    SIGNAL = 12  # act on a signal that the last header told
    STEP = 13  # first forward of a step that averages gradients: by all or not at all
    ENDED = 14  # no more data in this epoch; waits for the others
    EPOCH = 15  # start of an epoch
    OVER = 16  # this rank's fit is over; waits for the others
    LEAVE = 17  # last word of the fit, after all `on_train_end` hooks
    # Never wanted, but decided where some ranks have read of a signal that the others have not read of yet.
    GO_ON = 18  # for those who want to act on it: the others can wait only for all, so go on until you are there too
    HOLD = 19  # for those at the end of their round: leave it open, end the batch and act on the signal first

    @property
    def waits(self) -> bool:
        """Whether a rank that wants this has nothing left to do before the others get there."""
        return self in (Want.ENDED, Want.EPOCH, Want.OVER, Want.LEAVE)

    @property
    def offers_replica(self) -> bool:
        """Whether a rank that wants this may be asked to take part in a mean."""
        others = (Want.CONSENSUS, Want.MOMENTS, Want.VALIDATE, Want.ALL_GATHER, Want.ROUND, Want.SIGNAL)
        return self.waits or self in others


@dataclass(frozen=True)
class Message:
    """What one rank says: a fixed number of numbers.

    Args:
        want: what it wants.
        detail: what else its partners must know to take part (sizes, dtype, operation, source), or 0.
        stepped: 1 if it has taken a step since the last average.
        touched: 1 if it has run a training step, which may change buffers, since the last average.
        aloft: 1 if an average of its has not landed yet.
        step: its step.
        signals: the signals it has received, one bit each.
        layout: a number for the layout of its replica, or 0 if it does not offer one.
        frozen: a digest of the part of its replica that is not sent, or 0.
        bad: the place of the first tensor of its replica that is not finite, from 1; 0 if it is finite.
        loss_scale: a number for the loss scale of its GradScaler, the smaller the smaller; 0 if it has none.
        report: what it has measured, for the schedule.
    """

    want: Want
    detail: int = 0
    stepped: int = 0
    touched: int = 0
    aloft: int = 0
    step: int = 0
    signals: int = 0
    layout: int = 0
    frozen: int = 0
    bad: int = 0
    loss_scale: int = 0
    report: Report = field(default_factory=Report)

    def row(self) -> Tensor:
        """Return the message as it travels: 64 bits for each number."""
        *integers, _ = (getattr(self, name) for name in _NAMES)
        floats = torch.tensor(astuple(self.report), dtype=torch.float64)
        return torch.cat([torch.tensor([int(value) for value in integers]), floats.view(torch.int64)])

    @classmethod
    def of(cls, row: Tensor) -> "Message":
        """Return the message that has travelled so."""
        count = len(_NAMES) - 1
        want, *integers = row[:count].tolist()
        return replace(cls(Want(want), *integers), report=Report(*row[count:].view(torch.float64).tolist()))


_NAMES = tuple(Message.__dataclass_fields__)


@dataclass(frozen=True)
class Decision:
    """What all ranks do next; equal on all of them.

    Args:
        want: what is served.
        askers: the ranks whose want this is.
        size: the number of ranks.
        detail: the askers' detail; for ``ROUND`` of all together; for ``LEAVE``, where it is a digest of the replica,
            how many digests there are.
        weights: for each rank whether its replica counts in a mean; all 0 if all replicas are equal.
        step: the largest step of all ranks.
        steps: the step of each rank.
        signals: the signals that any rank has received.
        bad: for each rank the place of the first tensor that is not finite, from 1, or 0.
        loss_scales: for each rank a number for its loss scale, or 0.
        left_out: the ranks whose weight has been set to 0 because they are not finite.
        reports: for each rank what it has measured.
    """

    want: Want
    askers: tuple[int, ...]
    size: int
    detail: int
    weights: tuple[int, ...]
    step: int
    signals: int
    bad: tuple[int, ...] = ()
    loss_scales: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()
    left_out: tuple[int, ...] = ()
    reports: tuple[Report, ...] = ()

    @property
    def unanimous(self) -> bool:
        """Whether all ranks asked for this."""
        return len(self.askers) == self.size

    @property
    def takes_mean(self) -> bool:
        """Whether the replicas that count are averaged now."""
        if self.want in (Want.VALIDATE, Want.OVER, Want.LEAVE):
            return self.unanimous
        return self.want in (Want.CONSENSUS, Want.ROUND)


class ReplicasDiffer(Exception):  # noqa: N818 - a finding of all ranks, from which each makes the same error
    """Two ranks offer replicas that cannot be averaged: of another layout, or with other frozen parameters."""

    def __init__(self, one: int, odd: int) -> None:
        super().__init__(one, odd)
        self.one, self.odd = one, odd


def decide(messages: Sequence[Message], inside: Sequence[int] = ()) -> Decision:
    """Choose what is done next; a pure function, so that every rank chooses the same.

    Args:
        messages: of each rank.
        inside: the ranks that these are, where they are not all but those of one worker.

    Raises:
        RuntimeError: on every rank alike, if what one rank wants cannot be had because of where another one is.
        ReplicasDiffer: on every rank alike, if two replicas cannot be averaged.
    """
    want = min(message.want for message in messages)
    asked = [rank for rank, message in enumerate(messages) if message.want == want]
    if want is Want.EPOCH and any(message.want is Want.OVER for message in messages):
        served = Want.OVER  # one rank has left the fit, so the others leave it too
    else:
        served = want
        if want not in (Want.LEAVE, Want.ROUND):
            asked = [rank for rank in asked if messages[rank].detail == messages[asked[0]].detail]

    others = {message.want for message in messages} - {want}
    if want in (Want.ALL_GATHER, Want.STEP) and len(asked) < len(messages) and others != {Want.SIGNAL}:
        raise RuntimeError(_why_not(messages, want, inside))
    if want is Want.ROUND and not all(other.waits or other is Want.SIGNAL for other in others):
        raise RuntimeError(_why_not(messages, want, inside))
    if want is Want.ENDED and others:
        raise RuntimeError(_why_not(messages, want, inside))
    if Want.SIGNAL in {want, *others} and others:
        served, asked = _beside_a_signal(messages, want, asked)

    offers = {rank: (message.layout, message.frozen) for rank, message in enumerate(messages) if message.layout}
    if len(set(offers.values())) > 1 and not inside:
        one = min(offers)
        raise ReplicasDiffer(one, next(rank for rank, offer in offers.items() if offer != offers[one]))

    weights = tuple(message.stepped for message in messages)
    if want in (Want.CONSENSUS, Want.VALIDATE):  # until it lands a replica is its own, also without a step
        weights = tuple(int(message.stepped or message.aloft) for message in messages)
    if not any(weights):
        weights = tuple(message.touched for message in messages)
    detail = messages[asked[0]].detail
    if want is Want.ROUND:
        detail = reduce(operator.or_, (messages[rank].detail for rank in asked))
    if want is Want.LEAVE:
        detail = len({message.detail for message in messages})
        weights = (int(detail > 1),) * len(messages)
    return Decision(
        want=served,
        askers=tuple(inside[place] for place in asked) if inside else tuple(asked),
        size=len(messages),
        detail=detail,
        weights=weights,
        step=max(message.step for message in messages),
        signals=0 if inside else reduce(operator.or_, (message.signals for message in messages)),
        bad=tuple(message.bad for message in messages),
        loss_scales=tuple(message.loss_scale for message in messages),
        steps=tuple(message.step for message in messages),
        reports=tuple(message.report for message in messages),
    )


def _beside_a_signal(messages: Sequence[Message], want: Want, asked: list[int]) -> tuple[Want, list[int]]:
    """Return what is served, and to whom, where some want to act on a signal and others want something before."""
    signalled = [rank for rank, message in enumerate(messages) if message.want is Want.SIGNAL]
    if want is Want.VALIDATE:  # which is due between batches: all can act
        return Want.SIGNAL, signalled
    in_step = want is Want.SIGNAL and any(message.want is Want.STEP for message in messages)
    if want in (Want.ALL_GATHER, Want.CHECK) or in_step:
        return Want.GO_ON, signalled
    if want is Want.ROUND:
        # In mid-step there is nothing to go on from exactly, unless the caller cannot leave it open.
        insists = any(message.detail & INSISTS for message in messages if message.want is Want.ROUND)
        return (Want.GO_ON, signalled) if insists else (Want.HOLD, asked)
    return want, asked


class Header:
    """The process group on which headers travel: Gloo, on the CPU, beside whatever the training uses.

    Args:
        rank: this process's rank.
        size: the number of ranks; with 1 nothing is sent.
        timeout: how long a rank waits for the others before it gives up.
    """

    def __init__(self, rank: int, size: int, timeout: timedelta | None = None) -> None:
        self.rank = rank
        self.size = size
        self._timeout = timeout
        self._group = dist.new_group(backend="gloo", timeout=timeout) if size > 1 else None
        if self._group is not None:
            _end_after_gloo()
        self._inside: tuple[Sequence[int], Any] = (), None  # the ranks of this worker, and their group
        self._board: Board | None = None
        self._work: dist.Work | None = None  # the last header
        self._who = f"Rank {rank}, which starts,"  # and what it was doing then

    def divide(self, ranks: Sequence[int]) -> None:
        """Take note of the ranks that hold one replica with this one, and step together; all ranks at once."""
        group = dist.new_group(list(ranks), backend="gloo", timeout=self._timeout, use_local_synchronization=True)
        self._inside = tuple(ranks), group

    def open_board(self, signals: Signals) -> None:
        """From now on leave word for the others between headers, and read what they leave; all ranks at once."""
        self.close_board()
        if self._group is not None:
            name = f"lightning_localsgd/{self._group.group_name}"
            self._board = Board(name, self.rank, signals)

    def close_board(self) -> None:
        """Read no more."""
        if self._board is not None:
            self._board.close()

    @property
    def tells_of_signals(self) -> bool:
        """Whether some rank has left word of a signal that is still to be acted on."""
        return self._board is not None and self._board.tells_of_signals

    def turn_over(self) -> None:
        """All ranks act on what they have left word of, at the same header."""
        if self._board is not None:
            self._board.turn_over()

    def exchange(self, message: Message, inside: bool = False) -> Decision:
        """Send ``message``, receive those of all ranks, and return what follows from them.

        Args:
            message: of this rank.
            inside: whether the ranks of this worker agree first, on steps that they take together; equal on them.
        """
        if self._group is None:
            return decide([message])
        row, doing = message.row(), f"{_DOING[message.want]} at its step {message.step}"
        if inside:
            ranks, group = self._inside
            decision = decide([Message.of(row) for row in self._rows(row, doing, group, len(ranks))], ranks)
            if decision.want in (Want.STEP, Want.GO_ON):
                return decision
        return decide([Message.of(row) for row in self._rows(row, doing, self._group, self.size)])

    def _rows(self, mine: Tensor, doing: str, group: Any, size: int) -> Tensor:
        """Return the rows of all ranks, each as long as this one."""
        rows = torch.empty(size, len(mine), dtype=torch.int64)
        who = self._who = f"Rank {self.rank}, which {doing},"
        with torch.profiler.record_function("localsgd::header"), explained(who):
            self._work = dist.all_gather(list(rows.unbind()), mine, group=group, async_op=True)
            while not self._work.is_completed():
                with suppress(RuntimeError):  # no more than that it is not completed yet
                    self._work.wait(_LISTEN)
                if not self._work.is_completed():
                    self.look(who)
            self._work.wait()  # raises if it has failed
        return rows

    def gather_numbers(self, numbers: Sequence[int], doing: str) -> list[list[int]]:
        """Return what each rank gives, as many numbers each; what this rank is doing is said where that fails."""
        if self._group is None:
            return [list(numbers)]
        rows: list[list[int]] = self._rows(torch.tensor(numbers), doing, self._group, self.size).tolist()
        return rows

    def telling(self) -> AbstractContextManager[None]:
        """Within it a collective that fails tells what the last header was about."""
        return explained(self._who)

    # After a header, what is said in so many words, by all ranks at once.

    def broadcast(self, value: Any, source: int) -> Any:
        """Return the value of rank ``source``."""
        box = [value]
        if self._group is not None:
            with self.telling():
                dist.broadcast_object_list(box, source, group=self._group)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Return the ``value`` of each rank, of any size; only where all ranks know that all call it."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.size
        with self.telling():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def agree(self, error: Exception | None) -> None:
        """Go on if no rank had an error.

        Raises:
            Exception: this rank's own; a ``RuntimeError`` with that of the first rank that had one, elsewhere.
        """
        said = self.gather(None if error is None else (gethostname(), f"{type(error).__name__}: {error}"))
        if error is not None:
            raise error
        for rank, words in enumerate(said):
            if words is not None:
                host, what = words
                raise RuntimeError(f"Rank {rank} on host {host} failed where all ranks must succeed: {what}")

    def leave(self) -> None:
        """Let the others know that this rank has left with an exception, without waiting for any of them.

        Whoever waits for this rank in a header sees its connection closed, even if this process lives on, or finds a
        note soon: processes that this one has forked, to load data, keep its connections open.
        """
        if self._group is None:
            return
        if self._board is not None:
            self._board.leave()
        if (
            self._work is None or self._work.is_completed()
        ):  # else it was Ctrl-C in a header, and this would wait for it
            self._work = None  # which keeps the connections open
            for group in (self._inside[1], self._group):
                if group is not None:
                    dist.destroy_process_group(group)
            # Before torch 2.8 the end of a group waits for its threads and keeps the GIL, which they may still need to
            # drop the tensors of the last header.
            time.sleep(0.1)
        self._group = None

    def look(self, who: str) -> None:
        """Look for that note, as the board has read it.

        Args:
            who: begins the error: which rank this is, and where in the training.

        Raises:
            RuntimeError: if another rank has left with an exception.
        """
        if self._board is not None and self._board.left:
            raise _stopped(who, LEFT)


@cache
def _end_after_gloo() -> None:
    """See that Python ends a moment after the last collective.

    Gloo's threads drop its tensors when it has been waited for, and need Python for that: one that comes when Python is
    ending is ended, in C++ code that may not be, and the process aborts, though all was done.
    """
    atexit.register(time.sleep, _DROPPED)


@contextmanager
def explained(who: str) -> Generator[None, None, None]:
    """Tell of a collective that has failed where in the training it did, and where to look for the cause."""
    try:
        yield
    except RuntimeError as error:
        if "gloo" not in str(error) or _STOPPED in str(error):  # something else, or told: Gloo's errors name its files
            raise
        if "imed out" in str(error):
            why = f"the others have not come there within the `timeout` of the strategy ({error})"
        else:
            why = LEFT
        raise _stopped(who, why) from error


def _stopped(who: str, why: str) -> RuntimeError:
    rank, where = who.split(",", 1)
    return RuntimeError(f"{rank} on host {gethostname()},{where} {_STOPPED} {why}.")


def _why_not(messages: Sequence[Message], want: Want, inside: Sequence[int]) -> str:
    who, remedy = "Rounds of length 1", "a `period` of at least 2"
    if inside:
        who, remedy = "The devices of a node", '`replica="device"`'
    names = inside or range(len(messages))
    first = next(rank for rank, message in enumerate(messages) if message.want == want)
    others = [rank for rank, message in enumerate(messages) if message.want != want]
    if not others and want is Want.STEP:
        return (
            f"{who} average gradients and need the same parameters with `requires_grad` on every rank, but these many "
            f"are frozen on ranks {names[0]}, {names[1]}, ...: {', '.join(str(each.detail) for each in messages)}."
        )
    other = others[0] if others else next(rank for rank in range(len(messages)) if rank != first)
    where = {
        rank: f"rank {names[rank]} {_DOING[messages[rank].want]} at its step {messages[rank].step}"
        for rank in (first, other)
    }
    if want is Want.STEP:
        return (
            f"{who} average gradients and need the same number of batches on every rank, but {where[first]} while "
            f"{where[other]}; take {remedy} for uneven data."
        )
    return f"The ranks have come apart: {where[first]} while {where[other]}."


_STOPPED = "cannot go on, because"
LEFT = "another worker has left; see the first error above"

_DOING = {
    Want.BARRIER: "waits at a barrier",
    Want.FILES: "saves or removes a checkpoint",
    Want.BROADCAST: "broadcasts",
    Want.REDUCE: "reduces a value",
    Want.GATHER: "gathers a metric",
    Want.CONSENSUS: "looks at the consensus",
    Want.MOMENTS: "looks at the mean of the optimizers' moments",
    Want.VALIDATE: "validates",
    Want.ALL_GATHER: "calls `all_gather`",
    Want.PLAN: "starts a round",
    Want.CHECK: "asks whether a round ends",
    Want.ROUND: "ends a round",
    Want.SIGNAL: "acts on a signal",
    Want.STEP: "starts a training step",
    Want.ENDED: "has no more data in this epoch",
    Want.EPOCH: "starts an epoch",
    Want.OVER: "has ended its fit",
    Want.LEAVE: "leaves the fit",
}
