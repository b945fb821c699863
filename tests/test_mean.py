"""The mean: packing, exactness, and what an average leaves as it was."""

import math
import os

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_localsgd import Mean
from lightning_localsgd.links import Links
from lightning_localsgd.mean import pack, share
from lightning_localsgd.replica import Replica
from tests.workers import run_workers

INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


@pytest.mark.parametrize("bucket_mb", [0, -1, math.inf, math.nan, "64", True])
def test_bucket_mb_is_checked(bucket_mb):
    with pytest.raises(ValueError, match="`bucket_mb` must be a number of MiB above 0, got "):
        Mean(bucket_mb=bucket_mb)


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 60))
def test_packing_covers_every_element_exactly_once(sizes, capacity):
    buckets = list(pack(sizes, capacity))
    filled = [sum(cut.size for cut in bucket) for bucket in buckets]
    assert all(size == capacity for size in filled[:-1])
    assert len(buckets) == math.ceil(sum(sizes) / capacity)
    elements = [(cut.tensor, i) for bucket in buckets for cut in bucket for i in range(cut.start, cut.start + cut.size)]
    assert elements == [(tensor, i) for tensor, size in enumerate(sizes) for i in range(size)]


@given(st.integers(0, 2**26), st.floats(0.01, 100))
def test_no_small_bucket_is_left_over(total, bucket_mb):
    capacity = Mean(bucket_mb).capacity(total, 4)
    assert 1 <= capacity <= max(1, bucket_mb * 2**20 / 4 / 2)
    buckets = math.ceil(total / capacity)
    assert buckets * capacity - total < max(1, buckets)
    assert total <= 2**20 or buckets <= max(4, math.ceil(total / (bucket_mb * 2**20 // 8)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 8, 37, 500])
def test_shares_of_equal_numbers_sum_to_it_in_any_order(dtype, count):
    limits = torch.finfo(dtype)
    exponents = torch.linspace(math.log10(limits.smallest_normal) - 6, math.log10(limits.max), 20_000, dtype=dtype)
    special = [0.0, -0.0, math.inf, -math.inf, limits.max, limits.min, limits.tiny, limits.max / 4, 1.0, -2.0]
    torch.manual_seed(count)
    x = torch.cat([torch.randn(20_000, dtype=dtype) * 10**exponents, torch.tensor(special, dtype=dtype)])
    shares = []
    for index in range(count):
        shares.append(x.clone())
        share(shares[-1], count, index)
    line = shares[0].clone()
    for i in torch.randperm(count - 1).tolist():
        line += shares[i + 1]
    tree = shares
    while len(tree) > 1:
        tree = [sum(tree[i : i + 2][1:], start=tree[i]) for i in range(0, len(tree), 2)]
    for total in (line, tree[0]):
        assert torch.equal(total.view(INTEGERS[dtype]), x.view(INTEGERS[dtype]))


def test_shares_keep_nan():
    x = torch.tensor([1.0, math.nan])
    share(x, 3, 1)
    assert x[0].isfinite()
    assert x[1].isnan()


@settings(max_examples=30)
@given(st.integers(2, 9), st.integers(0, 10_000))
def test_shares_of_different_numbers_sum_to_their_mean(count, seed):
    torch.manual_seed(seed)
    numbers = torch.randn(count, 300)
    expected = numbers.double().mean(0)
    for index, row in enumerate(numbers):
        share(row, count, index)
    # `0.4 sqrt(N) u` in the docstring is the standard deviation; u is at most 2^-22 times the largest number
    bound = 6 * 0.4 * math.sqrt(count) * 2**-22 * 4
    assert (numbers.sum(0).double() - expected).abs().max() < bound


class Everything(nn.Module):
    """One tensor of each kind that a module may hold."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3))
        self.tied = self.weight
        self.frozen = nn.Parameter(torch.randn(7), requires_grad=False)
        self.as_half = nn.Parameter(torch.randn(4).half())
        self.as_bfloat = nn.Parameter(torch.randn(4).bfloat16())
        self.as_double = nn.Parameter(torch.randn(4).double())
        self.as_complex = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.scalar = nn.Parameter(torch.randn(()))
        self.empty = nn.Parameter(torch.randn(0, 3))
        self.conv = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
        self.transposed = nn.Parameter(torch.randn(4, 6).t())
        self.sliced = nn.Parameter(torch.randn(4, 6)[:, ::2])
        self.norm = nn.BatchNorm1d(4)
        self.norm.running_mean.normal_()
        self.register_buffer("count", torch.randint(0, 100, (3,)))
        self.register_buffer("small", torch.randint(0, 100, (3,), dtype=torch.uint8))
        self.register_buffer("flag", torch.rand(8) < 0.5)
        for dtype in (torch.int8, torch.int16, torch.int32):
            self.register_buffer("as_" + str(dtype)[6:], torch.randint(0, 100, (3,)).to(dtype))
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            self.register_buffer("as_" + str(dtype)[6:], torch.randn(5).to(dtype))
        self.register_buffer("complex128", torch.randn(3, dtype=torch.complex128))
        self.register_buffer("expanded", torch.randn(3).expand(4, 3))
        self.register_buffer("hidden", torch.randn(2), persistent=False)


def values(module):
    return {name: value.detach().clone() for name, value in [*module.named_parameters(), *module.named_buffers()]}


def join(size):
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=size)
    return rank


def average_everything(size, weights, bucket_mb):
    rank = join(size)
    torch.manual_seed(rank)
    module = Everything()
    before, pointers = values(module), [t.data_ptr() for t in module.parameters()]
    strides = [t.stride() for t in module.parameters()]
    Mean(bucket_mb).average(Replica(module).tensors(), weights, Links(rank, len(weights)))
    assert pointers == [t.data_ptr() for t in module.parameters()]
    assert strides == [t.stride() for t in module.parameters()]
    assert module.tied is module.weight
    return before, values(module)


@pytest.mark.parametrize(
    ("weights", "bucket_mb"),
    [([1, 1], 64), ([1, 1], 64 / 2**20), ([1, 0], 64), ([0, 1, 1], 40 / 2**20), ([1, 1, 1, 1], 1 / 2**20)],
)
def test_every_kind_of_tensor_is_averaged_in_place(weights, bucket_mb):
    ranks = run_workers(average_everything, len(weights), len(weights), weights, bucket_mb)
    for name, first in ranks[0][0].items():
        after = [end[name] for _, end in ranks]
        assert all(torch.equal(after[0], other) for other in after[1:]), name
        if first.is_floating_point() or first.is_complex():
            wide = torch.complex128 if first.is_complex() else torch.float64
            counted = [begin[name].to(wide) for (begin, _), weight in zip(ranks, weights, strict=True) if weight]
            expected = (sum(counted) / len(counted)).to(first.dtype)
            rounding = max(1.3e-6, torch.finfo(first.dtype).eps)
            assert torch.allclose(after[0].to(wide), expected.to(wide), rtol=rounding, atol=1e-6), name
        else:
            expected = torch.stack([begin[name].long() for begin, _ in ranks]).amax(0)
            assert torch.equal(after[0].long(), expected), name


def average_exotic():
    rank = join(2)
    dtypes = (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32)  # which do not pickle
    tensors = [torch.tensor([2.0, 4.0, 8.0]).mul(rank + 1).to(dtype) for dtype in dtypes]
    Mean().average(tensors, [1, 1], Links(rank, 2))
    return [tensor.tolist() for tensor in tensors]


def test_dtypes_that_torch_hardly_knows():
    mean, largest = [3.0, 6.0, 12.0], [4, 8, 16]
    assert run_workers(average_exotic, 2) == [[mean, mean, largest, largest]] * 2


def average_equal(size):
    rank = join(size)
    torch.manual_seed(0)
    module = Everything()
    module.frozen.data[:4] = torch.tensor([-0.0, torch.finfo(torch.float32).min, -math.inf, 5e-45])
    with torch.no_grad():
        module.weight[2:] += rank  # so only part of this tensor is equal
    before = values(module)
    Mean().average(Replica(module).tensors(), [1] * size, Links(rank, size))
    return before, values(module)


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_what_is_equal_on_all_workers_keeps_its_bits(size):
    for before, after in run_workers(average_equal, size, size):
        for name, value in before.items():
            rows = slice(0, 2) if name in ("weight", "tied") else slice(None)
            old, new = (t.reshape(-1, *t.shape[1:])[rows] if t.ndim else t for t in (value, after[name]))
            same_bits = torch.equal(
                old.contiguous().view(-1).view(torch.uint8), new.contiguous().view(-1).view(torch.uint8)
            )
            assert same_bits, name


def average_with_nan(size):
    rank = join(size)
    x = torch.full((3,), math.nan if rank == 1 else rank + 1.0)
    Mean().average([x], [1, 0, 1], Links(rank, 3))
    return x


def test_a_worker_without_weight_contributes_nothing_not_even_nan():
    for x in run_workers(average_with_nan, 3, 3):
        assert x.tolist() == [2.0, 2.0, 2.0]


def average_negative_zero(size):
    rank = join(size)
    x = torch.tensor([-0.0])
    Mean().average([x], [1, 0, 1], Links(rank, 3))
    return math.copysign(1, x.item())


def test_a_worker_without_weight_leaves_even_the_sign_of_zero():
    assert run_workers(average_negative_zero, 3, 3) == [-1, -1, -1]


def only_contribute():
    rank = join(2)
    x = torch.tensor([float(rank)])
    Mean().average([x], [1, 1], Links(rank, 2), write=rank == 0)
    return x.item()


def test_a_rank_that_only_contributes_keeps_its_values():
    assert run_workers(only_contribute, 2) == [0.5, 1.0]


def broadcast_everything():
    rank = join(2)
    torch.manual_seed(rank)
    module = Everything()
    before = values(module)
    Mean(64 / 2**20).broadcast(Replica(module).tensors())
    return before, values(module)


def test_broadcast_gives_rank_0s_bits_to_all():
    (begin, first), (_, second) = run_workers(broadcast_everything, 2)
    for name, value in begin.items():
        assert torch.equal(first[name], value), name
        assert torch.equal(second[name], value), name
