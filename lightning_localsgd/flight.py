"""WHAT is under way: an average that is taken in the background while training goes on, and lands some steps later."""

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from lightning_localsgd.anchor import Anchor, Trained


class Flight:
    """One average from the end of its round to where it lands.

    Args:
        trained: the trained parameters at the end of the round.
        rest: one-dimensional views of all else that is averaged.
        buffers: of how many of these, the last ones, floats take the mean rather than add what happened meanwhile.
        steps: until it lands.
        about: what else is to be known at the landing; plain numbers, equal on all workers.
    """

    def __init__(
        self, trained: Sequence[Trained], rest: Sequence[Tensor], buffers: int, steps: int, about: dict[str, Any]
    ) -> None:
        self.own = Anchor(trained)  # this worker's values at the end of the round
        self.mean = Anchor(trained)  # the same, and then their mean
        self.steps = steps
        self.about = about
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
        stream = torch.cuda.Stream(device) if on_gpu else None
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

    @torch.no_grad()
    def land(self, views: Sequence[Tensor], rest: Sequence[Tensor], keep: bool) -> None:
        r"""Write :math:`a' + (x - s)` into each parameter, where ``mean`` holds the next start :math:`a'`.

        Args:
            views: of the trained parameters, as they are now.
            rest: views of all else.
            keep: whether what this worker has learnt since the end of the round, :math:`x - s`, is kept.
        """
        with torch.profiler.record_function("localsgd::apply"):
            for view, start, own in zip(views, self.mean.flat(), self.own.flat(), strict=True):
                view.copy_(view.to(own).sub_(own).add_(start) if keep else start)
            for place, (view, mean, own) in enumerate(zip(rest, self._rest_mean, self._rest, strict=True)):
                takes_mean = place >= self._first_buffer and view.is_floating_point()
                view.copy_(mean if takes_mean or not keep else view.sub(own).add_(mean))

    def state_dict(self) -> dict[str, Any]:
        """Return all of it as tensors and plain numbers, once the mean has arrived."""
        self.arrive()
        return {
            "steps": self.steps,
            "about": self.about,
            "own": list(self.own.values.values()),
            "mean": list(self.mean.values.values()),
            "rest": self._rest,
            "rest_mean": self._rest_mean,
            "first_buffer": self._first_buffer,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; it is of parameters like these."""
        self.steps, self.about, self._first_buffer = state["steps"], state["about"], state["first_buffer"]
        for mine, its in ((self.own, state["own"]), (self.mean, state["mean"])):
            for values, saved in zip(mine.values.values(), its, strict=True):
                values.copy_(saved)
        for views, saved in ((self._rest, state["rest"]), (self._rest_mean, state["rest_mean"])):
            for view, value in zip(views, saved, strict=True):
                view.copy_(value)
