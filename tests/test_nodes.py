"""Nodes as workers: their devices average gradients in each step, and one model a round leaves a node."""

import os
import time
import warnings
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lightning_localsgd import DiLoCo, LocalSGDMonitor, LocalSGDStrategy, Mean, PostLocal
from tests import reference
from tests.algorithms import Model, Watch, algorithms, ends_of, rate_of
from tests.models import (
    Constant,
    Regression,
    Trajectory,
    batch,
    loader,
    network,
    optimizer,
    rank,
    same,
    state_of,
    trainer,
)
from tests.resume import Case, go_on
from tests.test_identities import Gan
from tests.workers import as_node, run_workers

EPOCH = 8
SKIPPED = ("TimeVarying", "Listed")  # their learning rates have a test of their own


def loss_of(devices):
    """Return the loss of a node: the mean of those of its devices."""

    def loss(x, i, t):
        losses = []
        for device in range(devices):
            inputs, targets = batch(devices * i + device, (t - 1) % EPOCH)
            losses.append(((x(inputs) - targets) ** 2).mean())
        return sum(losses) / devices

    return loss


def run(nodes, devices, names, **options):
    """Train each algorithm; return the models after each step and the steps after which rounds ended."""
    as_node(devices)
    found = {}
    for name in names:
        algorithm, watch = algorithms()[name], Watch()
        strategy = LocalSGDStrategy(
            algorithm.period,
            mean=algorithm.mean,
            outer=algorithm.outer,
            optimizer_state=algorithm.optimizer_state,
            replica="node",
        )
        fit = trainer(
            num_nodes=nodes,
            workers=devices,
            strategy=strategy,
            callbacks=[watch],
            max_epochs=-1,
            max_steps=algorithm.steps,
        )
        fit.fit(Model(algorithm), loader([EPOCH] * nodes * devices))
        found[name] = watch.states, sorted({start for start in watch.starts if start})
    return found


def test_equals_the_serial_reference_after_every_step():
    nodes, devices = 2, 2
    names = [name for name in algorithms() if name not in SKIPPED]
    ranks = run_workers(run, nodes * devices, nodes, devices, names, timeout=400)
    for name in names:
        algorithm = algorithms()[name]
        found = [rank[name] for rank in ranks]
        ends = found[0][1]
        assert all(other == ends for _, other in found), name
        if algorithm.lengths is not None:
            assert ends == ends_of(algorithm, nodes), name
        xs_of_steps = reference.restarted_sgd(
            network(seed=0),
            nodes,
            ends,
            algorithm.steps,
            lambda x_i, algorithm=algorithm: optimizer(algorithm.optimizer, x_i.parameters()),
            loss_of(devices),
            algorithm.begin,
            gamma=rate_of(algorithm, nodes),
            warmup=algorithm.warmup,
            state=algorithm.state,
            delay=algorithm.mean.delay,
        )
        for t, xs in enumerate(xs_of_steps, start=1):
            states = [trajectory[t - 1] for trajectory, _ in found]
            assert same(states[:2]), (name, t)
            assert same(states[2:]), (name, t)
            for x_i, state in zip(xs, states[::2], strict=True):
                for key, value in x_i.state_dict().items():
                    torch.testing.assert_close(state[f"net.{key}"], value, atol=1e-6, rtol=1e-5, msg=f"{name}, {t}")
            if t in (*range(algorithm.warmup + 1), algorithm.steps) or (t in ends and not algorithm.mean.delay):
                assert same(states), (name, t)
            elif rate_of(algorithm, nodes)(t):
                assert not same(states), (name, t)


class Norm(Regression):
    def __init__(self, name):
        super().__init__(name, norm=True)


WAYS = {
    "batch norm": (Norm, "momentum", {}, {}),
    "batch norm, accumulated": (Norm, "adamw", {}, {"accumulate_grad_batches": 4}),
    "two optimizers by hand": (Gan, "", {}, {}),
    "narrow": (Regression, "momentum", {}, {"precision": "bf16-true"}),
    "bfloat16": (Regression, "sgd", {"mean": Mean(wire="bfloat16")}, {}),
    "int8 with noise": (Norm, "adamw", {"mean": Mean(wire="int8", rounding="stochastic")}, {}),
    "int4 in small buckets": (Regression, "adamw", {"mean": Mean(2**-12, wire="int4")}, {}),
    "moments": (Regression, "adamw", {"optimizer_state": "average"}, {}),
}


def fit(nodes, devices, module, name, strategy, **options):
    as_node(devices)
    torch.manual_seed(3)
    model, trajectory = module(name), Trajectory()
    run = trainer(devices, strategy, num_nodes=nodes, callbacks=[trajectory], max_epochs=2, **options)
    run.fit(model, loader([6] * nodes * devices))
    return trajectory.states, state_of(model)


def in_ways(nodes, devices):
    return {
        way: fit(nodes, devices, module, name, LocalSGDStrategy(3, replica="node", **given), **options)
        for way, (module, name, given, options) in WAYS.items()
    }


def test_devices_are_equal_after_each_step_and_nodes_after_each_average():
    ranks = run_workers(in_ways, 4, 2, 2)
    for way in WAYS:
        for step, states in enumerate(zip(*(found[way][0] for found in ranks), strict=True), 1):
            if "accumulated" in way and step % 6 not in (4, 0):  # where buffers are those of each device
                continue
            assert same(list(states[:2])), (way, step)
            assert same(list(states[2:])), (way, step)
            if "accumulated" not in way:
                assert same(list(states)) == (step % 3 == 0), (way, step)
            if way == "batch norm":
                assert torch.equal(*(state["net.1.running_mean"] for state in states[1:3])) == (step % 3 == 0), step
        assert same([found[way][1] for found in ranks]), way
    exact = ranks[0]["bfloat16"]
    (other, *_) = run_workers(fit, 4, 2, 2, Regression, "sgd", LocalSGDStrategy(3, replica="node"))
    for state, full in zip(exact[0], other[0], strict=True):
        for key in full:
            torch.testing.assert_close(state[key], full[key], atol=2e-3, rtol=0)


def period_1(nodes, devices):
    as_node(devices)
    found = []
    for module, name, options in ((Regression, "adamw", {}), (Gan, "", {}), (Norm, "sgd", {})):
        ours = fit(nodes, devices, module, name, LocalSGDStrategy(1, replica="node"), **options)
        theirs = fit(nodes, devices, module, name, DDPStrategy(find_unused_parameters=True), **options)
        found.append((ours, theirs))
    return found


def test_period_1_is_ddp_over_all_devices():
    for regression, gan, norm in run_workers(period_1, 4, 2, 2):
        for ours, theirs in (regression, gan):
            assert all(same([one, other]) for one, other in zip(ours[0], theirs[0], strict=True))
            assert same([ours[1], theirs[1]])
        assert torch.equal(norm[0][1]["net.0.weight"], norm[1][1]["net.0.weight"])  # DDP keeps rank 0's buffers


def as_ever(devices):
    as_node(devices)
    nodes = 2
    plain = fit(nodes, devices, Norm, "adamw", LocalSGDStrategy(3))
    return plain, fit(nodes, devices, Norm, "adamw", LocalSGDStrategy(3, replica="node"))


def test_a_node_with_one_device_is_the_ordinary_case():
    for plain, nodes in run_workers(as_ever, 2, 1):
        assert all(same([one, other]) for one, other in zip(plain[0], nodes[0], strict=True))


def alone(devices):
    as_node(devices)
    ours = fit(1, devices, Regression, "adamw", LocalSGDStrategy(3, replica="node", mean=Mean(wire="int8", delay=1)))
    return ours, fit(1, devices, Regression, "adamw", DDPStrategy(find_unused_parameters=True))


def test_one_node_is_ddp_inside_it():
    for ours, ddp in run_workers(alone, 2, 2):
        assert all(same([one, other]) for one, other in zip(ours[0], ddp[0], strict=True))


class Watches(Callback):
    def __init__(self):
        self.means = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, index):
        if index % 2:
            with trainer.strategy.consensus():
                self.means.append(state_of(pl_module))


def looked_at(looks, folder, accumulate):
    as_node(2)
    model, trajectory, watches = Norm("adamw"), Trajectory(), Watches()
    options = {"callbacks": [trajectory], "accumulate_grad_batches": accumulate}
    if looks:
        saver = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")
        options |= {"callbacks": [trajectory, watches, saver], "val_check_interval": 2, "enable_checkpointing": True}
    run = trainer(2, LocalSGDStrategy(4, replica="node"), num_nodes=2, max_epochs=2, num_sanity_val_steps=0, **options)
    run.fit(model, loader([6] * 4), loader([2] * 4) if looks else None)
    return trajectory.states, watches.means


def both_looked_at(folder, accumulate):
    return looked_at(False, folder, accumulate), looked_at(True, folder, accumulate)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
def test_looking_changes_nothing(tmp_path, accumulate):
    ranks = run_workers(both_looked_at, 4, str(tmp_path), accumulate)
    for plain, looked in ranks:
        assert all(same([one, other]) for one, other in zip(plain[0], looked[0], strict=True))
    for step, means in enumerate(zip(*(looked[1] for _, looked in ranks), strict=True), 1):
        assert same(list(means))
        states = [plain[0][2 * step - 1] for plain, _ in ranks]
        for key, value in means[0].items():
            if value.is_floating_point():
                torch.testing.assert_close(value, sum(state[key] for state in states) / 4)


def uneven(lengths):
    as_node(2)
    model = Constant()
    run = trainer(2, LocalSGDStrategy(2, replica="node"), num_nodes=2)
    run.fit(model, loader(lengths))
    return model.weight.item()


def test_nodes_may_have_uneven_data():
    # The gradients of the nodes are 1.5 and 3.5; both take 2 steps, then the first 2 and the other 1, then the first 1.
    second_round = (-5 - 2 * 1.5 + -5 - 3.5) / 2
    assert run_workers(uneven, 4, [5, 5, 3, 3]) == [second_round - 1.5] * 4


def test_devices_of_a_node_may_not():
    told = run_workers(uneven, 4, [4, 3, 4, 4], catch=True)
    assert all(one.type == "RuntimeError" for one in told)
    for one in told[:2]:
        assert (
            "The devices of a node average gradients and need the same number of batches on every rank" in one.message
        )
        assert "rank 0 starts a training step at its step 3 while rank 1 has no more data in this epoch" in one.message
        assert 'take `replica="device"` for uneven data' in one.message


class Asks(LightningModule):
    """Optimizes by hand, and in the last step of the warm-up one rank asks all for something."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.weight = nn.Parameter(torch.zeros(1))

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward((rank() + 1) * self.weight.sum())
        optimizer.step()
        if index == 1 and rank() == 1:
            time.sleep(0.5)  # its mate has gone on by then
            self.trainer.strategy.reduce(torch.ones(1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def asking():
    as_node(2)
    model, strategy = Asks(), LocalSGDStrategy(PostLocal(2, then=2), replica="node", timeout=timedelta(seconds=10))
    trainer(2, strategy, num_nodes=2).fit(model, loader([6, 6, 4, 4]))
    return model.weight.item()


def test_one_rank_may_ask_where_gradients_give_way_to_models():
    # Two steps of 2.5; the nodes' gradients are 1.5 and 3.5, two steps of both, and two more of the first.
    assert run_workers(asking, 4) == [-5 - 2 * 2.5 - 2 * 1.5] * 4


class Breaks(Constant):
    """The parameter of one device becomes NaN, which its mates do not have."""

    def on_train_batch_start(self, batch, index):
        if rank() == 1 and index == 1:
            with torch.no_grad():
                self.weight.fill_(torch.nan)


def broken(nonfinite):
    as_node(2)
    model = Breaks()
    strategy = LocalSGDStrategy(2, replica="node", mean=Mean(nonfinite=nonfinite))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(2, strategy, num_nodes=2).fit(model, loader([2] * 4))
    return model.weight.item(), [str(one.message) for one in caught if "left out" in str(one.message)]


def test_a_node_with_a_bad_device_is_left_out_as_a_whole():
    ranks = run_workers(broken, 4, "exclude")
    assert [value for value, _ in ranks] == [-7.0] * 4  # two steps of the other node, of 3.5 each
    assert len(ranks[0][1]) == 1
    assert "Rank 1 was left out" in ranks[0][1][0]
    told = run_workers(broken, 4, "raise", catch=True)
    assert all("rank 1: `weight`" in one.message and "rank 0" not in one.message for one in told)


def told(nodes, devices):
    as_node(devices)
    heard, spreads, monitor = [], [], LocalSGDMonitor()

    class Ears(Callback):
        def setup(self, trainer, pl_module, stage):
            trainer.strategy.listen(heard.append, spreads.append)

    run = trainer(devices, LocalSGDStrategy(3, replica="node"), num_nodes=nodes, callbacks=[Ears(), monitor])
    run.fit(Regression(), loader([6] * nodes * devices))
    return heard, spreads, run.strategy.workers


def test_what_is_told_is_of_workers():
    model = 4 * (6 * 8 + 8 + 8 + 1)
    for heard, spreads, workers in run_workers(told, 4, 2, 2):
        assert workers == 2
        assert [one.steps for one in heard] == [3, 3]
        assert [one.sent for one in heard] == [model, model]  # 2 (N - 1) / N of the model, of two nodes
        assert all(len(one.step_seconds) == 2 for one in heard)
        assert all(len(one.apart) == 2 and one.apart[0] == pytest.approx(one.apart[1]) for one in spreads)


def on_nodes(devices, num_nodes, places):
    node, device = places[int(os.environ["PROCESS"])]
    os.environ.update(NODE_RANK=str(node), LOCAL_RANK=str(device))
    strategy = LocalSGDStrategy(3, replica="node", cluster_environment=Placed(3))
    trainer(devices, strategy, num_nodes=num_nodes).fit(Regression(), loader([2] * len(places)))


class Placed(LightningEnvironment):
    """A launcher that knows its ranks, however they are placed."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def global_rank(self):
        return int(os.environ["PROCESS"])

    def world_size(self):
        return self.size

    def set_global_rank(self, rank):
        pass

    set_world_size = set_global_rank


def test_nodes_have_as_many_devices():
    for one in run_workers(on_nodes, 3, 2, 2, [(0, 0), (0, 1), (1, 0)], catch=True):
        assert one.type == "ValueError"
        assert "same number of devices on each node, got 2 on node 0, 1 on node 1" in one.message


def test_the_trainer_knows_their_number():
    for one in run_workers(on_nodes, 3, 2, 2, [(0, 0), (1, 0), (2, 0)], catch=True):
        assert one.type == "ValueError"
        assert "`Trainer(num_nodes=...)` must be the number of nodes, 3, got 2" in one.message


def swapped(wire):
    """The second two ranks are node 0, as MPI may count them; their data are shorter than the others'."""
    process = int(os.environ["PROCESS"])
    os.environ.update(NODE_RANK=str(1 - process // 2), LOCAL_RANK=str(process % 2))
    environment = Placed(4)
    strategy = LocalSGDStrategy(2, replica="node", mean=Mean(wire=wire), cluster_environment=environment)
    model = Constant()
    trainer(2, strategy, num_nodes=2).fit(model, loader([6, 6, 2, 2]))
    return model.weight.item()


def test_nodes_may_be_counted_in_another_order_than_ranks():
    # Both take 2 steps of 1.5 and 3.5; then the ranks 0 and 1 take 4 more.
    for wire in ("float32", "int8"):
        assert run_workers(swapped, 4, wire) == pytest.approx([-5 - 4 * 1.5] * 4, abs=0.01)


@pytest.mark.parametrize(("option", "value"), [("replica", "host"), ("replica", None)])
def test_it_is_one_of_two(option, value):
    with pytest.raises(ValueError, match=r'`replica` must be "device" or "node", got'):
        LocalSGDStrategy(**{option: value})


def test_paces_are_of_devices():
    with pytest.raises(ValueError, match=r'`pace` must be .equal. with `replica="node"`, whose devices step together'):
        LocalSGDStrategy(replica="node", pace="proportional")


def lbfgs():
    as_node(2)
    run = trainer(2, LocalSGDStrategy(3, replica="node"), num_nodes=1)
    run.fit(Regression("lbfgs"), loader([2] * 2))


def test_lbfgs_is_refused_where_gradients_are_averaged():
    for one in run_workers(lbfgs, 2, catch=True):
        assert one.type == "ValueError"
        assert "LBFGS needs workers of one device" in one.message


EVERY = {"every_n_train_steps": 3}


def go_on_with(cases, folder):
    return {name: go_on(case, f"{folder}/{number}", EVERY, other) for number, (name, (case, other)) in enumerate(cases)}


@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
def test_a_run_goes_on_bit_for_bit(tmp_path):
    node = Case(workers=4, devices=2, kind="norm", epochs=2)
    cases = {
        "plain": (node, None),
        "int8 in flight": (replace(node, mean=Mean(wire="int8", delay=2), outer=DiLoCo()), None),
        "after a warm-up": (replace(node, period=PostLocal(3, then=4)), None),
        "other replicas": (node, replace(node, devices=0)),
    }
    for found in run_workers(go_on_with, 4, list(cases.items()), str(tmp_path), timeout=240):
        for name, resumes in found.items():
            for one in resumes:
                if name == "other replicas":
                    assert one.differ
                    assert "new round at the consensus" in "".join(one.said) or one.said == []
                else:
                    assert not one.differ, (name, one)
                    assert not one.said, (name, one)
