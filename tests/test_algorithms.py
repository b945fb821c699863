"""Every algorithm, alone and combined, against its serial reference after every step."""

import math

import pytest
import torch

from tests.algorithms import algorithms, ends_of, mean_losses, rate_of, run_by_name, serial
from tests.models import same
from tests.workers import run_workers


@pytest.fixture(scope="module", params=[1, 2, 4])
def runs(request):
    """Return the number of workers, and what each of them found in one run of each algorithm."""
    workers = request.param
    return workers, run_workers(run_by_name, workers, workers, list(algorithms()), timeout=400)


@pytest.mark.parametrize("name", list(algorithms()))
def test_equals_the_serial_reference_after_every_step(runs, name):
    workers, ranks = runs
    algorithm = algorithms()[name]
    found = [rank[name] for rank in ranks]
    ends = found[0][1]
    assert all(other == ends for _, other, _ in found)
    if algorithm.lengths is not None:
        assert ends == ends_of(algorithm, workers)
    assert len([end for end in ends if end > algorithm.warmup]) >= 3 or "Epoch" in name or "AtEnd" in name
    for t, xs in enumerate(serial(algorithm, workers, ends), start=1):
        states = [trajectory[t - 1] for trajectory, _, _ in found]
        for x_i, state in zip(xs, states, strict=True):
            for key, value in x_i.state_dict().items():
                torch.testing.assert_close(state[f"net.{key}"], value, atol=1e-6, rtol=1e-5)
        if t in ends:
            assert same(states)
        elif workers > 1 and rate_of(algorithm, workers)(t):
            assert not same(states)


def test_adacomm_follows_the_loss(runs):
    _, ranks = runs
    _, ends, _ = ranks[0]["AdaComm"]
    losses = mean_losses([rank["AdaComm"][2] for rank in ranks])
    starts = [0, *ends]
    of_round = [math.fsum(losses[a:b]) / (b - a) for a, b in zip(starts, ends, strict=False)]
    length = 6
    for s, (start, end) in enumerate(zip(starts, ends, strict=False)):
        if s and start // 6 != starts[s - 1] // 6:
            wanted = math.ceil(math.sqrt(of_round[s - 1] / of_round[0]) * 6)
            length = wanted if wanted < length else math.ceil(length / 2)
        assert end == min(24, start + length)
    assert len(set(map(int.__sub__, ends, starts))) > 1
