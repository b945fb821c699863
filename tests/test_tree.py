"""The names of a module's tensors, kept from one look to the next, without processes."""

from collections import OrderedDict
from copy import deepcopy
from inspect import isgenerator
from itertools import chain

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_localsgd.tree import Tree


class Net(nn.Module):
    """Two layers, one after the other, and a buffer."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(2, 2), nn.Linear(2, 2)
        self.register_buffer("count", torch.zeros(1))
        self.norm = nn.BatchNorm1d(2)


def moved_to_the_neighbour(net):
    bias = net.one.bias
    weight = net.other.weight
    net.one, net.other = nn.Module(), nn.Module()
    net.one.register_parameter("weight", weight)  # the last of one, then the first of the other
    yield
    del net.one.weight
    net.other.register_parameter("weight", weight)
    net.other.register_parameter("bias", bias)


def parameter_made_a_buffer(net):
    net.norm = nn.Module()
    net.norm.register_parameter("mean", nn.Parameter(torch.zeros(1)))
    yield
    mean = net.norm.mean
    del net.norm.mean
    net.norm.register_buffer("mean", mean)


CHANGES = {
    "a buffer is rebound": lambda net: setattr(net, "count", torch.zeros(1)),
    "a parameter is rebound": lambda net: setattr(net.one, "bias", nn.Parameter(torch.zeros(2))),
    "a parameter is gone": lambda net: net.one.register_parameter("bias", None),
    "weights are tied": lambda net: setattr(net.one, "weight", net.other.weight),
    "a child of a child": lambda net: net.norm.add_module("inner", nn.Linear(1, 1)),
    "another child": lambda net: setattr(net, "one", deepcopy(net.one)),
    "a child is gone": lambda net: delattr(net, "one"),
    "parametrized": lambda net: parametrizations.weight_norm(net.other),
    "another name": lambda net: net._modules.update(third=net._modules.pop("norm")),
    "another order": lambda net: (
        net._modules.move_to_end("one")
        if isinstance(net._modules, OrderedDict)
        else net._modules.update(one=net._modules.pop("one"))
    ),
    "another dictionary": lambda net: net.norm.__dict__.update(_buffers={"mine": torch.zeros(1)}),
    "moved to the neighbour": moved_to_the_neighbour,
    "a parameter is made a buffer": parameter_made_a_buffer,
}


def same(found, expected):
    expected = list(expected)
    return [name for name, _ in found] == [name for name, _ in expected] and all(
        one is other for (_, one), (_, other) in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_each_change_is_seen(change):
    net = Net()
    tree = Tree(net)
    tree.look()
    changing = change(net)
    for _ in chain(changing if isgenerator(changing) else (), [None]):
        parameters, buffers = tree.look()
        assert same(parameters, net.named_parameters())
        assert same(buffers, net.named_buffers())
        again = tree.look()
        assert parameters is again[0]
        assert buffers is again[1]  # nothing has changed


def test_a_module_that_names_its_tensors_itself_is_always_asked():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.hidden = nn.Linear(1, 1), False

        def named_modules(self, *args, **kwargs):
            return () if self.hidden else super().named_modules(*args, **kwargs)

    net = nn.Sequential(Own(), nn.Linear(2, 2))
    tree = Tree(net)
    assert len(tree.look()[0]) == 4
    net[0].hidden = True
    assert same(tree.look()[0], net.named_parameters())
    assert len(tree.look()[0]) == 2


def test_an_instance_may_name_them_itself():
    net = Net()
    first = [("only", net.one.weight)]
    net.named_parameters = lambda: iter(first)
    tree = Tree(net)
    assert same(tree.look()[0], first)
    first.append(("second", net.one.bias))
    assert same(tree.look()[0], first)


def test_what_is_forgotten_is_not_held():
    tree = Tree(Net())
    tree.look()
    tree.forget()
    assert not any((tree._parameters, tree._buffers, tree._content))
    assert len(tree.look()[0]) == 6
