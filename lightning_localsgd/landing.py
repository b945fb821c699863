"""WHERE the next round starts: what becomes of the mean of the trained parameters, and how far they had moved."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_localsgd.anchor import Anchor, Trained
from lightning_localsgd.mean import Bucket, Group
from lightning_localsgd.outer import OuterStep, Stepper


class Landing:
    """What becomes of the mean of the trained parameters at the end of a round, and how far they had moved.

    Args:
        outer: makes the next start, or None for the mean itself.
        measures: whether to measure the drift.
        starts: whether the start of the round has to be known for another reason.
    """

    def __init__(self, outer: OuterStep | None, measures: bool, starts: bool = False) -> None:
        self._outer = outer
        self._measures = measures
        self._starts = starts
        self._anchor: Anchor | None = None
        self._stepper: Stepper | None = None
        self._rates: Mapping[str, float] = {}
        self._state: dict[str, Any] | None = None  # of a checkpoint, until there is an anchor
        self._squares = {"apart": 0.0, "together": 0.0}

    @property
    def steps(self) -> bool:
        """Whether there is an outer step."""
        return self._outer is not None

    @property
    def is_needed(self) -> bool:
        """Whether there is anything to do beside taking the mean."""
        return self._outer is not None or self._measures or self._starts

    @property
    def needs_rates(self) -> bool:
        """Whether :meth:`round` wants learning rates."""
        return self._stepper is not None and self._stepper.needs_rates

    def begin(self, parameters: Sequence[Trained]) -> None:
        """A round begins with these parameters, which hold the anchor; where they are the same it is known already."""
        names = [name for name, _, _ in parameters]
        if self._anchor is not None and [line.name for line in self._anchor.lines] == names:
            return
        remembered = self._stepper.state_dict() if self._stepper is not None else {}
        self._anchor = Anchor(parameters, in_main_memory=self._outer is not None and self._outer.offload)
        if self._outer is not None:
            self._stepper = self._outer.stepper(self._anchor)
            self._stepper.load_state_dict(remembered)
        self._take_up()

    def forget(self) -> None:
        """Begin anew."""
        self._anchor = self._stepper = self._state = None

    def round(self, rates: Mapping[str, float]) -> Callable[[Bucket], None]:
        """Return what is done with each bucket of this round's mean."""
        self._rates = rates
        self._squares = {"apart": 0.0, "together": 0.0}
        return self._land

    def scaled(self, factor: float) -> Callable[[Bucket], None] | None:
        """Return what makes each bucket of this worker's values a + factor (x - a), with the anchor a."""
        if factor == 1:
            return None

        def scale(bucket: Bucket) -> None:
            assert self._anchor is not None
            anchor = self._anchor.values[bucket.group][bucket.start : bucket.start + len(bucket.values)]
            anchor = anchor.to(bucket.values.device)
            bucket.values.sub_(anchor).mul_(factor).add_(anchor)

        return scale

    @torch.no_grad()
    def _land(self, bucket: Bucket) -> None:
        assert self._anchor is not None
        stop = bucket.start + len(bucket.values)
        anchor = self._anchor.values[bucket.group][bucket.start : stop]
        if self._measures:
            apart = [_squared_distance(mean, own) for mean, own in zip(bucket.here, bucket.there, strict=True)]
            self._squares["apart"] += math.fsum(apart)
            self._squares["together"] += _squared_distance(bucket.values.to(anchor.device), anchor)
        if self._stepper is None:
            anchor.copy_(bucket.values)
        elif self._stepper.in_pieces:
            with torch.profiler.record_function("localsgd::outer"):
                self._stepper.step(bucket, anchor, self._rates)
            bucket.values.copy_(anchor)
        else:
            return
        narrow = [(mean, own) for mean, own in zip(bucket.here, bucket.there, strict=True) if mean.dtype != own.dtype]
        if narrow:  # the workers start from what their dtype can hold
            for mean, own in narrow:
                mean.copy_(mean.to(own.dtype))
            anchor.copy_(bucket.values)

    @property
    def anchor(self) -> Anchor:
        """Where the round started."""
        assert self._anchor is not None
        return self._anchor

    def land(self, mean: Anchor, own: Anchor, capacity: Callable[[Group], int]) -> tuple[float, float]:
        """Make the next start of a whole mean, which arrived after its round; the same as bucket by bucket.

        Args:
            mean: is replaced by the next start.
            own: this worker's values when the round ended.
            capacity: elements of a bucket, for each kind.
        """
        for group, values in mean.values.items():
            for start in range(0, len(values), size := capacity(group)):
                piece = values[start : start + size]
                cuts = [here for _, _, here in mean.within(group, start, start + len(piece))]
                there = own.values[group][start : start + len(piece)]
                self._land(Bucket(group, start, piece, [], [piece[cut] for cut in cuts], [there[cut] for cut in cuts]))
        squares = self.finish(mean.shaped())
        mean.round()  # the workers start from what their dtype can hold
        self.anchor.round()
        return squares

    def finish(self, parameters: Sequence[Tensor]) -> tuple[float, float]:
        """End the round; return the squared distances apart and together, NaN if they are not measured."""
        if self._stepper is not None and not self._stepper.in_pieces:
            with torch.profiler.record_function("localsgd::outer"):
                self._stepper.finish(parameters)
        if not self._measures:
            return math.nan, math.nan
        return self._squares["apart"], self._squares["together"]

    def rest(self) -> None:
        """After the last round: keep only what :meth:`state_dict` gives without the anchor."""
        if self._anchor is not None:
            self._anchor.values.clear()
        if self._stepper is not None:
            self._stepper.rest()

    def distance(self, views: Sequence[Tensor]) -> float:
        """Return how far this worker has moved from the anchor."""
        return self._anchor.distance(views) if self._anchor is not None else math.nan

    def state_dict(self, whole: bool) -> dict[str, Any]:
        """Return what is equal on all workers: what the outer step remembers and, if ``whole``, the anchor."""
        if self._anchor is None:
            return self._state or {}
        state: dict[str, Any] = {"anchor": self._anchor.state_dict()} if whole else {}
        if self._stepper is None or self._outer is None:
            return state
        return state | {"kind": self._outer.kind, "outer": self._stepper.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned; says so if it is of another kind of outer step."""
        was, now = state.get("kind"), self._outer.kind if self._outer is not None else None
        if was is not None and was != now:
            rank_zero_warn(
                f"The checkpoint has the state of another outer step, {was}, which is left behind: `outer` is now "
                f"{self._outer!r} and starts anew."
            )
            state = {key: value for key, value in state.items() if key != "outer"}
        self._state = state
        self._take_up()

    def _take_up(self) -> None:
        if self._anchor is None or self._state is None:
            return
        state, self._state = self._state, None
        if self._stepper is not None:
            self._stepper.load_state_dict(state.get("outer", {}))
        if "anchor" in state:
            self._anchor.load_state_dict(state["anchor"])


def _squared_distance(one: Tensor, other: Tensor) -> float:
    return float(torch.dist(one, other.to(one))) ** 2
