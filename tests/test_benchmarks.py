"""The benchmarks that need no particular machine: they run, and find what the documentation says."""

import math
import sys

import pytest

from tests.shell import ROOT, ok


@pytest.fixture(scope="module")
def rates():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import learning_rates

        yield learning_rates


def test_the_theory_holds():
    printed = ok(sys.executable, "-W", "error", ROOT / "benchmarks" / "theory.py", "--quick")  # exits with 1 if not
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith(("| a ", "| b ", "| c ", "| d "))]
    assert len(rows) == 9
    assert all(row[-1] == "yes |" for row in rows), printed


@pytest.mark.parametrize(
    ("at", "best", "asked"),
    [
        (1.0, 1.0, [1.0, 2.0, 0.5]),
        (2.0, 2.0, [1.0, 2.0, 4.0]),
        (8.0, 8.0, [1.0, 2.0, 4.0, 8.0, 16.0]),
        (0.25, 0.25, [1.0, 2.0, 0.5, 0.25, 0.125]),
        (1000.0, 16.0, [1.0, 2.0, 4.0, 8.0, 16.0]),  # no further than the limits
        (0.001, 0.125, [1.0, 2.0, 0.5, 0.25, 0.125]),
    ],
)
def test_the_search_climbs_to_the_best_multiple(rates, at, best, asked):
    seen = []

    def losses(multiple):
        seen.append(multiple)
        return [math.log2(multiple / at) ** 2 + noise for noise in (-0.1, 0.1)]

    assert rates.climb(losses, (1 / 8, 16)) == best
    assert seen == asked


def test_what_diverges_is_not_the_best(rates):
    assert rates.climb(lambda multiple: [math.inf if multiple > 1 else 1.0, 0.1], (1 / 2, 2)) == 1


def test_a_row_says_what_is_best_and_what_is_as_good(rates):
    scores = {
        multiple: [rates.Score(loss - 0.3, 10.0), rates.Score(loss + 0.3, 20.0)]
        for multiple, loss in ((0.5, 0.9), (1.0, 0.52), (2.0, 0.5), (4.0, 0.53), (8.0, 0.51))
    }
    assert rates.choice(scores, within=0.025) == (2, 1, 2)  # 8 is not next to those that are as good
    assert rates.choice(scores, within=0.0) == (2, 2, 2)
    assert rates.cells(scores, within=0.04) == ["2 (1 to 8)", "0.520; 15.00", "0.500; 15.00"]
    diverged = [rates.Score(math.inf, math.nan), rates.Score(0.4, 9.0)]
    assert rates.cells({1.0: diverged, 0.5: scores[0.5]}, within=0.0)[:2] == ["1/2", "diverged"]
    assert rates.cells({}, within=0.0) == ["-", "-", "-"]


def test_what_a_seed_does_to_all_rates_is_not_noise(rates):
    scores = {multiple: [rates.Score(loss, 1.0) for loss in (multiple, multiple + 5)] for multiple in (1.0, 2.0)}
    assert rates.noise([scores]) == 0
    scores[4.0] = [rates.Score(4.0, 1.0), rates.Score(9.2, 1.0)]  # the differences to multiple 1 are 3 and 3.2
    assert rates.noise([{1.0: scores[1.0], 4.0: scores[4.0]}]) == pytest.approx(0.1)
    scores[4.0][0] = rates.Score(math.inf, math.nan)
    assert rates.noise([scores]) == 0


def test_a_search_that_was_broken_off_goes_on(rates, tmp_path):
    def run(trial):
        return rates.Score(loss=abs(math.log2(trial.rate / 0.1)) + trial.seed, shown=1.0)

    found = rates.search("digits", quick=False, run=run)
    assert len(found) == 15 + 3
    for scores in found.values():
        assert list(scores) == [1.0, 2.0, 0.5]
        assert scores[2.0] == [rates.Score(1.0, 1.0), rates.Score(2.0, 1.0)]
    kept = rates.Kept(tmp_path / "kept")
    trial = rates.Trial("digits", rates.Setting(4, 8, "mean"), 0.1, True, 0, 8)
    assert kept.get(trial) is None
    kept.add(trial, rates.Score(math.inf, 2.0))
    again = rates.Kept(tmp_path / "kept")
    assert again.get(trial) == rates.Score(math.inf, 2.0)
    assert again.get(trial._replace(seed=1)) is None


def test_each_worker_takes_its_part_of_the_steps(rates):
    settings = rates.settings(quick=False)
    assert len(settings) == len(set(settings)) == 15
    assert set(rates.settings(quick=True)) <= set(settings)
    # Of 1,257 images 4 workers have 315 each, one of them twice; which are 21 batches of 15, in each of 8 passes.
    assert rates.steps_of(1257, rates.Setting(4, 8, "mean"), 15, 8) == 168
    trial = rates.Trial("digits", rates.Setting(4, 8, "post-local"), 0.1, True, 0, 8)
    assert rates.strategy(trial).schedule == rates.PostLocal(38, then=8)
