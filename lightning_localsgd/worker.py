"""WHO takes part: one worker of a run, which counts its steps and does its share of what all ranks decide."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_localsgd.collectives import Collectives
from lightning_localsgd.header import Decision, Header, Message, Want
from lightning_localsgd.mean import Mean
from lightning_localsgd.replica import Replica
from lightning_localsgd.schedule import Clock


class Worker:
    """One worker from the start of a fit to its end.

    Args:
        header: how this rank tells the others what it wants.
        clock: counts steps and rounds.
        replica: this worker's model.
        mean: how models are averaged.
        device: where tensors must be to travel.
        act: does what signals ask for, on all ranks at once.
    """

    def __init__(
        self,
        header: Header,
        *,
        clock: Clock,
        replica: Replica,
        mean: Mean,
        device: torch.device,
        act: Callable[[int], None],
    ) -> None:
        self._header = header
        self.clock = clock
        self.replica = replica
        self.mean = mean
        self.collectives = Collectives(self.ask, device)
        self._act = act
        # Since the last average: has this worker taken a step, has it run a training step (which may change buffers)?
        self.stepped = self.touched = False
        self.validation_is_due = False  # put off to the end of the epoch
        self.inside_consensus = False
        self.holds_other_weights = False  # inside a consensus, and not only because all replicas are equal
        self.signals = 0  # received by this process
        self.known_signals = 0  # received by any, as all know

    @property
    def alone(self) -> bool:
        """Whether there is no other worker."""
        return self._header.size == 1

    # ----------------------------------------------------------------------------------------------------- the protocol

    def start(self) -> None:
        """Start from rank 0's model.

        Raises:
            RuntimeError: on all ranks, if their models differ in more than their values.
        """
        self._exchange(Want.EPOCH)
        if not self.alone:
            self.mean.broadcast(self.replica.tensors())

    def ask(self, want: Want, detail: int = 0) -> Decision:
        """Send headers, and take part in what the others want, until this worker's own want is served."""
        while True:
            decision = self._exchange(want, detail)
            asked = self._header.rank in decision.askers
            if decision.want is Want.ROUND or (decision.want is Want.OVER and decision.unanimous):
                self._end_round(decision)
            elif decision.want is Want.VALIDATE and not decision.unanimous:
                self._put_off_validation(decision)
            elif decision.want is Want.SIGNAL:
                self.act_on_signals()
            elif decision.want is Want.CONSENSUS and not asked:
                self.average(decision.weights, write=False)
            elif not asked:
                self.collectives.stand_in(decision)
            if asked:
                return decision

    def _exchange(self, want: Want, detail: int = 0) -> Decision:
        message = Message(
            want,
            detail,
            stepped=int(self.stepped),
            touched=int(self.touched),
            step=self.clock.step,
            signals=self.signals,
            layout=self.replica.layout() if want.offers_replica and not self.alone else 0,
        )
        decision = self._header.exchange(message)
        self.known_signals |= decision.signals
        return decision

    def act_on_signals(self) -> None:
        """Do what the signals ask for that all ranks know of."""
        signals, self.signals, self.known_signals = self.known_signals, 0, 0
        if signals:
            self._act(signals)

    def heed(self) -> None:
        """At each batch after a signal: launchers send SIGTERM also to those whom another worker has left.

        Raises:
            RuntimeError: if another worker has left with an exception, which the next header would tell much later.
        """
        if self.signals:
            self._header.look(f"Rank {self._header.rank}, at its step {self.clock.step},")

    def _put_off_validation(self, decision: Decision) -> None:
        self.validation_is_due = True
        rank_zero_warn(
            f"Rank {decision.askers[0]} reached a validation in mid-epoch that other ranks did not reach, because "
            "their data in this epoch has ended: all validate at the end of the epoch instead."
        )

    # ------------------------------------------------------------------------------------------------- steps and rounds

    def end_step(self) -> None:
        """Count a step; after the last one of a round, average."""
        over = self.clock.tick()
        if self.clock.averages_models:
            self.stepped = True
            if over:
                self.ask(Want.ROUND)
        elif over:  # all replicas are equal: their gradients were averaged
            self.clock.next_round(self.clock.step)

    def _end_round(self, decision: Decision) -> None:
        if any(decision.weights):
            self.average(decision.weights)
            self.stepped = self.touched = False
            self.clock.next_round(decision.step)

    def average(self, weights: Sequence[int], write: bool = True) -> None:
        """Average the replicas that count; without ``write``, only contribute."""
        if any(weights) and not self.alone:
            self.mean.average(self.replica.tensors(), weights, self._header.rank, write)

    def average_all(self) -> None:
        """Average the replicas of all workers, whether they have stepped or not."""
        self.average([1] * self._header.size)

    def average_buffers(self) -> None:
        """Average the buffers of all workers, which their forward passes have changed, without a header."""
        self.touched = False
        if not self.alone:
            self.mean.average(self.replica.buffers(), [1] * self._header.size, self._header.rank)

    # -------------------------------------------------------------------------------------------------------- consensus

    @contextmanager
    def consensus(self) -> Generator[None, None, None]:
        """Within it the module holds the mean of all replicas, after it its own weights again."""
        if self.inside_consensus:
            yield
            return
        decision = self.ask(Want.CONSENSUS)
        with self.holding_consensus(decision.weights):
            yield

    @contextmanager
    def holding_consensus(self, weights: Sequence[int]) -> Generator[None, None, None]:
        """The same after a header that all ranks have answered alike."""
        own = self.replica.snapshot() if any(weights) and not self.alone else None
        self.inside_consensus, self.holds_other_weights = True, own is not None
        try:
            self.average(weights)
            if own is not None:
                own.mark()
            yield
        finally:
            self.inside_consensus = self.holds_other_weights = False
            if own is not None:
                own.restore()
