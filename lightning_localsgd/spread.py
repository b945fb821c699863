"""HOW FAR the replicas had moved in a round, apart and together, for those who want to see it."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_localsgd.mean import Bucket
from lightning_localsgd.progress import Squares

Key = tuple[str, int]  # a parameter, and which piece of its memory


@dataclass(frozen=True)
class Spread:
    r"""How far the replicas had moved apart, and together, when they were averaged.

    With the anchor a, replicas :math:`x_i`, their mean :math:`\bar x`, and the workers' updates
    :math:`u_i = x_i - a` with their mean :math:`\bar u`, over the N workers that counted in the mean and the parameters
    that are trained. What is not known is NaN.

    Args:
        number: of the round.
        apart: of each worker :math:`\lVert x_i - \bar x \rVert`; NaN where it did not count.
        moved: of each worker :math:`\lVert u_i \rVert`; NaN without an anchor, and where it did not count.
        together: :math:`\lVert \bar u \rVert`, or NaN without an anchor.
    """

    number: int
    apart: tuple[float, ...]
    moved: tuple[float, ...]
    together: float

    @property
    def drift(self) -> float:
        r""":math:`\sqrt{\frac{1}{N} \sum_i \lVert x_i - \bar x \rVert^2}`."""
        apart = known(self.apart)
        return math.sqrt(math.fsum(one**2 for one in apart) / len(apart)) if apart else math.nan

    @property
    def relative(self) -> float:
        r"""The drift over :math:`\lVert \bar u \rVert`."""
        return self.drift / self.together if self.together > 0 else math.nan

    @property
    def cosine(self) -> float:
        r"""The mean cosine of two workers' updates, each pair weighted by the product of their lengths.

        .. math:: \frac{\sum_{i \ne j} u_i \cdot u_j}{\sum_{i \ne j} \lVert u_i \rVert \lVert u_j \rVert}
            = \frac{N^2 \lVert \bar u \rVert^2 - \sum_i \lVert u_i \rVert^2}
                   {(\sum_i \lVert u_i \rVert)^2 - \sum_i \lVert u_i \rVert^2}
        """
        moved = known(self.moved)
        squares = math.fsum(one**2 for one in moved)
        pairs = math.fsum(moved) ** 2 - squares
        return ((len(moved) * self.together) ** 2 - squares) / pairs if pairs > 0 else math.nan

    @property
    def variance(self) -> float:
        r"""The estimated variance of one worker's update, :math:`\frac{1}{N-1} \sum_i \lVert u_i - \bar u \rVert^2`."""
        apart = known(self.apart)
        return math.fsum(one**2 for one in apart) / (len(apart) - 1) if len(apart) > 1 else math.nan

    @property
    def signal(self) -> float:
        r"""The estimated square of the update's mean, :math:`\lVert \bar u \rVert^2 - \text{variance} / N`."""
        return self.together**2 - self.variance / len(known(self.apart)) if self.variance >= 0 else math.nan

    @property
    def noise(self) -> float:
        """:attr:`variance` over :attr:`signal`: with so many workers, half of the mean's squared length is noise.

        NaN where the signal is not above 0, as it may be by chance.
        """
        return self.variance / self.signal if self.signal > 0 else math.nan


class Probe:
    """Looks at what passes through an average, and changes nothing, not even how it is packed.

    Args:
        moves: whether to keep a copy of the trained parameters, to see how far they have moved in a round.
    """

    def __init__(self, moves: bool) -> None:
        self.moves = moves
        self._anchor: dict[Key, Tensor] = {}
        self._squares = Squares()

    @torch.no_grad()
    def begin(self, parameters: Iterable[tuple[Key, Tensor]]) -> None:
        """A round begins, with these pieces of the trained parameters, which are copied."""
        old, self._anchor = self._anchor, {}
        for key, piece in parameters:
            memory = old.get(key)
            fits = memory is not None and memory.shape == piece.shape and memory.dtype == piece.dtype
            self._anchor[key] = memory.copy_(piece) if memory is not None and fits else piece.clone()

    def over(self, keys: Sequence[Key | None]) -> Callable[[Bucket], None]:
        """Return what looks at each bucket of means before they are written back.

        Args:
            keys: of the tensors that are averaged; None for one that is not trained.
        """
        known = all(key in self._anchor for key in keys if key is not None)
        self._squares = Squares(0.0, 0.0, 0.0) if known and self._anchor else Squares(apart=0.0)
        passed = [0] * len(keys)  # elements of each

        @torch.no_grad()
        def look(bucket: Bucket) -> None:
            apart, together, moved = self._squares
            means, owns, anchors = [], [], []
            for place, mean, own in zip(bucket.places, bucket.here, bucket.there, strict=True):
                key, start = keys[place], passed[place]
                passed[place] += len(own)
                if key is not None:
                    means.append(mean)
                    owns.append(own)
                    if not math.isnan(moved):
                        anchors.append(self._anchor[key][start : passed[place]])
            apart += _squares(means, owns)
            if anchors:
                together += _squares(means, anchors)
                moved += _squares(owns, anchors)
            self._squares = Squares(apart, together, moved)

        return look

    def end(self) -> Squares:
        """Return what was seen."""
        return self._squares


def _squares(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Return the squared distance; the device is waited for once."""
    if not some:
        return 0.0
    distances = [torch.dist(one, other.to(one)) for one, other in zip(some, others, strict=True)]
    if distances[0].is_cpu:  # where there is nothing to wait for, and each further call takes its time
        return math.fsum(distance.item() ** 2 for distance in distances)
    return float(torch.stack([distance.double() for distance in distances]).square().sum())


def known(values: Iterable[float]) -> list[float]:
    """Return those that are not NaN."""
    return [value for value in values if not math.isnan(value)]
