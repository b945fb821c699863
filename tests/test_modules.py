"""Modules of every kind: what is averaged, what is not sent, and what is refused before anything is sent."""

import inspect
import math
import os
from copy import deepcopy

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrizations

from lightning_localsgd import LocalSGDStrategy, Mean
from lightning_localsgd.replica import Replica, difference
from tests.models import Constant, Regression, Trajectory, batch, loader, network, rank, same, state_of, trainer
from tests.reference import pr_sgd
from tests.workers import run_workers

# -------------------------------------------------------------------------------------------------------------- refused


def holding(tensor):
    module = nn.Module()
    module.register_buffer("odd", tensor)
    return module


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.filterwarnings("ignore:.*quantize:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*uantize_per_tensor")
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: nn.LazyLinear(3), r"`weight` has no shape yet: it is lazy; run the module on one batch before `fit`"),
        (lambda: holding(torch.eye(3).to_sparse()), r"`odd` has the layout torch\.sparse_coo"),
        (lambda: holding(torch.ones(3, device="meta")), r"`odd` has no memory: it is on the meta device"),
        (lambda: holding(torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)), r"the dtype torch\.qint8"),
        (lambda: holding(torch.ones(3).to(torch.uint64)), r"`odd` has the dtype torch\.uint64"),
        (lambda: holding(torch.ones(3, dtype=torch.uint8).view(torch.bits8)), r"the dtype torch\.bits8"),
        (lambda: holding(sharded()), r"`odd` is a DTensor"),
    ],
)
def test_what_has_no_mean_is_refused_by_name(make, says):
    with pytest.raises(ValueError, match=f"Only dense tensors of numbers can be averaged, and .*{says}"):
        Replica(make()).lines()


def sharded():
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
    from torch.distributed.tensor.placement_types import Shard

    meta = TensorMeta(torch.Size([3]), (1,), torch.float32)
    make = torch.distributed.device_mesh.DeviceMesh
    # Without a process group: an older torch asks it for the rank, but on this device.
    known = "_rank" in inspect.signature(make).parameters
    mesh = make("cpu", [0], _init_backend=False, _rank=0) if known else make("xla", [0])
    return DTensor(torch.ones(3), DTensorSpec(mesh, (Shard(0),), meta), requires_grad=False)


class Lazy(Regression):
    """Knows the size of its input only from a batch."""

    def __init__(self, dry_run):
        super().__init__()
        self.net, self.dry_run = nn.LazyLinear(1), dry_run

    def setup(self, stage):
        pass

    def configure_model(self):
        if self.dry_run:
            with torch.no_grad():
                self.net(batch(rank(), 0)[0])


def fit_lazy(dry_run):
    model = Lazy(dry_run)
    trainer(2, 3).fit(model, loader([4, 4]))
    return state_of(model)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_module_is_refused_until_a_dry_run_in_configure_model():
    assert same(run_workers(fit_lazy, 2, True))
    for end in run_workers(fit_lazy, 2, False, catch=True):
        assert end.type == "ValueError"
        assert "`net.weight` has no shape yet" in end.message


class Other(Regression):
    """Differs on rank 1."""

    def __init__(self, how):
        super().__init__()
        odd = os.environ["LOCAL_RANK"] == "1"
        if how == "shape":
            self.net[2] = nn.Linear(8, 2 if odd else 1)
        if how == "more" and odd:
            self.extra = nn.Linear(3, 3)
        self.start = float(odd)
        nn.init.constant_(self.net[0].bias, self.start)

    def setup(self, stage):
        pass


def fit_other(hows):
    said = []
    for how in hows:
        model = Other(how)
        with pytest.raises(RuntimeError) as error:
            trainer(2, 3).fit(model, loader([4, 4]))
        assert (model.net[0].bias == model.start).all()  # nothing of rank 0's has been sent
        said.append(str(error.value))
    return said


def test_the_first_parameter_that_differs_is_named_with_both_shapes_and_the_rank():
    first, second = run_workers(fit_other, 2, ["shape", "more"])
    assert first == second
    start = "the parameters and buffers of rank 1 differ from those of rank 0: "
    float32 = "torch.float32 of shape"
    assert (
        start + f"its `net.2.weight` ({float32} (2, 8)) is `net.2.weight` ({float32} (1, 8)) on the other" in first[0]
    )
    assert start + f"there is `extra.weight` ({float32} (3, 3)) where the other has nothing more" in first[1]


def test_every_difference_is_named():
    conv, last = nn.Conv2d(3, 4, 2), nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    says = difference(Replica(conv).describe(), Replica(last).describe())
    assert says == "its `weight` has another memory format (strides (12, 1, 6, 3) and (12, 4, 2, 1))"
    frozen = nn.Linear(2, 2).requires_grad_(False)
    replicas = [Replica(deepcopy(frozen), skip_frozen=True) for _ in range(3)]
    for replica in replicas[1:]:
        replica.begin_round()
    assert difference(replicas[0].describe(), replicas[1].describe()) == (
        "its `weight` is frozen, unlike the other's, with `Mean(frozen='skip')`"
    )
    assert difference(replicas[1].describe(), replicas[2].describe()) == "in nothing that can be named"
    with torch.no_grad():
        replicas[2].tensors()[1][1] += 1
    assert difference(replicas[1].describe(), replicas[2].describe()) == (
        "its frozen `bias` has other values, and `Mean(frozen='skip')` does not send it"
    )


# --------------------------------------------------------------------------------------------------------------- frozen


class Adapter(Constant):
    """Two weights of gradient rank + 1: `weight` is frozen after 4 steps, `late` is trained from the third step on."""

    def __init__(self, wrong=False):
        super().__init__()
        self.wrong = wrong
        self.sent = []  # how many tensors an average after each step would send
        self.late = nn.Parameter(torch.full((1,), 5.0), requires_grad=False)
        self.base = nn.Parameter(torch.arange(10_000.0), requires_grad=False)

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 2:
            self.late.requires_grad_(True)
            self.optimizers().optimizer.add_param_group({"params": [self.late], "lr": 1.0})
        if batch_idx == 4:
            self.weight.requires_grad_(False)
            self.weight.grad = None
        if self.wrong and batch_idx == 7 and rank() == 1:
            with torch.no_grad():
                self.base[17] += 1

    def training_step(self, batch, batch_idx):
        return (rank() + 1) * sum(parameter.sum() for parameter in (self.weight, self.late) if parameter.requires_grad)

    def on_train_batch_end(self, *_):
        self.sent.append(len(self.trainer.strategy.worker.replica.sent()))

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], lr=1.0)


def fit_frozen(frozen):
    model, trajectory = Adapter(), Trajectory()
    strategy = LocalSGDStrategy(3, mean=Mean(0.02, frozen=frozen))  # 4 buckets, with the frozen base
    with torch.profiler.profile() as profile:
        trainer(2, strategy, callbacks=[trajectory]).fit(model, loader([9, 9]))
    reduces = sum(event.name == "gloo:all_reduce" for event in profile.events())
    return trajectory.column("weight"), trajectory.column("late"), (reduces, model.sent), state_of(model)


@pytest.mark.parametrize(
    ("frozen", "reduces", "sent"),
    [("send", 3 * 4, [3] * 9), ("skip", 3 * 1, [1, 1, 2, 2, 2, 1, 1, 1, 1])],
)
def test_parameters_that_are_unfrozen_or_frozen_within_a_round_are_averaged_at_its_end(frozen, reduces, sent):
    (weight, late, calls, state), (other, other_late, _, other_state) = run_workers(fit_frozen, 2, frozen)
    assert weight == [-1, -2, -4.5, -5.5, -5.5, -6, -6, -6, -6]
    assert other == [-2, -4, -4.5, -6.5, -6.5, -6, -6, -6, -6]
    assert late == [5, 5, 3.5, 2.5, 1.5, -1, -2, -3, -5.5]
    assert other_late == [5, 5, 3.5, 1.5, -0.5, -1, -3, -5, -5.5]
    assert calls == (reduces, sent)
    assert same([state, other_state])


def fit_wrong():
    trainer(2, LocalSGDStrategy(3, mean=Mean(frozen="skip"))).fit(Adapter(wrong=True), loader([9, 9]))


def test_a_frozen_parameter_that_changes_on_one_worker_is_found():
    for end in run_workers(fit_wrong, 2, catch=True):
        assert "of rank 1 differ from those of rank 0: its frozen `base` has other values" in end.message


def test_the_frozen_are_looked_at_again_only_after_they_have_been_written_to(monkeypatch):
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False))
    replica = Replica(module, skip_frozen=True)
    assert replica.frozen_digest() == 0
    assert len(replica.sent()) == 4
    replica.begin_round()
    assert len(replica.sent()) == 2
    first = replica.frozen_digest()
    assert first > 0
    with monkeypatch.context() as patch:
        patch.setattr("lightning_localsgd.replica._digest", None)
        assert replica.frozen_digest() == first
    with torch.no_grad():
        module[1].bias += 1
    assert replica.frozen_digest() not in (0, first)


# ------------------------------------------------------------------------------------------------ sparse, parametrized


class Embeds(Regression):
    """Three rows of a table at a time, with sparse gradients."""

    def __init__(self, make):
        super().__init__()
        self.make = make
        self.table = nn.Embedding(20, 2, sparse=True, dtype=torch.float64)
        self.net = network(dtype=torch.float64)[2]
        with torch.no_grad():
            self.table.weight.copy_(torch.arange(40).view(20, 2) / 40)

    def setup(self, stage):
        pass

    def training_step(self, _, batch_idx):
        return embedded(self, rank(), batch_idx + 1)

    def configure_optimizers(self):
        return self.make(self.table.parameters())


def embedded(model, worker, t):
    rows = torch.tensor([t, 5 * worker + t, 19])
    return (model.table(rows).sum(1) - worker).square().mean()


def fit_sparse():
    adam = lambda parameters: torch.optim.SparseAdam(list(parameters), lr=0.1)  # noqa: E731
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.1)  # noqa: E731
    same_as = []
    for make in (adam, sgd):
        model = Embeds(make)
        *_, expected = pr_sgd(deepcopy(model), 2, 3, 6, lambda x, make=make: make(x.table.parameters()), embedded)
        trainer(2, 3).fit(model, loader([6, 6]))
        same_as.append((model.table.weight, expected[0].table.weight))
        ours, theirs = Embeds(make), Embeds(make)
        trainer(2, 1).fit(ours, loader([6, 6]))
        trainer(2, DDPStrategy(find_unused_parameters=True)).fit(theirs, loader([6, 6]))
        same_as.append((ours.table.weight, theirs.table.weight))
    return [tuple(tensor.detach() for tensor in pair) for pair in same_as]


def test_sparse_gradients():
    for pairs in run_workers(fit_sparse, 2):
        for ours, expected in pairs:
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-14)


class Normed(Regression):
    def __init__(self):
        super().__init__()
        self.net = network()
        parametrizations.spectral_norm(self.net[0], n_power_iterations=3)
        parametrizations.weight_norm(self.net[2])

    def setup(self, stage):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def fit_normed():
    model = Normed()
    trainer(2, 8, max_epochs=4).fit(model, loader([20, 20]))
    return state_of(model)


def test_parametrizations():
    first, second = run_workers(fit_normed, 2)
    assert same([first, second])
    for name in ("_u", "_v"):
        assert 0.999 < first[f"net.0.parametrizations.weight.0.{name}"].norm() < 1.000001  # the mean of unit vectors
    model = Normed()
    model.load_state_dict(first)
    norm = torch.linalg.matrix_norm(model.eval().net[0].weight, 2).item()
    assert math.isclose(norm, 1, rel_tol=2e-3)
