"""WHO takes part: one worker of a run, which counts its steps and does its share of what all ranks decide."""

import math
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_localsgd.anchor import require_whole
from lightning_localsgd.averages import Averages, Ending
from lightning_localsgd.clock import Clock
from lightning_localsgd.collectives import Collectives
from lightning_localsgd.fingerprint import other_model
from lightning_localsgd.header import AT_ONCE, INSISTS, Decision, Header, Message, ReplicasDiffer, Want
from lightning_localsgd.landing import Landing
from lightning_localsgd.links import Links
from lightning_localsgd.mean import Mean
from lightning_localsgd.optimizers import Optimizers
from lightning_localsgd.pace import Pace
from lightning_localsgd.progress import Measured, Report
from lightning_localsgd.replica import Replica, Snapshot
from lightning_localsgd.rounds import Rounds
from lightning_localsgd.signals import Signals
from lightning_localsgd.states import States


class Worker:
    """One worker from the start of a fit to its end.

    Args:
        header: how this rank tells the others what it wants.
        links: between the workers.
        background: those on which averages travel in the background.
        inside: those between the ranks of this worker.
        clock: counts steps and rounds.
        replica: this worker's model.
        optimizers: what trains it.
        mean: how models are averaged.
        landing: what becomes of the mean.
        seed: of the noise in roundings.
        states: what becomes of the optimizers' states.
        measured: what is known to the schedule and the pace.
        pace: how much this worker does in a round, or None if all do the same.
        rounds: tells of each round to those who listen.
        device: where tensors must be to travel.
        epoch: returns how many passes over the data are completed.
        expected_steps: returns how many steps this worker expects in the whole run, or NaN.
        signals: what this process has received.
        act: does what signals ask for, on all ranks at once.
        files: does this worker's part in writing or removing a checkpoint that others asked for.
    """

    def __init__(
        self,
        header: Header,
        *,
        links: Links,
        background: Links,
        inside: Links,
        clock: Clock,
        replica: Replica,
        optimizers: Optimizers,
        mean: Mean,
        landing: Landing,
        seed: int,
        states: States,
        measured: Measured,
        pace: Pace | None,
        rounds: Rounds,
        device: torch.device,
        epoch: Callable[[], int],
        expected_steps: Callable[[], float],
        signals: Signals,
        act: Callable[[int], None],
        files: Callable[[int], None],
    ) -> None:
        self._header = header
        self.links = links
        self._inside = inside
        self._steps_inside = False  # whether the ranks of a worker agree on steps among themselves, as all know
        self._everyone = Links(header.rank, header.size)
        self.clock = clock
        self.replica = replica
        self.optimizers = optimizers
        self.mean = mean
        self.landing = landing
        self.averages = Averages(
            mean,
            landing,
            replica,
            rounds.probe(),
            links=links,
            background=background,
            seed=seed,
            device=device,
            look=self.heed,
        )
        self._states = states
        self.measured = measured
        self.pace = pace
        self.rounds = rounds
        self._epoch = epoch
        self._expected_steps = expected_steps
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
        self._signals = signals
        self.known_signals = 0  # received by any, as all know
        self.round_is_due = False  # it has ended, but signals are acted on first
        self._modest = False  # whether the replica has no large elements, as the last header's look has shown
        self._came: float | None = None  # when it came to the end of its round
        self._is_probed = True  # whether it is measured how far the replicas move in this round, for those who listen
        self._restarts: Counter[int] = Counter()  # of each rank, because it was not finite

    @property
    def is_aloft(self) -> bool:
        """Whether an average has not landed yet: until then the replicas differ."""
        return self.averages.flight is not None

    @property
    def alone(self) -> bool:
        """Whether there is no other rank."""
        return self._header.size == 1

    @property
    def averages_gradients(self) -> bool:
        """Whether gradients are averaged in each step: over all ranks, or inside the worker."""
        return not self.clock.averages_models or self.has_devices

    @property
    def has_devices(self) -> bool:
        """Whether other ranks hold this replica, too."""
        return self._inside.workers > 1

    @property
    def group_inside(self) -> Any:
        """The process group of the ranks that hold this replica."""
        return self._inside.group

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
            self.stepped, self.touched, self.validation_is_due, self.round_is_due = map(bool, state["flags"])
            self.replica.load(state["replica"])
            self.measured.load_own_state(state["measured"])
            self.optimizers.load_noted_rates(state["rates"])
        elif not self.alone:
            self.mean.broadcast(self.replica.tensors())
        if state is None:
            self._begin_round(self.clock.step)
        if self.clock.averages_models:
            self._take_anchor()
        if state is not None:
            self.averages.load_state_dict(state["averages"])
        self.replica.examine()  # remembers which buffers are finite
        self.replica.let_go()

    def restart(self, clock: Clock, measured: Measured, landing: dict[str, Any]) -> None:
        """Begin anew from a checkpoint's numbers, and from the model that the module will have at the first step."""
        self.clock, self.measured, self._steps_inside, self._is_probed = clock, measured, False, True
        self.landing.forget()
        self.landing.load_state_dict(landing)
        self.averages.forget()

    def common_state(self, whole: bool) -> dict[str, Any]:
        """Return what a checkpoint keeps that is equal on all workers; with the anchor if ``whole``."""
        landing = self.landing.state_dict(whole)
        measured = {"measured": self.measured.state_dict()} if self.measured.needs else {}
        clock, pace = self.clock.state_dict(), {}
        if self.pace is not None:  # a new round starts where the fastest is, as far as is known
            step = max(self.clock.step, self.pace.furthest)
            clock["taken"], pace = step - self.clock.start, {"paces": self.pace.state_dict(step)}
        return {"clock": clock} | measured | pace | ({"landing": landing} if landing else {})

    @contextmanager
    def state(self) -> Generator[dict[str, Any], None, None]:
        """Give where this worker is: its clock, what it has done since the last average, and its own replica.

        Within the context the module and the optimizers hold this worker's own values, also inside a consensus.
        """
        with nullcontext() if self._own is None else self._own.back_for_a_while():
            yield {
                "clock": self.clock.state_dict(),
                "flags": [self.stepped, self.touched, self.validation_is_due, self.round_is_due],
                "replica": self.replica.state(),
                "measured": self.measured.own_state(),
                "rates": self.optimizers.noted_rates(),
                "averages": self.averages.state_dict(),
            }

    def ask(self, want: Want, detail: int = 0) -> Decision:
        """Send headers, and take part in what the others want, until this worker's own want is served."""
        try:
            with self.measured.pause(), self._header.telling():
                return self._ask(want, detail)
        finally:
            self.replica.let_go()

    def _ask(self, want: Want, detail: int) -> Decision:
        if want in (Want.ROUND, Want.OVER, Want.LEAVE):
            self._let_land()
        message = self._message(want, detail)
        while True:
            decision = self._exchange(message)
            asked = self._header.rank in decision.askers
            if decision.want in (Want.EPOCH, Want.STEP, Want.PLAN) and not self.clock.is_planned:
                self._plan(decision)
            if decision.want in (Want.EPOCH, Want.STEP, Want.PLAN):  # a header of all, who are between steps
                self._steps_inside = self.clock.averages_models and self.has_devices
            if decision.want is Want.ROUND or (decision.want is Want.OVER and decision.unanimous):
                self._end_round(decision)
                if not asked:
                    message = self._message(want, detail)
            elif decision.want is Want.VALIDATE and not decision.unanimous:
                self._put_off_validation(decision)
            elif decision.want is Want.SIGNAL:
                self._header.turn_over()
                self._act_on_known_signals()
                message = self._message(want, detail)
            elif decision.want is Want.CONSENSUS and not asked:
                self.average(decision.weights, write=False)
            elif decision.want is Want.MOMENTS and not asked:
                self._states.mean(self.optimizers.all()[decision.detail].state_dict(), decision.askers[0])
            elif decision.want is Want.FILES and not asked:
                self._files(decision.askers[0])
            elif not asked and decision.want not in (Want.GO_ON, Want.HOLD):
                self.collectives.stand_in(decision)
            if asked:
                return decision

    def _message(self, want: Want, detail: int = 0) -> Message:
        """Say what this worker wants; its replica does not change while it waits for it."""
        offers = want.offers_replica and not self.alone
        counts = want.offers_replica and (self.stepped or self.touched or self.is_aloft or want is Want.LEAVE)
        if offers:
            self.replica.hold()
        bad, self._modest = self.replica.examine() if counts else (0, False)
        return Message(
            want,
            detail,
            stepped=int(self.stepped),
            touched=int(self.touched),
            aloft=int(self.is_aloft),
            step=self.clock.step,
            layout=self.replica.layout() if offers else 0,
            frozen=self.replica.frozen_digest() if offers else 0,
            bad=bad,
            loss_scale=self.optimizers.loss_scale if offers else 0,
            report=self._report(want),
        )

    def _report(self, want: Want) -> Report:
        """Say what the schedule wants to know of this worker."""
        needs = self.measured.needs
        if not self.measured.measures:
            return Report()
        return self.measured.report(
            self.optimizers.learning_rate if "learning_rate" in needs else math.nan,
            self._expected_steps() if "steps_left" in needs else math.nan,
            self.averages.distance() if want is Want.CHECK else math.nan,
        )

    def _exchange(self, message: Message) -> Decision:
        try:
            message = replace(message, signals=self._signals.pending)
            decision = self._header.exchange(message, self._steps_inside)
        except ReplicasDiffer as found:  # by all ranks
            descriptions = self._header.gather(self.replica.describe())
            raise other_model(found.one, found.odd, descriptions[found.one], descriptions[found.odd]) from None
        self.known_signals |= decision.signals
        return self._without_nonfinite(decision) if decision.takes_mean else decision

    def _without_nonfinite(self, decision: Decision) -> Decision:
        """Take their weight from replicas that are not finite.

        Raises:
            RuntimeError: on all ranks, if a mean of the others is not wanted, or there are no others.
        """
        counted = [rank for rank, weight in enumerate(decision.weights) if weight]
        found = [rank for rank in counted if decision.bad[rank]]
        bad = sorted({mate for rank in found for mate in self.links.mates(rank)})
        if bad and (self.mean.nonfinite == "raise" or bad == counted):
            where = "; ".join(f"rank {rank}: `{self.replica.name(decision.bad[rank])}`" for rank in found)
            remedy = "" if bad == counted else ", or `Mean(nonfinite='exclude')` to go on with the other workers"
            raise RuntimeError(
                f"A mean at step {decision.step} needs finite replicas, but these workers have a NaN or an infinite "
                f"value (in each the first such tensor): {where}. Nothing has been averaged. Try a lower learning rate "
                f"or gradient clipping{remedy}."
            )
        weights = tuple(int(weight and rank not in bad) for rank, weight in enumerate(decision.weights))
        return replace(decision, weights=weights, left_out=tuple(bad))

    def act_on_signals(self) -> None:
        """Do what the signals ask for that all ranks know of, where all are."""
        if self.known_signals:
            self._header.turn_over()
            self._act_on_known_signals()

    def _act_on_known_signals(self) -> None:
        self.replica.let_go()
        signals, self.known_signals = self.known_signals, 0
        if signals:
            self._act(signals)

    def heed(self) -> None:
        """At each batch: look whether another worker has left, which the next header would tell much later.

        Raises:
            RuntimeError: if one has left with an exception.
        """
        self._header.look(f"Rank {self._header.rank}, at its step {self.clock.step},")

    @property
    def hears_of_signals(self) -> bool:
        """Whether a signal is to be acted on before the next batch."""
        return bool(self.known_signals or self._header.tells_of_signals or (self.alone and self._signals.pending))

    def end_round(self) -> Decision:
        """Between batches: end a round, after acting on signals that others have read of."""
        while (decision := self._ask_to_end_round()).want is Want.HOLD:
            self.ask(Want.SIGNAL)
        self.round_is_due = False
        return decision

    def _ask_to_end_round(self) -> Decision:
        # If other parameters are trained from here on, the next round must start from the same values everywhere.
        return self.ask(Want.ROUND, detail=AT_ONCE * (self.mean.delay > 0 and self.replica.changes))

    def synchronize(self) -> None:
        """End the round now, also where a signal is to be acted on, and average before going on."""
        self.ask(Want.ROUND, detail=INSISTS | AT_ONCE)

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
        if self.pace is not None:
            self.pace.tick()
            over = self.pace.is_over(self.clock) if self.clock.averages_models else over
        self.measured.note_step()
        if self.clock.averages_models:
            self.stepped = True
            if self.averages.flight is not None and self.averages.flight.tick():
                self._let_land()
            if over or (self.clock.is_at_check() and self._check()):
                self._settle()
                self._came = time.perf_counter()
                self.round_is_due = self._ask_to_end_round().want is Want.HOLD
        elif over:  # all replicas are equal: their gradients were averaged
            self._tell_of_gradients()
            self.clock.next_round(self.clock.step)
            self._plan_if_known()

    def is_idle(self) -> bool:
        """Before a batch: whether this worker has no step left in this round."""
        self.start_step()
        return self.pace is not None and self.pace.is_over(self.clock)

    def start_step(self) -> None:
        """Before a step that averages models: see that its round has a length, and who agrees on steps.

        When gradients of all ranks give way to models, ranks go on at different moments, and some may still be in
        their last step: where a worker has several, the next header is one of all, before they agree among themselves.
        """
        if not self.clock.is_planned or self._steps_inside != self.has_devices:
            self.ask(Want.PLAN)

    def end_last_step(self) -> None:
        """After this worker's last step of a pass over the data, before any validation."""
        if self.clock.ends_with_pass() and not self.round_is_due:
            self.round_is_due = self._ask_to_end_round().want is Want.HOLD

    def end_pass(self) -> int:
        """After the last step of a pass over the data; waits for the others, and returns the furthest one's step."""
        decision = self.ask(Want.ENDED)
        self.act_on_signals()  # before anything is counted that would be counted again after a resume
        if any(decision.weights):  # else all rounds have ended with its last steps
            if self.clock.ends_with_pass():
                self.end_round()
            else:
                self.clock.passes += 1
        return decision.step

    def _check(self) -> bool:
        reports = self.ask(Want.CHECK).reports
        distances = tuple(report.distance for report in reports if not math.isnan(report.distance))
        return self.clock.schedule.ends_round(self.clock.progress(self.measured, self._epoch(), distances=distances))

    def _plan(self, decision: Decision) -> None:
        """Plan the round that begins, after a header that all ranks have answered alike."""
        asked = [decision.reports[rank] for rank in decision.askers]  # the others' learning rate may be an old one
        self.measured.hear(asked, ends_round=False)
        self._plan_round()

    def _plan_if_known(self) -> None:
        if not self.clock.plans_late:
            self._plan_round()

    def _plan_round(self) -> None:
        """Plan the round from what all know.

        Raises:
            ValueError: on all ranks, if it has one step, in which gradients are averaged, and outer steps are wanted.
        """
        progress = self.clock.progress(self.measured, self._epoch())
        self.clock.plan(progress)
        self.measured.planned()
        if self.clock.averages_models:
            if not progress.averages_models:  # the first round that does
                self.measured.start_round()
                self._begin_round(self.clock.step)
            self._take_anchor()  # which is known but then, or after a search for the learning rate
        elif self.landing.steps and not self.clock.schedule.warms_up(progress):
            raise ValueError(
                f"An outer step needs rounds of at least 2 steps, and {self.clock.schedule!r} begins with one of 1, in "
                "which gradients are averaged: only the warm-up of `PostLocal` may."
            )

    def _begin_round(self, step: int) -> None:
        self.replica.begin_round()
        self._is_probed = self.clock.averages_models and self.rounds.measures_spread(step)
        self.averages.begin_round(self._is_probed)

    def _take_anchor(self) -> None:
        """Take note of where a round starts."""
        if self.landing.is_needed:
            self.landing.begin(self.replica.trained())
        elif self.mean.delay:
            require_whole(self.replica.trained())

    def _end_round(self, decision: Decision) -> None:
        if not any(decision.weights):
            return
        self._let_land()
        start = time.perf_counter()
        later = self.mean.delay > 0 and decision.want is Want.ROUND and not decision.detail & AT_ONCE
        with torch.profiler.record_function("localsgd::round"):
            of = self._ending(decision, start)
            if later:
                self.averages.launch(of, self._modest)
            else:
                squares = self.averages.now(of, self._modest)
        counted = [report for report, weight in zip(decision.reports, decision.weights, strict=True) if weight]
        self.measured.hear(counted, ends_round=True)
        if self.pace is not None:
            self.pace.hear([report.step_seconds for report in decision.reports])
        self._tell_of_nonfinite(decision)
        self._states.end_round(decision, self.clock.round)
        if not later:
            self._states.start_round(of.left_out)
        scales = [scale for scale, weight in zip(decision.loss_scales, decision.weights, strict=True) if weight]
        if min(scales):
            self.optimizers.loss_scale = min(scales)
        seconds, tell = self._seconds_since(start), self._telling(decision, of)
        flight = self.averages.flight
        if flight is not None:
            flight.seconds, flight.tell = seconds, tell
        else:
            self.measured.note_average(of.steps, seconds, of.waited, squares)
            tell(seconds)
        self.measured.start_round()
        self.stepped = self.touched = False
        self._begin_round(decision.step)
        if not later:
            self._take_anchor()
        self.clock.next_round(decision.step)
        self._plan_if_known()
        if not later:
            self.at_consensus()

    def _let_land(self) -> None:
        """Go on from the average that is under way, if there is one."""
        if self.averages.flight is None:
            return
        with self.measured.pause():
            start, flight = time.perf_counter(), self.averages.flight
            squares = self.averages.land(self.at_consensus)
            self._modest = False  # what the last header looked at is not here any more
            self._states.start_round(flight.of.left_out)
            seconds = flight.seconds + self._seconds_since(start)  # in which it had to wait
            self.measured.note_average(flight.of.steps, seconds, flight.of.waited, squares)
            flight.tell(seconds)

    def _ending(self, decision: Decision, start: float) -> Ending:
        """Return what the workers know of the round that ends."""
        weights = decision.weights
        came, self._came = self._came, None
        factor = 1.0
        if self.pace is not None:
            factor = self.pace.factor([step - self.clock.start for step in decision.steps], weights)
        return Ending(
            number=self.clock.round,
            weights=weights,
            left_out=self._header.rank in decision.left_out,
            rates=self._rates(weights),
            factor=factor,
            steps=decision.step - self.clock.start,
            waited=start - came if came is not None else math.nan,
            probed=self._is_probed,
        )

    def _settle(self) -> None:
        """Let the device end its work, where that is timed."""
        if "seconds" in self.measured.measures and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _seconds_since(self, start: float) -> float:
        self._settle()
        return time.perf_counter() - start

    def _telling(self, decision: Decision, of: Ending) -> Callable[[float], None]:
        """Return what tells the listeners of this round, when its average has landed after so many seconds."""
        if not self.rounds.are_heard:
            return lambda seconds: None
        payload, payload_of_ddp = self.averages.payload()
        payload += self._states.payload(self.clock.round)
        return partial(
            self._tell_of_models, of, step=decision.step, reports=decision.reports, sizes=(payload, payload_of_ddp)
        )

    def _tell_of_models(
        self, of: Ending, seconds: float, step: int, reports: Sequence[Report], sizes: tuple[int, int]
    ) -> None:
        self.rounds.end(
            of.number,
            step=step,
            steps=of.steps,
            payload=sizes[0],
            payload_of_ddp=sizes[1],
            weights=tuple(self.links.of_workers(of.weights)),
            average_seconds=seconds,
            waited=of.waited,
            reports=self.links.of_workers(reports),
        )

    def _tell_of_gradients(self) -> None:
        if self.rounds.are_heard:
            _, sent = self.replica.payload()
            clock = self.clock
            self.rounds.end(clock.round, step=clock.step, steps=clock.taken, payload=sent, payload_of_ddp=sent)

    def _rates(self, weights: Sequence[int]) -> Mapping[str, float]:
        """Return the mean learning rate over the steps of this round and the workers, for each parameter."""
        if not self.landing.needs_rates:
            return {}
        told = self._header.gather(self.optimizers.take_rates())
        counted = [rates for rates, weight in zip(told, weights, strict=True) if weight]
        if len({len(rates) for rates in told}) > 1:
            raise RuntimeError(
                "`SlowMo` needs the same parameter groups on all workers, got these many on the ranks 0, 1, ...: "
                f"{', '.join(str(len(rates)) for rates in told)}."
            )
        return self.optimizers.rates_by_name([math.fsum(of) / len(of) for of in zip(*counted, strict=True)])

    def _tell_of_nonfinite(self, decision: Decision) -> None:
        for rank in [rank for rank in decision.left_out if decision.bad[rank]]:
            self._restarts[rank] += 1
            rank_zero_warn(
                f"Rank {rank} was left out of the average at step {decision.step}, because its "
                f"`{self.replica.name(decision.bad[rank])}` has a NaN or an infinite value, and restarts from the mean "
                f"of the others with a new optimizer state: restart {self._restarts[rank]} of this rank."
            )

    def average(self, weights: Sequence[int], write: bool = True) -> None:
        """Average the replicas that count; without ``write``, only contribute."""
        if not any(weights) or self.alone:
            return
        sent, buffers = self.replica.sent(), len(self.replica.buffers())
        # The devices of a node agree on buffers when they step, not between batches that are accumulated.
        apart = len(sent) - buffers if self.has_devices else len(sent)
        for tensors, links in ((sent[:apart], self.links), (sent[apart:], self._everyone)):
            self.mean.average(tensors, weights, links, write, self._modest)

    def leave(self) -> None:
        """Say the last word of the fit, and average once more if the replicas are no longer equal."""
        if not self.alone:
            decision = self.ask(Want.LEAVE, self.replica.digest())
            self.rounds.tell_spread(self.links.of_workers(decision.reports))
            weights = decision.weights
            if any(weights):  # frozen parameters too
                self.mean.average(self.replica.tensors(), weights, self._everyone)

    def average_buffers(self) -> None:
        """Average the buffers of the ranks whose gradients are, which their forward passes have changed; no header."""
        links = self._inside if self.clock.averages_models else self._everyone
        if not self.clock.averages_models:
            self.touched = False
        if links.workers > 1:
            self.mean.average(self.replica.buffers(), [1] * links.workers, links)

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
        return self._states.mean(state, self.ask(Want.MOMENTS, detail=index).askers[0])

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
            with self.measured.pause():
                yield
        finally:
            self.inside_consensus, self._own = False, None
            if own is not None:
                own.restore()
