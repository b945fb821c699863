"""HOW a round ends for one worker: its model is averaged at once, or in the background while it goes on."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_localsgd.exchange import Exchange
from lightning_localsgd.flight import Flight
from lightning_localsgd.landing import Landing
from lightning_localsgd.mean import Bucket, Group, Mean
from lightning_localsgd.replica import Replica


class Round(NamedTuple):
    """What the workers know of the round that ends.

    Args:
        number: of the round.
        weights: for each rank whether its replica counts.
        left_out: whether this worker's does not, because it is not finite.
        rates: the learning rates that an outer step wants.
        factor: by which this worker's movement is scaled.
        steps: that were taken in it, by the fastest.
        waited: seconds that this worker waited for the others.
    """

    number: int
    weights: tuple[int, ...]
    left_out: bool
    rates: Mapping[str, float]
    factor: float
    steps: int
    waited: float


class Averages:
    """Averages the models of all workers at the ends of rounds.

    Args:
        mean: how.
        landing: what becomes of the mean.
        replica: this worker's model.
        rank: this process's.
        size: the number of workers.
        group: the process group on which averages travel in the background, or None for the one that all else takes.
        seed: of the noise in roundings.
        device: where the model is.
    """

    def __init__(
        self,
        mean: Mean,
        landing: Landing,
        replica: Replica,
        *,
        rank: int,
        size: int,
        group: Any,
        seed: int,
        device: torch.device,
    ) -> None:
        self._mean = mean
        self._landing = landing
        self._replica = replica
        self._rank = rank
        self._exchange = Exchange(mean, rank, size, seed) if mean.needs_anchor and size > 1 else None
        self._group = group
        self._device = device
        self.flight: Flight | None = None  # the average that has not landed
        self._landed: Flight | None = None  # the last one, for its memory

    def now(self, of: Round, modest: bool) -> tuple[float, float]:
        """Average, and start from there; return how far the replicas had moved apart and together, squared."""
        trained = self._replica.trained()
        then = self._landing.round(of.rates) if self._landing.is_needed else None
        self._average([piece for _, _, pieces in trained for piece in pieces], of, modest, then)
        self._average_rest(self._replica.rest(), of, modest)
        return self._landing.finish([parameter for _, parameter, _ in trained])

    def _average(
        self,
        views: Sequence[Tensor],
        of: Round,
        modest: bool,
        then: Callable[[Bucket], None] | None = None,
        group: Any = None,
    ) -> None:
        first = self._landing.scaled(of.factor)
        if self._exchange is not None:
            self._exchange.average(views, self._landing.anchor, of.weights, of.number, first, then, group)
        else:
            self._mean.average(views, of.weights, self._rank, modest=modest, first=first, then=then, group=group)

    def _average_rest(self, views: Sequence[Tensor], of: Round, modest: bool, group: Any = None) -> None:
        if views and len(of.weights) > 1:
            self._mean.average(views, of.weights, self._rank, modest=modest, group=group)

    # ------------------------------------------------------------------------------------------------ in the background

    def launch(self, of: Round, modest: bool) -> None:
        """Begin to average the replicas as they are now."""
        assert self.flight is None
        trained, rest = self._replica.trained(), self._replica.rest()
        flight = Flight(trained, rest, len(self._replica.buffers()), self._mean.delay, of, self._landed)
        self._landed = None

        def average(views: Sequence[Tensor], rest: Sequence[Tensor]) -> None:
            self._average(views, of, modest, group=self._group)
            self._average_rest(rest, of, modest, self._group)

        flight.start(average, self._device)
        self.flight = flight

    def land(self, at_start: Callable[[], None]) -> tuple[float, float]:
        """Wait for what is under way and go on from there; return as :meth:`now` does.

        Args:
            at_start: called while the module holds the next start.
        """
        assert self.flight is not None
        flight = self.flight
        flight.arrive()
        self.flight = None
        apart = together = torch.nan
        if self._landing.is_needed:
            self._landing.round(flight.of.rates)
            apart, together = self._landing.land(flight.mean, flight.own, self._capacity)
        trained = [piece for _, _, pieces in self._replica.trained() for piece in pieces]
        with flight.landing(trained, self._replica.rest(), keep=not flight.of.left_out):
            at_start()
        self._landed = flight
        return apart, together

    def _capacity(self, kind: Group) -> int:
        anchor = self._landing.anchor
        if self._exchange is not None:
            return self._exchange.capacity(anchor, kind)
        return self._mean.capacity(len(anchor.values[kind]), kind[0].itemsize)

    def distance(self) -> float:
        """Return how far this worker has moved in this round."""
        views = [piece for _, _, pieces in self._replica.trained() for piece in pieces]
        return self._landing.distance(views) if self.flight is None else self.flight.own.distance(views)

    def forget(self) -> None:
        """Begin anew, when what is under way has arrived; all workers together."""
        if self.flight is not None:
            self.flight.arrive()
        self.flight = self._landed = None
        if self._exchange is not None:
            self._exchange.forget()

    def state_dict(self) -> dict[str, Any]:
        """Return what this worker needs for an exact resume, when what is under way has arrived."""
        memories = {"memories": self._exchange.state_dict()} if self._exchange is not None else {}
        return memories | ({"flight": self.flight.state_dict()} if self.flight is not None else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the error memories, and with an average that has not landed."""
        if self._exchange is not None and "memories" in state:
            self._exchange.load_state_dict(state["memories"], self._landing.anchor)
        if "flight" in state:
            trained, rest = self._replica.trained(), self._replica.rest()
            of = Round(**state["flight"]["of"])
            self.flight = Flight(trained, rest, len(self._replica.buffers()), state["flight"]["steps"], of)
            self.flight.load_state_dict(state["flight"])
