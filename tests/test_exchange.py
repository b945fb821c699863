"""The exchange in two hops: equal on all workers, near the mean, also after many rounds."""

import os

import pytest
import torch
import torch.distributed as dist

from lightning_localsgd import Mean
from lightning_localsgd.anchor import Anchor
from lightning_localsgd.exchange import Exchange
from lightning_localsgd.links import Links
from tests.workers import run_workers

SIZES = [3, 9_001, 0, 1, 30_000, 7]
WIRES = {
    "bfloat16": Mean(0.5, wire="bfloat16"),
    "float16": Mean(0.5, wire="float16"),
    "int8": Mean(0.5, wire="int8"),
    "int4": Mean(0.5, wire="int4"),
    "int8 with noise": Mean(0.5, wire="int8", rounding="stochastic"),
    "int4 with noise": Mean(0.5, wire="int4", rounding="stochastic"),
    "int4 that forgets": Mean(0.5, wire="int4", error_feedback=False),
}
# How far the anchor may be from the sum of all movements after 200 rounds, in units of one round's movement.
DRIFT = {"bfloat16": 0.05, "float16": 0.01, "int8": 0.05, "int4": 0.5, "int8 with noise": 0.05, "int4 with noise": 0.5}


def join(workers):
    rank = int(os.environ["LOCAL_RANK"])
    if not dist.is_initialized():
        dist.init_process_group("gloo", rank=rank, world_size=workers)
    return rank


def drifts(workers, rounds):
    """Sum known differences; return how far the anchor is off in the end, and whether it was equal everywhere."""
    rank, found = join(workers), {}
    for name, mean in WIRES.items():
        xs = [torch.zeros(size) for size in SIZES]
        true = [x.double() for x in xs]
        anchor = Anchor([(str(place), x, [x]) for place, x in enumerate(xs)])
        exchange, random = Exchange(mean, Links(rank, workers)), torch.Generator().manual_seed(1)

        def then(bucket, anchor=anchor):
            anchor.values[bucket.group][bucket.start : bucket.start + len(bucket.values)].copy_(bucket.values)

        for number in range(rounds):
            moves = [[1e-3 * torch.randn(size, generator=random) for size in SIZES] for _ in range(workers)]
            together = [torch.stack(of).double().mean(0) for of in zip(*moves, strict=True)]
            for x, own, t, move in zip(xs, moves[rank], true, together, strict=True):
                x.add_(own)
                t.add_(move)
            exchange.average(xs, anchor, [1] * workers, number, then=then)
        off = torch.cat(xs).double() - torch.cat(true)
        sums = [None] * workers
        dist.all_gather_object(sums, [x.view(torch.int32).sum().item() for x in xs])
        assert torch.cat(xs).equal(torch.cat(anchor.flat()))
        found[name] = (off.norm() / torch.cat(together).norm()).item(), all(other == sums[0] for other in sums)
    return found


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_after_200_rounds_the_anchor_is_near_the_sum_of_all_movements(workers):
    ranks = run_workers(drifts, workers, workers, 200 if workers == 4 else 20, timeout=300)
    for name, limit in DRIFT.items():
        assert ranks[0][name][0] < limit, name
    assert all(equal for _, equal in ranks[0].values())
    assert ranks[0]["int4 that forgets"][0] > 1.5 * ranks[0]["int4"][0]


def edges(workers):
    rank = join(workers)
    found = {}
    for name, mean in WIRES.items():
        # What has not moved keeps its bits; who has no weight is not read, and its error memory stays.
        x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 3
        anchor = Anchor([("x", x, [x])])
        before = x.clone()
        exchange = Exchange(mean, Links(rank, workers))
        exchange.average([x], anchor, [1] * workers, 0)
        still = x.equal(before)
        x.add_(0.1 * torch.randn(1000, generator=torch.Generator().manual_seed(rank)))
        exchange.average([x], anchor, [1] * workers, 1)
        memory = [part.clone() for parts in exchange.state_dict().values() for part in parts]
        anchor.take([x])
        target = anchor.values[torch.float32, torch.device("cpu")] + 0.25
        x.copy_(target if rank else torch.full_like(x, torch.nan))
        exchange.average([x], anchor, [0] + [1] * (workers - 1), 2)
        kept = not memory or torch.equal(exchange.state_dict()["torch.float32"][0], memory[0])
        # A mean that is not finite stops all.
        x.copy_(anchor.values[torch.float32, torch.device("cpu")])
        x[5] = torch.inf
        try:
            exchange.average([x], anchor, [1] * workers, 3)
            raised = None
        except RuntimeError as error:
            raised = str(error)
        found[name] = still, kept, (target - anchor.flat()[0]).abs().max().item(), raised
    # Elements of 64 bits keep their own precision in the anchor.
    x = torch.linspace(0, 1, 300, dtype=torch.float64) / 3
    start = x.clone()
    anchor = Anchor([("x", x, [x])])
    x.add_(1e-9)
    Exchange(Mean(wire="int8"), Links(rank, workers)).average([x], anchor, [1] * workers, 0)
    return found, (x - start).sub(1e-9).abs().max().item()


def test_edges():
    for rank, (found, wide) in enumerate(run_workers(edges, 3, 3)):
        for name, (still, kept, _, raised) in found.items():
            assert still, name
            assert kept or rank, name  # rank 0 had no weight
            assert raised == "The mean of the replicas in round 3 has a NaN or an infinite value.", name
        assert wide < 1e-11


def memories(workers):
    rank = join(workers)
    x = torch.zeros(50_000)
    anchor, exchange = Anchor([("x", x, [x])]), Exchange(Mean(0.5, wire="int4"), Links(rank, workers))
    x.add_(torch.randn(50_000, generator=torch.Generator().manual_seed(rank)))
    exchange.average([x], anchor, [1] * workers, 0)
    ((own, owned),) = exchange.state_dict().values()
    return own.count_nonzero().item(), len(own), own.abs().max().item(), owned.count_nonzero().item(), len(owned)


def test_both_roundings_are_remembered():
    for filled, size, largest, owned_filled, owned in run_workers(memories, 4, 4):
        assert size == 50_000
        assert filled > 0.9 * size
        assert largest < 1
        assert 50_000 / 4 <= owned < 1.05 * 50_000 / 4
        assert owned_filled > 0.9 * 50_000 / 4


def other_parameters(workers):
    rank = join(workers)
    exchange, random = Exchange(Mean(wire="int4"), Links(rank, workers)), torch.Generator().manual_seed(rank)
    a, b, c = (torch.zeros(256) for _ in range(3))

    def average(named):
        anchor = Anchor([(name, x, [x]) for name, x in named.items()])
        for x in named.values():
            x.add_(torch.randn(256, generator=random))
        exchange.average(list(named.values()), anchor, [1] * workers, 0)
        return exchange.memory(anchor, (torch.float32, a.device)), anchor

    (first, _), _ = average({"a": a, "b": b})
    of_b = first[256:].clone()
    anchor = Anchor([("b", b, [b]), ("c", c, [c])])
    own, owned = exchange.memory(anchor, (torch.float32, a.device))
    return own[:256].equal(of_b), of_b.abs().max().item(), own[256:].abs().max().item(), owned.abs().max().item()


def test_what_was_left_out_stays_with_its_parameter():
    for stays, was, of_new, owned in run_workers(other_parameters, 2, 2):
        assert stays
        assert was > 0
        assert of_new == 0
        assert owned == 0
