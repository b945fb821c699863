"""The strategy against the serial algorithm, and against what is known on paper."""

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from tests import reference
from tests.models import Constant, Regression, Trajectory, batch, loader, network, optimizer, same, state_of, trainer
from tests.workers import run_workers


def fit(workers, period, module, module_options, length, **options):
    """Train `length` steps; return the states after each step and at the end."""
    model = module(**module_options)
    dtype = module_options.get("dtype", torch.float32)
    trajectory = Trajectory()
    strategy = DDPStrategy(find_unused_parameters=False) if period == "ddp" else period
    run = trainer(workers, strategy, callbacks=[trajectory], **options)
    run.fit(model, loader([length] * workers, dtype=dtype))
    return trajectory.states, state_of(model)


@pytest.mark.parametrize("workers", [2, 3, 4])
@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_equals_the_serial_algorithm_after_every_step(workers, name, dtype, tolerance):
    period, steps = 3, 8
    ranks = run_workers(fit, workers, workers, period, Regression, {"optimizer": name, "dtype": dtype}, steps)

    def loss(x, i, t):
        inputs, targets = batch(i, t - 1, dtype=dtype)
        return ((x(inputs) - targets) ** 2).mean()

    x = network(seed=0, dtype=dtype)
    serial = reference.pr_sgd(x, workers, period, steps, lambda x_i: optimizer(name, x_i.parameters()), loss)
    for t, xs in enumerate(serial, start=1):
        if t == steps and steps % period:
            states = [end for _, end in ranks]  # the last average follows the last step's hooks
        else:
            states = [trajectory[t - 1] for trajectory, _ in ranks]
        for x_i, state in zip(xs, states, strict=True):
            for key, value in x_i.state_dict().items():
                torch.testing.assert_close(state[f"net.{key}"], value, atol=tolerance, rtol=0)
        if t % period == 0 or t == steps:
            assert same(states)
        else:
            assert not same(states)


def paper(period, steps):
    model, trajectory = Constant(), Trajectory()
    trainer(2, period, callbacks=[trajectory]).fit(model, loader([steps] * 2))
    return trajectory.column("weight"), model.weight.item()


def test_two_workers_on_paper():
    # gradients 1 and 2, learning rate 1: -1, -2, -3 and -2, -4, -6, whose mean is -4.5; then -5.5 and -6.5, mean -6
    first, second = run_workers(paper, 2, 3, 4)
    assert first == ([-1, -2, -4.5, -5.5], -6)
    assert second == ([-2, -4, -4.5, -6.5], -6)
