"""Every algorithm, alone and combined, against its serial reference after every step; from Python and from YAML."""

import math

import pytest
import torch

from lightning_localsgd import EveryEpoch, LocalSGDStrategy
from tests.algorithms import CONFIGS, Algorithm, algorithms, ends_of, from_yaml, mean_losses, rate_of, run, serial
from tests.models import Constant, Trajectory, loader, same, trainer
from tests.workers import run_workers


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_equals_the_serial_reference_after_every_step(workers):
    """All in one set of processes: most of the time goes into starting them."""
    ranks = run_workers(run, workers, workers, list(algorithms()), timeout=400)
    for name, algorithm in algorithms().items():
        found = [rank[name] for rank in ranks]
        _, ends, _ = found[0]
        assert all(other == ends for _, other, _ in found), name
        if algorithm.lengths is not None:
            assert ends == ends_of(algorithm, workers), name
        assert len([end for end in ends if end > algorithm.warmup]) >= 5 or name in (
            "EveryEpoch",
            "EveryEpoch(2)",
            "AtEnd",
        ), name
        for t, xs in enumerate(serial(algorithm, workers, ends), start=1):
            states = [trajectory[t - 1] for trajectory, _, _ in found]
            for x_i, state in zip(xs, states, strict=True):
                for key, value in x_i.state_dict().items():
                    torch.testing.assert_close(state[f"net.{key}"], value, atol=1e-6, rtol=1e-5, msg=f"{name}, {t}")
            if t in (*range(algorithm.warmup + 1), algorithm.steps) or (t in ends and not algorithm.mean.delay):
                assert same(states), (name, t)
            elif workers > 1 and rate_of(algorithm, workers)(t):
                assert not same(states), (name, t)
    losses = mean_losses([rank["AdaComm"][2] for rank in ranks])
    assert ranks[0]["AdaComm"][1] == adacomm(algorithms()["AdaComm"], losses)


def adacomm(algorithm: Algorithm, losses: list[float]) -> list[int]:
    """Return where AdaComm's rounds end, by its rule: every 6 steps ceil(sqrt(F_l / F_0) I_0), or half of the last."""
    ends, last, length, first = [], 0, 6, None
    while not ends or ends[-1] < algorithm.steps:
        start = ends[-1] if ends else 0
        if ends and start // 6 != last // 6:
            mean = math.fsum(losses[last:start]) / (start - last)
            wanted = math.ceil(math.sqrt(mean / first) * 6)
            length = wanted if wanted < length else math.ceil(length / 2)
        ends.append(min(algorithm.steps, start + length))
        if first is None:
            first = math.fsum(losses[: ends[0]]) / ends[0]
        last = start
    return ends


def test_from_yaml_it_is_the_same_as_from_python():
    ranks = run_workers(from_yaml, 2, timeout=240)
    assert [path.stem for path in CONFIGS] == list(ranks[0])
    for name, (asked, expected, by_yaml, by_python) in ranks[0].items():
        assert asked == expected, name
        assert same([by_yaml, ranks[1][name][2]]), name
        if "comm-budget" not in name:  # whose rounds follow the clock
            assert same([by_yaml, by_python]), name


class Leaves(Constant):
    """Leaves each pass before the batch of this index, of which Lightning tells nobody in advance."""

    def __init__(self, index):
        super().__init__()
        self.index = index

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == self.index else None


def passes(period, lengths, leaves):
    model, trajectory = Leaves(leaves), Trajectory()
    run = trainer(2, LocalSGDStrategy(period), callbacks=[trajectory], max_epochs=4)
    run.fit(model, loader(lengths))
    return trajectory.column("weight"), model.weight.item(), run.strategy._last.clock.round


@pytest.mark.parametrize("leaves", [None, 5, 2])
def test_a_round_of_passes_ends_with_the_longest_of_them(leaves):
    # Rank 0 moves by -1 and rank 1 by -2 in each of its steps: 3 and 7 of them in a pass, or 5 where it is left early,
    # or 2 on both, where neither has seen its last batch.
    steps = [min(leaves or 7, length) for length in (3, 7)]
    both = steps[0] + 2 * steps[1]
    (first, *end), (_, *other_end) = run_workers(passes, 2, EveryEpoch(), [3, 7], leaves)
    assert end == other_end == [-4 * both / 2, 4]
    if leaves != 2:
        assert first[:4] == [-1, -2, -both / 2, -both / 2 - 1]
    (first, *end), (_, *other_end) = run_workers(passes, 2, EveryEpoch(2), [3, 7], leaves)
    assert end == other_end == [-4 * both / 2, 2]
    if leaves != 2:
        assert first[:7] == [-1, -2, -3, -4, -5, -both, -both - 1]
