"""HOW a round ends for one worker: its model is averaged at once, or in the background while it goes on."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_localsgd.exchange import Exchange
from lightning_localsgd.flight import Flight
from lightning_localsgd.landing import Landing
from lightning_localsgd.links import Links
from lightning_localsgd.mean import Bucket, Group, Mean, bytes_of_element
from lightning_localsgd.progress import Squares
from lightning_localsgd.replica import Replica
from lightning_localsgd.spread import Probe


class Ending(NamedTuple):
    """What the workers know of the round that ends.

    Args:
        number: of the round.
        weights: for each rank whether its replica counts.
        left_out: whether this worker's does not, because it is not finite.
        rates: the learning rates that an outer step wants.
        factor: by which this worker's movement is scaled.
        steps: that were taken in it, by the fastest.
        waited: seconds that this worker waited for the others.
        probed: whether the probe looks at it.
    """

    number: int
    weights: tuple[int, ...]
    left_out: bool
    rates: Mapping[str, float]
    factor: float
    steps: int
    waited: float
    probed: bool = False


class Averages:
    """Averages the models of all workers at the ends of rounds.

    Args:
        mean: how.
        landing: what becomes of the mean.
        replica: this worker's model.
        probe: sees how far the replicas move, or None.
        links: between the workers.
        background: those on which averages travel in the background.
        seed: of the noise in roundings.
        device: where the model is.
        look: raises if another worker has left.
    """

    def __init__(
        self,
        mean: Mean,
        landing: Landing,
        replica: Replica,
        probe: Probe | None,
        *,
        links: Links,
        background: Links,
        seed: int,
        device: torch.device,
        look: Callable[[], None],
    ) -> None:
        self._mean = mean
        self._landing = landing
        self._replica = replica
        self._probe = probe
        self._links = links
        self._background = background
        self._exchange = Exchange(mean, links, seed) if mean.needs_anchor and links.workers > 1 else None
        self._device = device
        self._stream: torch.cuda.Stream | None = None  # of averages in the background, on a GPU
        self._look = look
        self.flight: Flight | None = None  # the average that has not landed
        self._landed: Flight | None = None  # the last one, for its memory

    def begin_round(self, probed: bool) -> None:
        """The next round begins, with the trained parameters as they are, and the probe will look at it or not."""
        if self._probe is not None and self._probe.moves and probed:
            pieces = zip(self._replica.keys(), self._replica.sent(), strict=True)
            self._probe.begin((key, piece) for key, piece in pieces if key)

    def now(self, of: Ending, modest: bool) -> Squares:
        """Average, and start from there; return how far the replicas had moved."""
        trained, rest = self._replica.trained(), self._replica.rest()
        then = [self._landing.round(of.rates)] if self._landing.is_needed else []
        looks = []
        if self._probe is not None and of.probed:
            looks = [self._probe.over(self._replica.trained_keys() if trained else self._replica.keys())]
        self._average([piece for _, _, pieces in trained for piece in pieces], of, modest, _all(looks + then))
        self._average_rest(rest, of, modest, then=None if trained else _all(looks))
        return self._seen(of, *self._landing.finish([parameter for _, parameter, _ in trained]))

    def _seen(self, of: Ending, apart: float, together: float) -> Squares:
        """Return how far the replicas had moved, as the landing and the probe have measured it."""
        seen = self._probe.end() if self._probe is not None and of.probed else Squares()
        return seen if math.isnan(apart) else Squares(apart, together, seen.moved)

    def payload(self) -> tuple[int, int]:
        """Return how many bytes an average of models sums up, and one of gradients and buffers, as DDP's."""
        models, gradients = self._replica.payload()
        if self._exchange is not None:
            form, views = self._exchange.format, [piece for _, _, pieces in self._replica.trained() for piece in pieces]
            models -= sum(len(view) * bytes_of_element(view) for view in views)
            models += sum(map(len, views)) * form.block_bytes // form.block
        return models, gradients

    def _average(
        self,
        views: Sequence[Tensor],
        of: Ending,
        modest: bool,
        then: Callable[[Bucket], None] | None = None,
        links: Links | None = None,
    ) -> None:
        first = self._landing.scaled(of.factor)
        if self._exchange is not None:
            self._exchange.average(views, self._landing.anchor, of.weights, of.number, first, then, links)
        else:
            self._mean.average(views, of.weights, links or self._links, modest=modest, first=first, then=then)

    def _average_rest(
        self,
        views: Sequence[Tensor],
        of: Ending,
        modest: bool,
        then: Callable[[Bucket], None] | None = None,
        links: Links | None = None,
    ) -> None:
        if views and self._links.workers > 1:
            self._mean.average(views, of.weights, links or self._links, modest=modest, then=then)

    # ------------------------------------------------------------------------------------------------ in the background

    def launch(self, of: Ending, modest: bool) -> None:
        """Begin to average the replicas as they are now."""
        assert self.flight is None
        rest, buffers = self._replica.named_rest(), self._replica.named_buffers()
        flight = Flight(self._replica.trained(), rest, buffers, self._mean.delay, of, self._landed)
        self._landed = None

        def average(views: Sequence[Tensor], rest: Sequence[Tensor]) -> None:
            self._average(views, of, modest, links=self._background)
            self._average_rest(rest, of, modest, links=self._background)

        if self._stream is None and self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        flight.start(average, self._device, self._stream)
        self.flight = flight

    def land(self, at_start: Callable[[], None]) -> Squares:
        """Wait for what is under way and go on from there; return as :meth:`now` does.

        Args:
            at_start: called while the module holds the next start.
        """
        assert self.flight is not None
        flight = self.flight
        flight.arrive(self._look)
        self.flight = None
        if self._probe is not None and flight.of.probed:
            look = self._probe.over(self._replica.trained_keys())
            for place, (line, mean, own) in enumerate(flight.pieces()):
                look(Bucket(line.group, line.start, mean, [place], [mean], [own]))
        apart = together = math.nan
        if self._landing.is_needed:
            self._landing.round(flight.of.rates)
            apart, together = self._landing.land(flight.mean, flight.own, self._capacity)
        squares = self._seen(flight.of, apart, together)
        trained = [piece for _, _, pieces in self._replica.trained() for piece in pieces]
        now = self._replica.named()
        with flight.landing(trained, [now[name] for name in flight.rest], keep=not flight.of.left_out):
            at_start()
        self._landed = flight
        return squares

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
            self.flight.arrive(self._look)
        self.rest()

    def rest(self) -> None:
        """Let go of the memory, without waiting for anything."""
        self.flight = self._landed = None
        self._replica.forget()
        if self._exchange is not None:
            self._exchange.forget()

    def state_dict(self) -> dict[str, Any]:
        """Return what this worker needs for an exact resume, when what is under way has arrived."""
        if self.flight is not None:
            self.flight.arrive(self._look)  # first: it changes the error memories
        memories = {"memories": self._exchange.state_dict()} if self._exchange is not None else {}
        return memories | ({"flight": self.flight.state_dict()} if self.flight is not None else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the error memories, and with an average that has not landed."""
        if self._exchange is not None and state.get("memories"):
            self._exchange.load_state_dict(state["memories"], self._landing.anchor)
        if "flight" in state:
            kept, now = state["flight"], self._replica.named()
            rest, buffers = {name: now[name] for name in kept["rest"]}, self._replica.named_buffers()
            self.flight = Flight(self._replica.trained(), rest, buffers, kept["steps"], Ending(**kept["of"]))
            self.flight.load_state_dict(kept)


def _all(looks: Sequence[Callable[[Bucket], None]]) -> Callable[[Bucket], None] | None:
    """Return what calls each of them in turn."""
    if not looks:
        return None

    def call(bucket: Bucket) -> None:
        for look in looks:
            look(bucket)

    return call
