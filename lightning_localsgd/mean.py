"""HOW workers agree: their tensors are packed into buckets, summed across workers, and unpacked as the mean."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from itertools import chain, repeat
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_localsgd.header import explained
from lightning_localsgd.links import Links
from lightning_localsgd.wire import FORMATS, WireName

Group = tuple[torch.dtype, torch.device]
CHUNK = 1 << 16  # elements worked on at a time: small enough for the cache and to cost no memory
_LEAST = 4 << 20  # bytes of a bucket below which more of them would cost more than they hide


@dataclass(frozen=True)
class Mean:
    r"""The mean of all replicas, with equal weights.

    .. math:: \bar{x} = \frac{1}{|W|} \sum_{i \in W} x_i

    where :math:`W` are the workers that have taken a step since the last average. Floating point tensors narrower
    than 32 bits are averaged in float32; integer tensors take the maximum. An element that is equal on all workers
    keeps its bits (see ``share`` in this file).

    With a ``wire`` of fewer bits the *difference to the anchor* a, from which the round started, travels, in two hops:
    each worker owns a share of the elements, gets all workers' messages for it, and sends their mean back to all.

    .. math:: q_i = C(x_i - a + e_i), \quad e_i \leftarrow x_i - a + e_i - q_i; \qquad
        Q = C(\tfrac{1}{|W|} \textstyle\sum_i q_i + E), \quad E \leftarrow \tfrac{1}{|W|} \sum_i q_i + E - Q; \qquad
        \bar x = a + Q

    where C rounds to what the wire can carry; the error memories e of each worker and E of each owner are kept for
    integers alone. All workers decode the same bits. What is no trained parameter travels in full precision, and so do
    the means that validation and checkpoints see.

    With a ``delay`` of k an average is taken in the background while training goes on, and lands k steps after the end
    of its round, where a worker keeps what it has learnt meanwhile: with s its replica at the end of the round,

    .. math:: x_i \leftarrow a' + (x_i - s_i), \qquad a' = \bar s \text{, or the outer step from } a

    Floating buffers take their mean. It lands earlier if the next round ends before. The last average of ``fit``, that
    of ``synchronize()``, and that of a round in which parameters were frozen or unfrozen are taken at once.

    Args:
        bucket_mb: the most memory that all buckets of an average use at any moment, in MiB (2^20 bytes); above 0.
        wire: what travels: ``"float32"`` (or 64 bits, where a parameter has them), ``"bfloat16"``, ``"float16"``,
            ``"int8"`` or ``"int4"``.
        delay: steps, at least 0, from the end of a round to where its average lands; with a period that is a number, at
            most that.
        rounding: of integers: ``"nearest"``, or ``"stochastic"``, which is right on average and has its noise from
            round, rank and bucket alone.
        error_feedback: whether what rounding to integers leaves out is kept and sent with the next message.
        nonfinite: what is done with a worker whose replica has a NaN or an infinite element when a mean is due, be it
            for the end of a round, validation or a checkpoint. ``"raise"``: all workers stop with one error that
            names it. ``"exclude"``: its weight is 0, and at the end of the round it restarts from the mean of the
            others with an empty optimizer state; a warning counts it. If no worker is left, all stop. Every parameter
            that requires grad counts; a buffer or a frozen parameter counts once it has been finite at the start of
            the fit or at an average, so that a mask of -inf is no fault.
        frozen: ``"send"``: all parameters are averaged. ``"skip"``: a parameter with ``requires_grad=False`` from one
            average to the next is not sent. All workers have it from the first model that rank 0 sends; a digest in
            the header tells if it has changed on one of them, and then all stop with an error that names it.

    Raises:
        ValueError: if ``bucket_mb`` is not a number above 0, ``delay`` no int of at least 0, another argument is none
            of its words, or ``rounding`` or ``error_feedback`` is set where no integers travel.

    Example:
        >>> Mean(25) == Mean(bucket_mb=25, wire="float32", delay=0)
        True
        >>> fast = Mean(wire="int8", delay=4)

    Papers: Shen et al., *Faster Distributed Deep Net Training: Computation and Communication Decoupled Stochastic
    Gradient Descent*, IJCAI 2019 (arXiv 1906.12043), for the delay; Seide et al., *1-Bit Stochastic Gradient Descent*,
    Interspeech 2014, and Karimireddy et al., *Error Feedback Fixes SignSGD*, ICML 2019 (arXiv 1901.09847), for the
    error memory.
    """

    bucket_mb: float = 64
    _: KW_ONLY
    wire: WireName = "float32"
    delay: int = 0
    rounding: Literal["nearest", "stochastic"] = "nearest"
    error_feedback: bool = True
    nonfinite: Literal["raise", "exclude"] = "raise"
    frozen: Literal["send", "skip"] = "send"

    def __post_init__(self) -> None:
        number = isinstance(self.bucket_mb, int | float) and not isinstance(self.bucket_mb, bool)
        if not (number and 0 < self.bucket_mb < math.inf):
            raise ValueError(f"`bucket_mb` must be a number of MiB above 0, got {self.bucket_mb!r}.")
        if self.wire not in get_args(WireName):
            raise ValueError(f"`wire` must be one of {', '.join(get_args(WireName))}, got {self.wire!r}.")
        if not isinstance(self.delay, int) or isinstance(self.delay, bool) or self.delay < 0:
            raise ValueError(f"`delay` must be an int of at least 0, got {self.delay!r}.")
        if self.rounding not in ("nearest", "stochastic"):
            raise ValueError(f"`rounding` must be 'nearest' or 'stochastic', got {self.rounding!r}.")
        if not isinstance(self.error_feedback, bool):
            raise ValueError(f"`error_feedback` must be True or False, got {self.error_feedback!r}.")
        for name, default in (("rounding", "nearest"), ("error_feedback", True)):
            if getattr(self, name) != default and not self.rounds_to_integers:
                raise ValueError(
                    f"`{name}` has an effect only on a wire of integers: leave it at {default!r} with "
                    f"`wire={self.wire!r}`, got {getattr(self, name)!r}."
                )
        if self.nonfinite not in ("raise", "exclude"):
            raise ValueError(f"`nonfinite` must be 'raise' or 'exclude', got {self.nonfinite!r}.")
        if self.frozen not in ("send", "skip"):
            raise ValueError(f"`frozen` must be 'send' or 'skip', got {self.frozen!r}.")

    @property
    def rounds_to_integers(self) -> bool:
        """Whether integers travel."""
        return self.wire in FORMATS and FORMATS[self.wire].remembers

    @property
    def needs_anchor(self) -> bool:
        """Whether differences travel."""
        return self.wire != "float32"

    def average(
        self,
        tensors: Sequence[Tensor],
        weights: Sequence[int],
        links: Links,
        write: bool = True,
        modest: bool = False,
        first: Callable[["Bucket"], None] | None = None,
        then: Callable[["Bucket"], None] | None = None,
    ) -> None:
        """Replace ``tensors`` by their mean over workers, in place and in full precision.

        Finite tensors are not examined again as a mean: N shares, each about x / N, add up to the largest x and N of
        its units at most, which overflows only within that of the largest float; the next average would see it.

        Args:
            tensors: one-dimensional views, of the same sizes and dtypes on every rank.
            weights: for each rank 1 if it counts or 0 if not, equal on all ranks and in each worker; at least one is 1.
            links: between the workers.
            write: whether the mean is written back; without, this rank only contributes.
            modest: whether the square of every element here is known to be finite.
            first: called with each bucket of this worker's own values before they are sent, and may change what is.
            then: called with each bucket of means before they are written back, and may change them.
        """
        counts = links.of_workers(weights)
        count, index, is_counted = sum(counts), sum(counts[: links.worker]), counts[links.worker]

        def encode(bucket: Bucket) -> None:
            if first is not None:
                first(bucket)
            if not bucket.values.is_floating_point():
                return
            if not is_counted:
                bucket.values.fill_(-0.0)  # 0 times its values would be NaN for a NaN; -0 leaves every sum as it is
            elif count > 1:
                share(bucket.values, count, index, modest)

        def send(bucket: Bucket) -> Callable[[], object] | None:
            operation = dist.ReduceOp.SUM if bucket.values.is_floating_point() else dist.ReduceOp.MAX
            return links.reduce(bucket.values, operation)

        who = f"Rank {links.rank}, which averages its model,"
        with torch.profiler.record_function("localsgd::average"), explained(who):
            self._each_bucket(tensors, encode, send, write, then)

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Replace ``tensors`` by those of rank 0, in place."""
        with torch.profiler.record_function("localsgd::broadcast"):
            self._each_bucket(
                tensors, None, lambda bucket: dist.broadcast(bucket.values, src=0, async_op=True).wait, write=True
            )

    @torch.no_grad()
    def _each_bucket(
        self,
        tensors: Sequence[Tensor],
        encode: Callable[["Bucket"], None] | None,
        send: Callable[["Bucket"], Callable[[], object] | None],
        write: bool,
        then: Callable[["Bucket"], None] | None = None,
    ) -> None:
        """While one bucket is on its way, the last one is unpacked and the next one packed."""
        waits: dict[int, Callable[[], object] | None] = {}

        def pack_(bucket: Bucket) -> None:
            with torch.profiler.record_function("localsgd::encode"):
                if all(piece.dtype == bucket.values.dtype for piece in bucket.there):
                    torch.cat(bucket.there, out=bucket.values)  # the same, sooner
                else:
                    torch._foreach_copy_(bucket.here, bucket.there)
                if encode is not None:
                    encode(bucket)

        def arrive(bucket: Bucket) -> None:
            with torch.profiler.record_function("localsgd::wait"):
                wait = waits.pop(bucket.start)
                if wait is not None:
                    wait()

        def leave(bucket: Bucket) -> None:
            with torch.profiler.record_function("localsgd::send"):
                waits[bucket.start] = send(bucket)

        def land(bucket: Bucket) -> None:
            with torch.profiler.record_function("localsgd::apply"):
                if then is not None:
                    then(bucket)
                if write:
                    torch._foreach_copy_(bucket.there, bucket.here)

        for (dtype, device), places in grouped(tensors).items():
            total = sum(tensors[place].numel() for place in places)
            capacity = self.capacity(total, dtype.itemsize)
            memory = torch.empty(min(2 * capacity, total), dtype=dtype, device=device)
            buckets = each_bucket(tensors, places, (dtype, device), capacity, [memory[:capacity], memory[capacity:]])
            pipelined(buckets, [(0, pack_), (1, arrive), (0, leave), (1, land)])

    def capacity(self, total: int, itemsize: int) -> int:
        """Return the elements of a bucket, of which two are in flight: a quarter of all, unless that is too few."""
        most = int(self.bucket_mb * 2**20) // (2 * itemsize)
        capacity = max(1, min(most, max(-(-total // 4), _LEAST // itemsize)))
        return max(1, -(-total // -(-total // capacity))) if total else capacity  # all alike: no small one is left over


class Bucket(NamedTuple):
    """Values that are about to be sent, or their means that are about to be written back.

    Args:
        group: the dtype in which they are, and their device.
        start: where the bucket begins in the line of all elements of this group.
        values: they, one-dimensional.
        places: of the tensors that the pieces belong to, in what was averaged.
        here: the pieces of ``values``.
        there: the same pieces of the replica, which still hold this worker's own values.
    """

    group: "Group"
    start: int
    values: Tensor
    places: list[int]
    here: list[Tensor]
    there: list[Tensor]


def each_bucket(
    tensors: Sequence[Tensor], places: Sequence[int], group: Group, capacity: int, memories: Sequence[Tensor]
) -> Iterator[Bucket]:
    """Yield buckets that cover the tensors at these places, in turns in each of ``memories``, without filling them."""
    start = 0
    for index, filling in enumerate(_fillings(tuple(tensors[place].numel() for place in places), capacity)):
        values = memories[index % len(memories)][: sum(filling.sizes)]
        here = list(torch.split(values, filling.sizes))
        there_places = [places[tensor] for tensor in filling.tensors]
        there = [tensors[place] for place in there_places]
        for piece, at in filling.parts:
            there[piece] = there[piece][at : at + filling.sizes[piece]]
        yield Bucket(group, start, values, there_places, here, there)
        start += len(values)


def pipelined(buckets: Iterable[Bucket], stages: Sequence[tuple[int, Callable[[Bucket], None]]]) -> None:
    """Take each bucket through all stages; a stage with lag n works n buckets behind the first.

    So all ranks issue collectives in one order, whichever arrives first.

    Example:
        >>> pipelined("abc", [(0, lambda x: print("send", x)), (1, lambda x: print("receive", x))])
        send a
        send b
        receive a
        send c
        receive b
        receive c
    """
    behind = max(lag for lag, _ in stages)
    window: deque[Bucket | None] = deque(repeat(None, behind + 1), maxlen=behind + 1)
    for newest in chain(buckets, repeat(None, behind)):
        window.appendleft(newest)
        for lag, stage in stages:
            bucket = window[lag]
            if bucket is not None:
                stage(bucket)


class Cut(NamedTuple):
    """A run of elements of one tensor."""

    tensor: int
    start: int
    size: int


class _Filling(NamedTuple):
    """What a bucket has in it: of which tensors how much; and where those parts begin that are not the whole."""

    tensors: list[int]
    sizes: list[int]
    parts: list[tuple[int, int]]


@lru_cache(8)
def _fillings(sizes: tuple[int, ...], capacity: int) -> list[_Filling]:
    """Return what :func:`pack` says; it is the same in each round."""
    return [
        _Filling(
            [cut.tensor for cut in cuts],
            [cut.size for cut in cuts],
            [(piece, cut.start) for piece, cut in enumerate(cuts) if cut.size != sizes[cut.tensor]],
        )
        for cuts in pack(sizes, capacity)
    ]


def pack(sizes: Sequence[int], capacity: int) -> Iterator[list[Cut]]:
    """Lay tensors of these sizes end to end and cut the line into buckets of ``capacity`` elements.

    Args:
        sizes: elements of each tensor, at least 0.
        capacity: elements of a bucket, at least 1; the last bucket may have fewer.

    Example:
        >>> list(pack([3, 4], capacity=5))
        [[Cut(tensor=0, start=0, size=3), Cut(tensor=1, start=0, size=2)], [Cut(tensor=1, start=2, size=2)]]
    """
    bucket: list[Cut] = []
    free = capacity
    for tensor, size in enumerate(sizes):
        start = 0
        while start < size:
            cut = Cut(tensor, start, min(size - start, free))
            bucket.append(cut)
            start += cut.size
            free -= cut.size
            if free == 0:
                yield bucket
                bucket, free = [], capacity
    if bucket:
        yield bucket


def share(x: Tensor, count: int, index: int, modest: bool = False) -> None:
    r"""Replace ``x`` by this worker's share of it, about x / count, in place.

    The shares of ``count`` equal numbers sum to that number exactly, in any order of summation, so what is equal on
    all workers leaves an average bit for bit; (a + ... + a) / N does not for N = 3, 5, 6, 7, .... Share i is

    .. math:: T_{i+1}(x) - T_i(x), \qquad T_i(x) = \mathrm{round}_u(x \, i / N), \quad T_0 = 0, \; T_N(x) = x

    rounded to multiples of u, the spacing of floating point numbers at x. Every share and every partial sum of shares
    is a multiple of u between 0 and x: such numbers are representable, so no addition rounds. For numbers that differ
    the mean is off by about 0.4 sqrt(N) u. With two workers the shares are the halves.

    Args:
        x: one-dimensional float32 or float64.
        count: number of shares N, at least 1.
        index: which share this is, 0 to N - 1.
        modest: whether the square of every element is known to be finite, which saves a look at them.
    """
    huge = torch.finfo(x.dtype).max / 4  # from here on sums in `_share` could overflow
    for part in torch.split(x, CHUNK):
        if modest or all(-huge < end < huge for end in part.aminmax()):
            part.copy_(_share(part, count, index))
        else:
            shares = torch.where(part.abs() < huge, _share(part, count, index), _share(part / 8, count, index) * 8)
            part.copy_(torch.where(part.isfinite(), shares, part))


def _share(x: Tensor, count: int, index: int) -> Tensor:
    if count == 2:
        half = x * 0.5
        return (
            half if index == 0 else torch.sub(x, half).copysign_(x)
        )  # another half, but for the odd subnormal numbers
    # Adding and subtracting c = 2^e, where 2^e <= |x| < 2^(e+1), rounds to a multiple of u; c has x's sign.
    integer, mantissa = (torch.int32, 23) if x.dtype == torch.float32 else (torch.int64, 52)
    c = x.view(integer).bitwise_and(-1 << mantissa).view(x.dtype)
    low = (x * (index / count)).add_(c)  # T_i + c; no fused multiply-add, which not every processor has
    if index == count - 1:
        return torch.sub(x, low.sub_(c)).copysign_(x)
    return (x * ((index + 1) / count)).add_(c).sub_(low).copysign_(x)


def grouped(tensors: Sequence[Tensor]) -> dict[Group, list[int]]:
    """Return the places of the tensors, by the dtype in which they are reduced and by device."""
    groups: dict[Group, list[int]] = {}
    kind, places = None, []
    for place, tensor in enumerate(tensors):
        if kind != (tensor.dtype, tensor.device):  # mostly as the last one's
            kind = tensor.dtype, tensor.device
            if not tensor.is_floating_point():
                dtype = torch.int64
            elif tensor.dtype == torch.float64:
                dtype = torch.float64
            else:
                dtype = torch.float32
            places = groups.setdefault((dtype, tensor.device), [])
        places.append(place)
    return groups


def bytes_of_element(tensor: Tensor) -> int:
    """Return how many bytes an element has in the dtype in which it is reduced; a complex one is two numbers."""
    if tensor.is_complex():
        return 2 * bytes_of_element(torch.view_as_real(tensor))
    return torch.float32.itemsize if tensor.is_floating_point() and tensor.dtype != torch.float64 else 8
