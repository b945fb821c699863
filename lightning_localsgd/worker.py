"""WHO takes part: one worker of a run, which counts its steps and does its share of what all ranks decide."""

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_localsgd.collectives import Collectives
from lightning_localsgd.header import Decision, Header, Message, ReplicasDiffer, Want
from lightning_localsgd.mean import Mean
from lightning_localsgd.moments import mean_state
from lightning_localsgd.optimizers import Optimizers
from lightning_localsgd.replica import Replica, Snapshot, difference
from lightning_localsgd.schedule import Clock


class Worker:
    """One worker from the start of a fit to its end.

    Args:
        header: how this rank tells the others what it wants.
        clock: counts steps and rounds.
        replica: this worker's model.
        optimizers: what trains it.
        mean: how models are averaged.
        device: where tensors must be to travel.
        act: does what signals ask for, on all ranks at once.
        files: does this worker's part in writing or removing a checkpoint that others asked for.
    """

    def __init__(
        self,
        header: Header,
        *,
        clock: Clock,
        replica: Replica,
        optimizers: Optimizers,
        mean: Mean,
        device: torch.device,
        act: Callable[[int], None],
        files: Callable[[int], None],
    ) -> None:
        self._header = header
        self.clock = clock
        self.replica = replica
        self.optimizers = optimizers
        self.mean = mean
        self.collectives = Collectives(self.ask, device)
        self._device = device
        self._act = act
        self._files = files
        # Since the last average: has this worker taken a step, has it run a training step (which may change buffers)?
        self.stepped = self.touched = False
        self.at_consensus: Callable[[], None] = lambda: None  # called when a round has ended and the next has begun
        self.validation_is_due = False  # put off to the end of the epoch
        self.inside_consensus = False
        self._own: Snapshot | None = None  # inside a consensus, unless it is because all replicas are equal
        self.signals = 0  # received by this process
        self.known_signals = 0  # received by any, as all know
        self._modest = False  # whether the replica has no large elements, as the last header's look has shown
        self._restarts: Counter[int] = Counter()  # of each rank, because it was not finite

    @property
    def alone(self) -> bool:
        """Whether there is no other worker."""
        return self._header.size == 1

    # ----------------------------------------------------------------------------------------------------- the protocol

    def start(self, state: dict[str, Any] | None = None) -> None:
        """Start from rank 0's model, or from where this worker was.

        Args:
            state: what :meth:`state` gave, on all ranks or on none.

        Raises:
            RuntimeError: on all ranks, if their models differ in more than their values.
            ValueError: if ``state`` is of another model.
        """
        self._exchange(self._message(Want.EPOCH))
        if state is not None:
            self.stepped, self.touched, self.validation_is_due = map(bool, state["flags"])
            self.replica.load(state["replica"])
        elif not self.alone:
            self.mean.broadcast(self.replica.tensors())
        if state is None:
            self.replica.begin_round()
        self.replica.examine()  # remembers which buffers are finite

    @contextmanager
    def state(self) -> Generator[dict[str, Any], None, None]:
        """Give where this worker is: its clock, what it has done since the last average, and its own replica.

        Within the context the module and the optimizers hold this worker's own values, also inside a consensus.
        """
        with nullcontext() if self._own is None else self._own.back_for_a_while():
            yield {
                "clock": self.clock.state_dict(),
                "flags": [self.stepped, self.touched, self.validation_is_due],
                "replica": self.replica.state(),
            }

    def ask(self, want: Want, detail: int = 0) -> Decision:
        """Send headers, and take part in what the others want, until this worker's own want is served."""
        message = self._message(want, detail)
        while True:
            decision = self._exchange(message)
            asked = self._header.rank in decision.askers
            if decision.want is Want.ROUND or (decision.want is Want.OVER and decision.unanimous):
                self._end_round(decision)
                message = self._message(want, detail)
            elif decision.want is Want.VALIDATE and not decision.unanimous:
                self._put_off_validation(decision)
            elif decision.want is Want.SIGNAL:
                self.act_on_signals()
                message = self._message(want, detail)
            elif decision.want is Want.CONSENSUS and not asked:
                self.average(decision.weights, write=False)
            elif decision.want is Want.MOMENTS and not asked:
                self._mean_state(self.optimizers.all()[decision.detail].state_dict(), decision)
            elif decision.want is Want.FILES and not asked:
                self._files(decision.askers[0])
            elif not asked:
                self.collectives.stand_in(decision)
            if asked:
                return decision

    def _message(self, want: Want, detail: int = 0) -> Message:
        """Say what this worker wants; its replica does not change while it waits for it."""
        offers = want.offers_replica and not self.alone
        counts = want.offers_replica and (self.stepped or self.touched or want is Want.LEAVE)
        bad, self._modest = self.replica.examine() if counts else (0, False)
        return Message(
            want,
            detail,
            stepped=int(self.stepped),
            touched=int(self.touched),
            step=self.clock.step,
            layout=self.replica.layout() if offers else 0,
            frozen=self.replica.frozen_digest() if offers else 0,
            bad=bad,
            loss_scale=self.optimizers.loss_scale if offers else 0,
        )

    def _exchange(self, message: Message) -> Decision:
        try:
            decision = self._header.exchange(replace(message, signals=self.signals))
        except ReplicasDiffer as found:  # by all ranks
            descriptions = self._header.gather(self.replica.describe())
            one, odd = descriptions[found.one], descriptions[found.odd]
            raise RuntimeError(
                f"All workers must train the same model, and the parameters and buffers of rank {found.odd} differ "
                f"from those of rank {found.one}: {difference(one, odd)}."
            ) from None
        self.known_signals |= decision.signals
        return self._without_nonfinite(decision) if decision.takes_mean else decision

    def _without_nonfinite(self, decision: Decision) -> Decision:
        """Take their weight from replicas that are not finite.

        Raises:
            RuntimeError: on all ranks, if a mean of the others is not wanted, or there are no others.
        """
        counted = [rank for rank, weight in enumerate(decision.weights) if weight]
        bad = [rank for rank in counted if decision.bad[rank]]
        if bad and (self.mean.nonfinite == "raise" or bad == counted):
            where = "; ".join(f"rank {rank}: `{self.replica.name(decision.bad[rank])}`" for rank in bad)
            remedy = "" if bad == counted else ", or `Mean(nonfinite='exclude')` to go on with the other workers"
            raise RuntimeError(
                f"A mean at step {decision.step} needs finite replicas, but these workers have a NaN or an infinite "
                f"value (in each the first such tensor): {where}. Nothing has been averaged. Try a lower learning rate "
                f"or gradient clipping{remedy}."
            )
        weights = tuple(int(weight and rank not in bad) for rank, weight in enumerate(decision.weights))
        return replace(decision, weights=weights, left_out=tuple(bad))

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
            self._restart_nonfinite(decision)
            scales = [scale for scale, weight in zip(decision.loss_scales, decision.weights, strict=True) if weight]
            if min(scales):
                self.optimizers.loss_scale = min(scales)
            self.stepped = self.touched = False
            self.replica.begin_round()
            self.clock.next_round(decision.step)
            self.at_consensus()

    def _restart_nonfinite(self, decision: Decision) -> None:
        for rank in decision.left_out:
            self._restarts[rank] += 1
            rank_zero_warn(
                f"Rank {rank} was left out of the average at step {decision.step}, because its "
                f"`{self.replica.name(decision.bad[rank])}` has a NaN or an infinite value, and restarts from the mean "
                f"of the others with a new optimizer state: restart {self._restarts[rank]} of this rank."
            )
            if rank == self._header.rank:
                self.optimizers.reset()

    def average(self, weights: Sequence[int], write: bool = True) -> None:
        """Average the replicas that count; without ``write``, only contribute."""
        if any(weights) and not self.alone:
            self.mean.average(self.replica.sent(), weights, self._header.rank, write, self._modest)

    def leave(self) -> None:
        """Say the last word of the fit, and average once more if the replicas are no longer equal."""
        if not self.alone:
            weights = self.ask(Want.LEAVE, self.replica.digest()).weights
            if any(weights):  # frozen parameters too
                self.mean.average(self.replica.tensors(), weights, self._header.rank)

    def average_buffers(self) -> None:
        """Average the buffers of all workers, which their forward passes have changed, without a header."""
        self.touched = False
        if not self.alone:
            self.mean.average(self.replica.buffers(), [1] * self._header.size, self._header.rank)

    # -------------------------------------------------------------------------------------------------------- consensus

    @property
    def holds_other_weights(self) -> bool:
        """Whether the module holds the consensus now, and that is not this worker's own replica."""
        return self._own is not None

    def mean_state(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """Return the state dict ``state`` of one of the optimizers with the mean of its moments over all workers."""
        if self.alone or not self.clock.averages_models:
            return state
        index = next(i for i, other in enumerate(self.optimizers.all()) if other is optimizer)
        return self._mean_state(state, self.ask(Want.MOMENTS, detail=index))

    def _mean_state(self, state: dict[str, Any], decision: Decision) -> dict[str, Any]:
        return mean_state(state, self.mean, self._header, reader=decision.askers[0], device=self._device)

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
        self.inside_consensus, self._own = True, own
        try:
            self.average(weights)
            if own is not None:
                own.mark()
            yield
        finally:
            self.inside_consensus, self._own = False, None
            if own is not None:
                own.restore()
