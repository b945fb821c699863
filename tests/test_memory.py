"""What an average needs beside the model: never more than `bucket_mb` allows, and what is kept from round to round."""

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


def peak(means, workers=2):
    """Return the most memory that tensors of the main thread have had at once in a run with each mean, in MiB."""
    return [min(run(mean, workers) for _ in range(4)) for mean in means]  # what Gloo's threads hold comes and goes


def run(mean, workers):
    fit = trainer(workers, LocalSGDStrategy(2, mean=mean), max_epochs=-1, max_steps=6)
    with torch.profiler.profile(profile_memory=True) as profile:
        fit.fit(Wide(), loader([6] * workers))
    return most(profile.profiler.kineto_results.experimental_event_tree()) / 2**20


def most(events):
    """Return the most bytes that were allocated at once, in pieces of a KiB and more, of those allocated here.

    What other threads, as Gloo's, free is not seen; but memory that is given out again has been freed.
    """
    changes = [event.typed[1] for event in sorted(every(events), key=lambda event: event.start_time_ns)]
    there, peak = {}, 0
    for start, size in ((change.ptr, change.alloc_size) for change in changes if abs(change.alloc_size) >= 1024):
        for at in [at for at, bytes_ in there.items() if at < start + abs(size) and start < at + bytes_]:
            del there[at]
        if size > 0:
            there[start] = size
            peak = max(peak, sum(there.values()))
    return peak


def every(events):
    """Yield all allocations of a tree of events."""
    for event in events:
        if event.name == "[memory]":
            yield event
        yield from every(event.children)


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
    ((alone,),) = run_workers(peak, 1, [Mean(BUCKETS)], 1)  # who averages nothing
    ranks = run_workers(peak, 2, [mean for mean, _, _ in CASES], timeout=300)
    return [[found - alone for found in rank] for rank in ranks]


@pytest.mark.parametrize("case", range(len(CASES)), ids=[str(mean) for mean, _, _ in CASES])
def test_an_average_needs_no_more_than_it_says(case, peaks):
    _, models, buckets = CASES[case]
    for rank in peaks:
        assert rank[case] < models * MODEL + buckets * BUCKETS + GLOO


def test_what_is_kept_from_round_to_round_is_there(peaks):
    kept = {str(mean): models for mean, models, _ in CASES}
    for rank in peaks:
        for (mean, _, _), found in zip(CASES, rank, strict=True):
            if not mean.delay:  # whose average makes its memories in another thread
                assert found > (kept[str(mean)] - 0.1) * MODEL - 0.5 + BUCKETS
