"""HOW fewer bits agree: differences to the anchor in two hops, to the owner of a share and as a mean back to all."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_localsgd.anchor import Anchor, Line
from lightning_localsgd.header import explained
from lightning_localsgd.links import Links
from lightning_localsgd.mean import Bucket, Group, Mean, each_bucket, grouped, pipelined
from lightning_localsgd.wire import FORMATS, noise

# A single all-to-all of Gloo fills one direction of a link at a time, so several buckets are on their way at once:
# this many between the hops, and as many behind the second.
_LAG = 3
_LEAST = 1 << 15  # elements of a bucket below which more of them would cost more than they hide
_BUCKETS = 16  # at least, if they are not smaller than that
_WHO = "Rank {}, which averages its model,"
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13


class Exchange:
    """Averages trained parameters on a wire of fewer bits, and remembers what rounding has left out.

    Args:
        mean: the wire, and how much memory it may take.
        links: between the workers, at least 2.
        seed: of the noise, equal on all workers.
    """

    def __init__(self, mean: Mean, links: Links, seed: int = 0) -> None:
        self.links = links
        self.format = FORMATS[mean.wire]
        self._mean = mean
        self._seed = seed
        # What this worker's messages, and the means that it sends back, have left out so far, along the anchor's lines.
        self._memory: dict[Group, tuple[Tensor, Tensor]] = {}
        self._lines: dict[Group, list[Line]] = {}  # of the parameters that they are for

    @torch.no_grad()
    def average(
        self,
        tensors: Sequence[Tensor],
        anchor: Anchor,
        weights: Sequence[int],
        number: int,
        first: Callable[[Bucket], None] | None = None,
        then: Callable[[Bucket], None] | None = None,
        links: Links | None = None,
    ) -> None:
        """Replace ``tensors`` by their mean over workers, in place.

        Args:
            tensors: one-dimensional views of the trained parameters, in the anchor's order.
            anchor: from which they started, equal on all workers; ``then`` may move the piece that it is called with.
            weights: for each rank 1 if it counts or 0 if not, equal on all ranks and in each worker; at least one is 1.
            number: of the round, for the noise.
            first: called with each bucket of this worker's own values before it is sent, and may change what is.
            then: called with each bucket of means before they are written back, and may change them.
            links: to take instead of those between the same workers that are known.

        Raises:
            RuntimeError: on all ranks, if the mean is not finite.
        """
        for kind, places in grouped(tensors).items():
            trip = _Trip(self, kind, anchor, weights, number, links or self.links)
            buckets = each_bucket(tensors, places, kind, self.capacity(anchor, kind), [trip.values])

            def encode(bucket: Bucket, trip: _Trip = trip) -> None:
                torch._foreach_copy_(bucket.here, bucket.there)
                if first is not None:
                    first(bucket)
                trip.encode(bucket)

            def land(bucket: Bucket, trip: _Trip = trip) -> None:
                trip.decode(bucket)
                with torch.profiler.record_function("localsgd::apply"):
                    if then is not None:
                        then(bucket)
                    torch._foreach_copy_(bucket.there, bucket.here)

            with torch.profiler.record_function("localsgd::average"), explained(_WHO.format(self.links.rank)):
                pipelined(buckets, [(0, encode), (_LAG, trip.turn), (2 * _LAG, land)])

    def capacity(self, anchor: Anchor, kind: Group) -> int:
        """Return the elements of a bucket: what memory allows, and so few that the links are busy both ways."""
        # Codes wait here for both hops and in Gloo, 18 of a bucket at a time; encoding holds a few copies in float.
        bytes_per_element = 18 * self.format.block_bytes / self.format.block + 5 * kind[0].itemsize
        most = self._mean.bucket_mb * 2**20 / bytes_per_element
        return max(1, int(min(most, max(len(anchor.values[kind]) / _BUCKETS, _LEAST))))

    def share(self, elements: int) -> int:
        """Return how many elements of a bucket each rank owns, in whole blocks."""
        block = self.format.block
        return -(-elements // (self.links.workers * self.links.devices * block)) * block

    def memory(self, anchor: Anchor, kind: Group) -> tuple[Tensor, Tensor] | None:
        """Return what the messages of this worker, and its means, have left out so far, if that is remembered."""
        if not (self.format.remembers and self._mean.error_feedback):
            return None
        whole, rest = divmod(len(anchor.values[kind]), capacity := self.capacity(anchor, kind))
        lines, old = [line for line in anchor.lines if line.group == kind], self._lines.get(kind)
        if lines != old:  # what is trained has changed, and with it who owns what
            dtype, device = kind
            own = torch.zeros(len(anchor.values[kind]), dtype=dtype, device=device)
            owned = torch.zeros(whole * self.share(capacity) + self.share(rest), dtype=dtype, device=device)
            # A device of a node remembers what it has sent itself, which is from now on another piece of the model.
            stay = {line.name: line for line in (old or []) if self.links.devices == 1}
            for line in lines:
                if line.name in stay and stay[line.name].size == line.size:
                    was = self._memory[kind][0][stay[line.name].start :][: line.size]
                    own[line.start : line.start + line.size].copy_(was)
            self._memory[kind], self._lines[kind] = (own, owned), lines
            if old is not None:
                whose = "of their owners " if self.links.devices == 1 else ""
                rank_zero_info(f"Other parameters are trained: the error memories {whose}start at 0.")
        return self._memory[kind]

    def noise(self, kind: Group, number: int, hop: int, start: int) -> torch.Generator | None:
        """Return the noise for one rounding of a bucket, if it is not to the nearest."""
        if self._mean.rounding == "nearest":
            return None
        return noise(kind[1], self._seed, number, self.links.rank, hop, start, kind[0].itemsize)

    def forget(self) -> None:
        """Begin with error memories of 0."""
        self._memory, self._lines = {}, {}

    def state_dict(self) -> dict[str, list[Tensor]]:
        """Return the error memories, by dtype."""
        return {str(dtype): list(memories) for (dtype, _), memories in self._memory.items()}

    def load_state_dict(self, state: dict[str, list[Tensor]], anchor: Anchor) -> None:
        """Take up the error memories of parameters like the anchor's."""
        for kind in anchor.values:
            if str(kind[0]) in state:
                own, owned = (memory.to(kind[1], copy=True) for memory in state[str(kind[0])])
                self._memory[kind] = own, owned
                self._lines[kind] = [line for line in anchor.lines if line.group == kind]


class _Trip:
    """One average of the parameters of one kind: what becomes of each bucket, in the order of the stages."""

    def __init__(
        self, exchange: Exchange, kind: Group, anchor: Anchor, weights: Sequence[int], number: int, links: Links
    ) -> None:
        self._exchange = exchange
        self._kind = kind
        self._anchor = anchor.values[kind]
        self._weights = links.in_group(weights)
        self._counts = weights[links.rank]
        self._number = number
        self._links = links
        self._capacity = exchange.capacity(anchor, kind)
        self._memory = exchange.memory(anchor, kind)
        dtype, device = kind
        ranks = links.workers * links.devices
        self.values = torch.empty(ranks * exchange.share(self._capacity), dtype=dtype, device=device)
        self._coming: dict[int, tuple[Tensor, Any, Tensor]] = {}  # by bucket: what arrives, its work, what was sent

    def _rows(self, bucket: Bucket) -> Tensor:
        """Return what this rank sends, with the padding of their last shares, a row for each owner."""
        links, share = self._links, self._exchange.share(len(bucket.values))
        rows = links.devices * links.workers
        return self.values[: rows * share].view(links.devices, links.workers, share)[links.device]

    def _own(self, bucket: Bucket) -> slice:
        """Return where in the bucket the elements are that this rank sends: all, or its share of its node's."""
        size, count = len(bucket.values), self._links.workers * self._exchange.share(len(bucket.values))
        begin = min(size, self._links.device * count)
        return slice(begin, min(size, begin + count))

    def _start(self, bucket: Bucket, own: slice) -> Tensor:
        """Return the piece of the anchor."""
        return self._anchor[bucket.start + own.start : bucket.start + own.stop].to(bucket.values.device)

    def _send(self, bucket: Bucket, code: Tensor, collective: Callable[..., Any]) -> None:
        with torch.profiler.record_function("localsgd::send"):
            arriving = torch.empty(self._links.workers, code.shape[1], dtype=torch.uint8, device=code.device)
            work = collective(arriving, code, group=self._links.group, async_op=True)
        self._coming[bucket.start] = arriving, work, code

    def _arrived(self, bucket: Bucket) -> Tensor:
        with torch.profiler.record_function("localsgd::wait"):
            arrived, work, _ = self._coming.pop(bucket.start)
            work.wait()
        return arrived

    def encode(self, bucket: Bucket) -> None:
        """Send to each owner its share of the bucket, which holds this worker's own values."""
        exchange, rows, own = self._exchange, self._rows(bucket), self._own(bucket)
        size = exchange.format.size(rows.shape[1])
        code = torch.zeros(self._links.workers, size, dtype=torch.uint8, device=rows.device)
        if self._counts:  # else nobody reads it, and its values may be NaN
            with torch.profiler.record_function("localsgd::encode"):
                values = bucket.values[own].sub_(self._start(bucket, own))
                rows.view(-1)[len(values) :] = 0
                error = self._memory[0][bucket.start :][own] if self._memory else None
                if error is not None:
                    values.add_(error)
                exchange.format.encode(rows, code, exchange.noise(self._kind, self._number, 1, bucket.start))
                if error is not None:
                    error.copy_(values)
        self._send(bucket, code, dist.all_to_all_single)

    def turn(self, bucket: Bucket) -> None:
        """As the owner of a share, send back to all the mean of what has arrived."""
        exchange, arrived = self._exchange, self._arrived(bucket)
        share = exchange.share(len(bucket.values))
        mean, message = torch.zeros(2, 1, share, dtype=self._kind[0], device=arrived.device)
        with torch.profiler.record_function("localsgd::decode"):
            for rank, weight in enumerate(self._weights):
                if weight:
                    exchange.format.decode(arrived[rank : rank + 1], message)
                    mean.add_(message)
            mean.div_(sum(self._weights))
        with torch.profiler.record_function("localsgd::encode"):
            begin = bucket.start // self._capacity * exchange.share(self._capacity)
            error = self._memory[1][begin : begin + share].view(1, share) if self._memory else None
            if error is not None:
                mean.add_(error)
            code = torch.empty(1, exchange.format.size(share), dtype=torch.uint8, device=arrived.device)
            exchange.format.encode(mean, code, exchange.noise(self._kind, self._number, 2, bucket.start))
            if error is not None:
                error.copy_(mean)
        self._send(bucket, code, _all_gather)

    def decode(self, bucket: Bucket) -> None:
        """Fill the bucket with the mean."""
        arrived = self._arrived(bucket)
        with torch.profiler.record_function("localsgd::decode"):
            rows, own = self._rows(bucket), self._own(bucket)
            self._exchange.format.decode(arrived, rows)
            bucket.values[own].add_(self._start(bucket, own))
            self._links.complete(bucket.values, rows.numel())
            if not math.isfinite(torch.linalg.vector_norm(bucket.values, math.inf)):
                raise RuntimeError(f"The mean of the replicas in round {self._number} has a NaN or an infinite value.")
