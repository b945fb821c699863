"""The replica as a list of memory, without processes."""

import weakref
from unittest import mock

import pytest
import torch
from torch import nn

from lightning_localsgd import LocalSGDStrategy
from lightning_localsgd.replica import Replica
from tests.models import Regression, loader, trainer
from tests.test_mean import Everything, values
from tests.workers import run_workers


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


def test_the_layout_is_that_of_now():
    module = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4))
    replica = Replica(module, skip_frozen=True, has_anchor=True)
    replica.begin_round()
    seen = [replica.layout()]

    def change(what):
        what()
        fresh = Replica(module, skip_frozen=True, has_anchor=True)
        fresh._resting, fresh._trained = replica._resting, replica._trained
        assert replica.layout() == fresh.layout() == replica.layout()
        seen.append(replica.layout())

    change(lambda: setattr(module[1], "running_mean", torch.zeros(5)))
    change(lambda: setattr(module[1], "running_mean", torch.zeros(5).double()))
    change(lambda: module.to(memory_format=torch.channels_last))
    change(lambda: (module[0].weight.requires_grad_(False), replica.begin_round()))
    change(lambda: module[0].weight.requires_grad_(True))
    change(lambda: replica.begin_round())
    assert seen.pop() == seen[3]  # with that weight as it was before
    change(lambda: setattr(module[0].weight, "data", module[0].weight.data.transpose(2, 3)))
    change(lambda: module.register_buffer("more", torch.zeros(1)))
    change(lambda: module._modules.update(norm=module._modules.pop("1")))  # another name
    assert len(set(seen)) == len(seen), seen


def test_between_hold_and_let_go_the_tensors_stay():
    module = nn.BatchNorm1d(2)
    replica = Replica(module)
    replica.hold()
    old, module.running_mean = module.running_mean, torch.ones(3)
    assert any(view.data_ptr() == old.data_ptr() for view in replica.sent())
    replica.let_go()
    assert any(view.data_ptr() == module.running_mean.data_ptr() for view in replica.sent())


def test_views_are_kept_as_long_as_they_are_of_the_memory_of_now():
    module = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4))
    replica = Replica(module)

    def views():
        replica.hold()
        found = replica.sent()
        replica.let_go()
        memory = [x.untyped_storage().data_ptr() for x in (*module.parameters(), *module.buffers())]
        assert [view.untyped_storage().data_ptr() for view in found] == memory
        assert all(view.dtype == x.dtype for view, x in zip(found, Replica(module).sent(), strict=True))
        return found

    first = views()
    assert all(one is other for one, other in zip(first, views(), strict=True))
    module[0].weight.data = torch.ones(4, 3, 2, 2)
    assert views()[0] is not first[0]
    module[1].running_mean = torch.full((4,), 5.0)
    views()
    module.to(memory_format=torch.channels_last)
    views()
    module.double()
    views()
    kept = weakref.ref(views()[0])
    assert kept() is not None
    replica.forget()
    assert kept() is None  # what the module may give up is not held


def fit_and_look_what_is_kept():
    kept, module = [], Regression(norm=True)
    hold = Replica.hold

    def watched(self):
        hold(self)
        kept.append(self)

    with mock.patch.object(Replica, "hold", watched):
        trainer(2, LocalSGDStrategy(2)).fit(module, loader([5, 5]))
    assert len(kept) >= 2
    return [(replica._views, replica._held) for replica in kept]


def test_nothing_is_kept_after_a_fit():
    for rank in run_workers(fit_and_look_what_is_kept, 2):
        assert all(kept == ((None, []), None) for kept in rank)


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
