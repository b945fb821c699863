"""The replica as a list of memory, without processes."""

import pytest
import torch
from torch import nn

from lightning_localsgd.replica import Replica
from tests.test_mean import Everything, values


def test_views_cover_each_element_once_and_write_through():
    module = Everything()
    for view in Replica(module).tensors():
        assert view.is_contiguous()
        view.fill_(1)
    for name, value in values(module).items():
        expected = torch.ones_like(value)
        if value.is_complex():
            expected = torch.full_like(value, 1 + 1j)
        assert torch.equal(value, expected), name
    sizes = {name: value.numel() * (2 if value.is_complex() else 1) for name, value in values(module).items()}
    sizes["expanded"] = 3  # rows that share their memory
    assert sum(view.numel() for view in Replica(module).tensors()) == sum(sizes.values())


def test_restore_puts_every_bit_back_but_what_the_user_wrote_into_buffers():
    module = Everything()
    replica, before = Replica(module), values(module)
    own = replica.snapshot()
    for view in replica.tensors():
        view.zero_()
    own.mark()
    with torch.no_grad():
        module.weight += 1  # a parameter: undone
        module.count += 5  # a buffer: kept
    own.restore()
    for name, value in values(module).items():
        expected = torch.full_like(value, 5) if name == "count" else before[name]
        assert torch.equal(value, expected), name


def test_restore_before_mark_puts_everything_back():
    module = Everything()
    replica, before = Replica(module), values(module)
    own = replica.snapshot()
    module.count.zero_()
    own.restore()
    assert torch.equal(module.count, before["count"])


@pytest.mark.parametrize(
    "other",
    [
        nn.Linear(3, 5),
        nn.Linear(4, 3),
        nn.Linear(3, 4, bias=False),
        nn.Linear(3, 4).double(),
        nn.Sequential(nn.Linear(3, 4)),
    ],
    ids=str,
)
def test_layouts_differ_with_names_shapes_and_dtypes(other):
    assert Replica(nn.Linear(3, 4)).layout() == Replica(nn.Linear(3, 4)).layout()
    assert Replica(nn.Linear(3, 4)).layout() != Replica(other).layout()


def test_layouts_differ_with_memory_format():
    plain, last = nn.Conv2d(3, 4, 2), nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    assert Replica(plain).layout() != Replica(last).layout()


def test_digests_differ_with_one_bit():
    module = Everything()
    before = Replica(module).digest()
    assert Replica(module).digest() == before
    module.frozen.data[0] = torch.nextafter(module.frozen[0], torch.tensor(torch.inf))
    assert Replica(module).digest() != before
