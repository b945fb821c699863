"""WHO TALKS in Lightning: the strategy's collectives, which all have a header while a fit runs."""

from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_localsgd.collectives import StepWarning
from lightning_localsgd.fingerprint import greet
from lightning_localsgd.header import Header, Want, explained
from lightning_localsgd.worker import Worker

if TYPE_CHECKING:
    _Base = DDPStrategy
else:
    _Base = object  # `lightning.pytorch` and `pytorch_lightning` share no class: theirs comes with `LocalSGDStrategy`

_T = TypeVar("_T")


class Talks(_Base):
    """The part of the strategy by which Lightning, torchmetrics and users let ranks talk."""

    _header: Header | None
    _worker: Worker | None  # of the fit in progress
    _running: bool  # between `on_train_start` and `on_train_end`, where every collective has a header
    _warn_of_step: StepWarning

    def _talk(self) -> Header:
        """Return how the ranks hear of each other; all make it at once."""
        if self._header is None:
            greet(self.global_rank, self.world_size, self._timeout)
            self._header = Header(self.global_rank, self.world_size, self._timeout)
        return self._header

    @property
    def worker(self) -> Worker:
        """This worker, during ``fit``: its clock, its replica, and its part in the protocol."""
        if self._worker is None:
            raise RuntimeError("There is a worker only during `fit`.")
        return self._worker

    @property
    def _trainer(self) -> Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    @property
    def _communicates(self) -> bool:
        """Whether this rank may send headers: in training, and not on the way out with an exception."""
        return self._running and not self._trainer.interrupted

    @property
    def _is_silent(self) -> bool:
        """Whether there is nobody to talk to, or no talking on the way out with an exception."""
        return self.world_size == 1 or (self.lightning_module is not None and self._trainer.interrupted)

    def _telling(self) -> AbstractContextManager[None]:
        if self._header is None:
            return explained(f"Rank {self.global_rank}, which starts,")
        return self._header.telling()

    def _listen(self) -> None:
        if self._trainer.training and self.worker.clock.averages_models:
            self._warn_of_step()

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        if self._is_silent:
            return
        if self._running:
            self._listen()
            self.worker.ask(Want.BARRIER)
        else:
            with self._telling():
                super().barrier(*args, **kwargs)

    def broadcast(self, obj: _T, src: int = 0) -> _T:
        if self._is_silent:
            return obj
        with self._telling():
            if not self._running:
                return super().broadcast(obj, src)
            self._listen()
            value: _T = self.worker.collectives.broadcast(obj, src)
            return value

    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        if self._is_silent or not isinstance(tensor, Tensor):
            return tensor
        everyone = partial(super().reduce, tensor, group, reduce_op)
        if not self._running or group not in (None, dist.group.WORLD):
            return everyone()
        self._listen()
        with self._telling():
            value, _ = self.worker.collectives.reduce(tensor, reduce_op, everyone)
        return value

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:  # noqa: A002
        if self._is_silent:
            return decision
        if not self._running:
            with self._telling():
                return super().reduce_boolean_decision(decision, all)
        self._listen()
        votes = torch.tensor(int(decision), device=self.root_device)
        everyone = partial(super().reduce, votes, reduce_op="sum")
        with self._telling():
            total, voters = self.worker.collectives.reduce(votes, "sum", everyone)
        return bool(total == voters) if all else bool(total)

    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        if self._is_silent:
            return tensor.unsqueeze(0)
        if self._running and group in (None, dist.group.WORLD):
            self._listen()
            self.worker.ask(Want.ALL_GATHER)
        with self._telling():
            return super().all_gather(tensor, group, sync_grads)

    def _gather_metric(self, tensor: Tensor) -> list[Tensor]:
        if self._is_silent:
            return [tensor]
        with self._telling():
            if not self._running:
                return list(gather_all_tensors(tensor))
            self._listen()
            return self.worker.collectives.gather(tensor)
