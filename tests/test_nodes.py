"""Nodes as workers: their devices average gradients in each step, and one model a round leaves a node."""

import os

import torch

from lightning_localsgd import LocalSGDStrategy
from tests import reference
from tests.algorithms import Model, Watch, algorithms, ends_of, rate_of
from tests.models import batch, loader, network, optimizer, same, trainer
from tests.workers import run_workers

EPOCH = 8
SKIPPED = ("TimeVarying", "Listed")  # their learning rates have a test of their own


def as_nodes(devices: int) -> None:
    """Tell this process which device of which node it is."""
    process = int(os.environ["LOCAL_RANK"])
    os.environ.update(NODE_RANK=str(process // devices), LOCAL_RANK=str(process % devices))


def node_of(process: int, devices: int) -> int:
    return process // devices


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
    as_nodes(devices)
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
