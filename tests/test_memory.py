"""What an average needs beside the model: never more than `bucket_mb` allows, and what is kept from round to round."""

import itertools

import pytest
import torch
from torch import nn

from lightning_localsgd import LocalSGDStrategy, Mean
from tests.models import Constant, loader, trainer
from tests.workers import run_workers

MODEL, BUCKETS, GLOO = 16.0, 4.0, 4.0  # MiB


class Wide(Constant):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(int(MODEL * 2**18)))


def peak(means):
    """Return the most memory that tensors of the main thread have had at once in a run with each mean, in MiB."""
    found, alive = [], []  # what is freed in a later run would be taken from its memory
    for mean in means:
        strategy = LocalSGDStrategy(100 if mean is None else 2, mean=mean or Mean(BUCKETS))
        fit = trainer(2, strategy, max_epochs=-1, max_steps=6)
        with torch.profiler.profile(profile_memory=True) as profile:
            fit.fit(Wide(), loader([6] * 2))
        alive.append(fit)
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        found.append(max(itertools.accumulate(changes)) / 2**20)
    return found


CASES = [
    (Mean(BUCKETS), 0, 1),
    (Mean(BUCKETS, delay=1), 2, 1),
    (Mean(BUCKETS, wire="bfloat16"), 1, 1),
    (Mean(BUCKETS, wire="float16"), 1, 1),
    (Mean(BUCKETS, wire="int8"), 2.5, 3),
    (Mean(BUCKETS, wire="int4"), 2.5, 3),
    (Mean(BUCKETS, wire="int4", delay=1), 4.5, 3),
]


@pytest.fixture(scope="module")
def peaks():
    ranks = run_workers(peak, 2, [None, None, *(mean for mean, _, _ in CASES)], timeout=200)  # the first one warms up
    return [[found - rank[1] for found in rank[2:]] for rank in ranks]


@pytest.mark.parametrize("case", range(len(CASES)), ids=[str(mean) for mean, _, _ in CASES])
def test_an_average_needs_no_more_than_it_says(case, peaks):
    _, models, buckets = CASES[case]
    for rank in peaks:
        assert rank[case] < models * MODEL + buckets * BUCKETS + GLOO + 0.1  # headers and the like


def test_what_is_kept_from_round_to_round_is_there(peaks):
    kept = {str(mean): models for mean, models, _ in CASES}
    for rank in peaks:
        for (mean, _, _), found in zip(CASES, rank, strict=True):
            if not mean.delay:  # whose average makes its memories in another thread
                assert found > (kept[str(mean)] - 0.1) * MODEL - GLOO - 0.5  # which the run without may have had, too
