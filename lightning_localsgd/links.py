"""BY WHICH LINKS workers agree: each rank is a worker, or the devices of a node are one together."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_localsgd.header import Header

_T = TypeVar("_T")


class Links:
    """The links between workers of one rank each.

    Args:
        worker: which of the workers this rank is.
        workers: their number.
        group: their process group, or None for that of all ranks.
        rank: this process's, if it is not the worker's.
    """

    device = 0  # which of the devices of its worker this rank is
    devices = 1  # that a worker has

    def __init__(self, worker: int, workers: int, group: Any = None, rank: int | None = None) -> None:
        self.worker = worker
        self.workers = workers
        self.group = group  # in which one rank of each worker is
        self.rank = worker if rank is None else rank

    def mates(self, rank: int) -> Sequence[int]:
        """Return the ranks that hold one replica together with this one."""
        return (rank,)

    def of_workers(self, of_ranks: Sequence[_T]) -> list[_T]:
        """Return for each worker what its first rank has in this list, which has something for each rank."""
        return list(of_ranks)

    def in_group(self, of_ranks: Sequence[_T]) -> list[_T]:
        """Return the same for each rank of :attr:`group`, in the order in which it counts them."""
        return list(of_ranks)

    def reduce(self, values: Tensor, operation: Any) -> Callable[[], object] | None:
        """Begin to reduce values over all workers, in place; return what waits for it, None if there is nothing to do.

        Args:
            values: one-dimensional, the same number on all ranks.
            operation: of ``torch.distributed``.
        """
        if self.workers == 1:
            return None
        return dist.all_reduce(values, operation, group=self.group, async_op=True).wait  # type: ignore[no-any-return]

    def complete(self, values: Tensor, share: int) -> None:
        """Give to all devices of the worker what each of them has: ``share`` elements of ``values``, in turns."""


class NodeLinks(Links):
    """The links between workers that are the devices of a node.

    Each device sends its share of a model across to the devices with the same number in other nodes, and gives what
    comes to its own node, so that one model leaves a node, and not one for each device.

    Args:
        nodes: the ranks of each node, as many in each.
        rank: this process's.
        across: the process group of this rank and those with the same place in other nodes.
        inside: the process group of this node.
    """

    def __init__(self, nodes: Sequence[Sequence[int]], rank: int, across: Any, inside: Any) -> None:
        self._nodes = nodes
        node = next(place for place, ranks in enumerate(nodes) if rank in ranks)
        super().__init__(node, len(nodes), across, rank)
        self.device, self.devices = nodes[node].index(rank), len(nodes[node])
        self.inside = inside

    def mates(self, rank: int) -> Sequence[int]:
        return next(ranks for ranks in self._nodes if rank in ranks)

    def of_workers(self, of_ranks: Sequence[_T]) -> list[_T]:
        return [of_ranks[ranks[0]] for ranks in self._nodes]

    def in_group(self, of_ranks: Sequence[_T]) -> list[_T]:
        return [of_ranks[rank] for rank in sorted(ranks[self.device] for ranks in self._nodes)]  # as torch sorts them

    def reduce(self, values: Tensor, operation: Any) -> Callable[[], object] | None:
        if self.workers == 1:
            return None
        share = -(-len(values) // self.devices)
        mine = values[self.device * share :][:share]
        work = dist.all_reduce(mine, operation, group=self.group, async_op=True) if len(mine) else None

        def wait() -> None:
            if work is not None:
                work.wait()
            self.complete(values, share)

        return wait

    def complete(self, values: Tensor, share: int) -> None:
        shares = zip(torch.split(values, share), self._nodes[self.worker], strict=False)  # the last may have none
        works = [dist.broadcast(piece, rank, group=self.inside, async_op=True) for piece, rank in shares]
        for work in works:
            work.wait()


class AllLinks(NamedTuple):
    """The links of one rank.

    Args:
        between: the workers.
        background: the workers, for averages beside the training.
        inside: between the ranks of this worker.
    """

    between: Links
    background: Links
    inside: Links


def nodes_of(header: Header, node: int, device: int) -> list[list[int]]:
    """Return the ranks of each node, in the order of their devices.

    Args:
        header: how the ranks hear of each other.
        node: the number of this rank's node.
        device: the number of this rank in it.

    Raises:
        ValueError: on all ranks, if nodes have different numbers of devices.
    """
    places = header.gather_numbers([node, device], "joins the run")
    ranks: dict[int, list[int]] = {}
    for rank in sorted(range(len(places)), key=places.__getitem__):
        ranks.setdefault(places[rank][0], []).append(rank)
    if len({len(of_node) for of_node in ranks.values()}) > 1:
        counts = ", ".join(f"{len(of_node)} on node {number}" for number, of_node in ranks.items())
        raise ValueError(f'`replica="node"` needs the same number of devices on each node, got {counts}.')
    return list(ranks.values())


def links_of(nodes: Sequence[Sequence[int]], rank: int, make_group: Callable[[Sequence[int]], Any]) -> NodeLinks:
    """Return the links of nodes, with process groups of their own.

    Args:
        nodes: the ranks of each.
        rank: this process's.
        make_group: makes a process group of these ranks, among them alone.
    """
    mine = next(ranks for ranks in nodes if rank in ranks)
    across = [ranks[mine.index(rank)] for ranks in nodes]
    return NodeLinks(nodes, rank, make_group(across), make_group(mine))
