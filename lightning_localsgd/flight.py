"""WHAT is under way: an average that is taken in the background while training goes on, and lands some steps later."""

import threading
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lightning_localsgd.anchor import Anchor, Line, Trained
from lightning_localsgd.mean import CHUNK

_LISTEN = 1.0  # seconds in which a wait is deaf to Ctrl-C, and to what others have left in writing


class Flight:
    """One average from the end of its round to where it lands.

    Args:
        trained: the trained parameters at the end of the round.
        rest: one-dimensional views of all else that is averaged, by name.
        buffers: the names of those that are of buffers.
        steps: until it lands.
        of: what is known of the round.
        last: a flight that has landed, whose memory this one may take over: new memory costs more than filling it.
    """

    def __init__(
        self,
        trained: Sequence[Trained],
        rest: Mapping[str, Tensor],
        buffers: Collection[str],
        steps: int,
        of: Any,
        last: "Flight | None" = None,
    ) -> None:
        reuse = last if last is not None and last.own.fits(trained) else None
        self.own: Anchor = Anchor(trained) if reuse is None else reuse.own  # this worker's values at the round's end
        self.mean: Anchor = Anchor(trained) if reuse is None else reuse.mean  # the same, and then their mean
        if reuse is not None:
            for anchor in (self.own, self.mean):
                anchor.take([view for _, _, (view,) in trained])
        self.steps = steps
        self.of = of
        self.seconds = 0.0  # that it has taken this worker's own time so far
        self.tell: Callable[[float], None] = lambda seconds: None  # called when it has landed
        self.rest = list(rest)  # what is trained, or frozen, may be another thing when it lands
        self._buffers = [name in buffers for name in rest]
        self._rest_own = [view.clone() for view in rest.values()]
        self._rest_mean = [view.clone() for view in rest.values()]
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._done: torch.cuda.Event | None = None

    def start(
        self,
        average: Callable[[Sequence[Tensor], Sequence[Tensor]], None],
        device: torch.device,
        stream: torch.cuda.Stream | None,
    ) -> None:
        """Begin to replace the values by their mean.

        Args:
            average: does it, in place, for views of the trained parameters and of the rest.
            device: where they are.
            stream: which does the work on a GPU.
        """
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(device))  # until the values have been copied

        def work() -> None:
            try:
                on_gpu = stream is not None
                with torch.cuda.device(device) if on_gpu else nullcontext(), torch.cuda.stream(stream):
                    average(self.mean.flat(), self._rest_mean)
                    if stream is not None:
                        self._done = stream.record_event()
            except BaseException as error:  # for the worker, when it waits
                self._error = error

        # A daemon, so that a process can end although the others never answer.
        self._thread = threading.Thread(target=work, name="localsgd-average", daemon=True)
        self._thread.start()

    def pieces(self) -> list[tuple[Line, Tensor, Tensor]]:
        """Return each trained parameter, with its values in ``mean`` and its own."""
        return list(zip(self.own.lines, self.mean.flat(), self.own.flat(), strict=True))

    def tick(self) -> bool:
        """Count a step; return whether it lands after this one."""
        self.steps -= 1
        return self.steps <= 0

    def arrive(self, look: Callable[[], None]) -> None:
        """Wait for the mean.

        Args:
            look: raises if another worker has left, for whom this one would wait in vain.

        Raises:
            RuntimeError: if it has failed.
        """
        if self._thread is None:
            return
        with torch.profiler.record_function("localsgd::wait"):
            while self._thread.is_alive():
                self._thread.join(_LISTEN)
                if self._thread.is_alive():
                    look()
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
            rest: views of all else, in the order of :attr:`rest`; of these buffers of floats just take their mean.
            keep: whether what this worker has learnt since the end of the round, :math:`x - s`, is kept.
        """
        # Parameters last, and all of `own` before any x: names may share memory.
        starts, own = [*self._rest_mean, *self.mean.flat()], [*self._rest_own, *self.own.flat()]
        are_buffers = [*self._buffers, *(False for _ in views)]
        views = [*rest, *views]
        with torch.profiler.record_function("localsgd::apply"), torch.no_grad():
            for x, start, s, is_buffer in zip(views, starts, own, are_buffers, strict=True):
                if not keep or x.dtype == torch.bool or (is_buffer and x.is_floating_point()):
                    s.copy_(start)
                else:
                    for parts in zip(*(torch.split(all_, CHUNK) for all_ in (x, s, start)), strict=True):
                        _go_on(*parts)
            torch._foreach_copy_(views, starts)
        yield
        with torch.no_grad():
            torch._foreach_copy_(views, own)

    def state_dict(self) -> dict[str, Any]:
        """Return all of it as tensors and plain numbers, when the mean has arrived."""
        of = self.of._asdict()
        of |= {"rates": dict(of["rates"])}
        more = {"seconds": self.seconds, "rest": self.rest, "values": self._values()}
        return {"steps": self.steps, "of": of} | more

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the values; it is of parameters like these."""
        self.seconds = state["seconds"]
        torch._foreach_copy_(self._values(), state["values"])

    def _values(self) -> list[Tensor]:
        return [*self.own.values.values(), *self.mean.values.values(), *self._rest_own, *self._rest_mean]


def _go_on(x: Tensor, s: Tensor, start: Tensor) -> None:
    """Replace ``s`` by what ``x`` becomes when its round, which ended at ``s``, turns out to have led to ``start``."""
    wide = s.dtype if s.is_floating_point() else torch.int64
    x, own, start = x.to(wide), s.to(wide), start.to(wide)
    # Who has not moved is at the start, and where the start is s nothing changes, bit for bit.
    s.copy_(torch.where(x == own, start, x + (start - own)))
