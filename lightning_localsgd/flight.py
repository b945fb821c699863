"""WHAT is under way: an average that is taken in the background while training goes on, and lands some steps later."""

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor

from lightning_localsgd.anchor import Anchor, Trained
from lightning_localsgd.mean import CHUNK


class Flight:
    """One average from the end of its round to where it lands.

    Args:
        trained: the trained parameters at the end of the round.
        rest: one-dimensional views of all else that is averaged.
        buffers: how many of these, the last ones, are of buffers.
        steps: until it lands.
        of: what is known of the round.
        last: a flight that has landed, whose memory this one may take over: new memory costs more than filling it.
    """

    def __init__(
        self,
        trained: Sequence[Trained],
        rest: Sequence[Tensor],
        buffers: int,
        steps: int,
        of: Any,
        last: Self | None = None,
    ) -> None:
        self.own: Anchor = _copy(trained, last.own if last else None)  # this worker's values at the end of the round
        self.mean: Anchor = _copy(trained, last.mean if last else None)  # the same, and then their mean
        self.steps = steps
        self.of = of
        self.seconds = 0.0  # that it has taken this worker's own time so far
        self._rest = [view.clone() for view in rest]
        self._rest_mean = [view.clone() for view in rest]
        self._first_buffer = len(rest) - buffers
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._done: torch.cuda.Event | None = None

    def start(self, average: Callable[[Sequence[Tensor], Sequence[Tensor]], None], device: torch.device) -> None:
        """Begin to replace the values by their mean.

        Args:
            average: does it, in place, for views of the trained parameters and of the rest.
            device: where they are; on a GPU a stream of its own does the work.
        """
        on_gpu = device.type == "cuda"
        stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(device))  # until the values have been copied

        def work() -> None:
            try:
                with torch.cuda.device(device) if on_gpu else nullcontext(), torch.cuda.stream(stream):
                    average(self.mean.flat(), self._rest_mean)
                    if stream is not None:
                        self._done = stream.record_event()
            except BaseException as error:  # for the worker, when it waits
                self._error = error

        # A daemon, so that a process can end although the others never answer.
        self._thread = threading.Thread(target=work, name="localsgd-average", daemon=True)
        self._thread.start()

    def tick(self) -> bool:
        """Count a step; return whether it lands after this one."""
        self.steps -= 1
        return self.steps <= 0

    def arrive(self) -> None:
        """Wait for the mean.

        Raises:
            RuntimeError: if it has failed.
        """
        if self._thread is None:
            return
        with torch.profiler.record_function("localsgd::wait"):
            self._thread.join()
        self._thread = None
        if self._done is not None:
            torch.cuda.current_stream().wait_event(self._done)
        if self._error is not None:
            raise self._error

    @contextmanager
    def landing(self, views: Sequence[Tensor], rest: Sequence[Tensor], keep: bool) -> Generator[None, None, None]:
        r"""Within it the parameters hold the next start :math:`a'`, as ``mean`` does; after it :math:`a' + (x - s)`.

        Args:
            views: of the trained parameters, as they are now.
            rest: views of all else; of these buffers of floats just take their mean.
            keep: whether what this worker has learnt since the end of the round, :math:`x - s`, is kept.
        """
        starts, own = [*self.mean.flat(), *self._rest_mean], [*self.own.flat(), *self._rest]
        first = len(views) + self._first_buffer
        views = [*views, *rest]
        with torch.profiler.record_function("localsgd::apply"), torch.no_grad():
            for place, views_ in enumerate(zip(views, starts, own, strict=True)):
                buffer = place >= first and views_[0].is_floating_point()
                # Part by part, as large as the cache: a third of the time.
                for x, start, s in zip(*(torch.split(view, CHUNK) for view in views_), strict=True):
                    if not keep or x.dtype == torch.bool or buffer:
                        s.copy_(start)
                    else:
                        wide = s.dtype if s.is_floating_point() else torch.int64
                        x_, s_, start_ = x.to(wide), s.to(wide), start.to(wide)
                        # Who has not moved is at the start, and where the start is s nothing changes, bit for bit.
                        s.copy_(torch.where(x_ == s_, start_, x_ + (start_ - s_)))
                    x.copy_(start)
        yield
        with torch.no_grad():
            torch._foreach_copy_(views, own)

    def state_dict(self) -> dict[str, Any]:
        """Return all of it as tensors and plain numbers, once the mean has arrived."""
        self.arrive()
        of = self.of._asdict()
        of |= {"rates": dict(of["rates"])}
        return {"steps": self.steps, "of": of, "seconds": self.seconds, "values": self._values()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the values; it is of parameters like these."""
        self.seconds = state["seconds"]
        torch._foreach_copy_(self._values(), state["values"])

    def _values(self) -> list[Tensor]:
        return [*self.own.values.values(), *self.mean.values.values(), *self._rest, *self._rest_mean]


def _copy(trained: Sequence[Trained], old: Anchor | None) -> Anchor:
    if old is None or not old.fits(trained):
        return Anchor(trained)
    old.take([view for _, _, (view,) in trained])
    return old
