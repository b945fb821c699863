"""Who may join: whoever differs is refused on all ranks, by rank and difference, before anything of a model is sent."""

import os
import time
import zlib
from dataclasses import fields
from datetime import timedelta

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_localsgd import (
    AverageState,
    DiLoCo,
    EveryEpoch,
    LocalSGDStrategy,
    Mean,
    Outer,
    Proportional,
    Schedule,
    fingerprint,
    header,
)
from lightning_localsgd.fingerprint import words
from tests.models import Constant, Regression, loader, state_of, trainer
from tests.versions import WEIGHTS_ONLY
from tests.workers import run_workers

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
ODD = 2  # of three ranks


def local_rank():
    return int(os.environ["LOCAL_RANK"])


class Reports:
    """What a run on this rank says when it is refused, and that its model is as it was."""

    def __init__(self):
        self.said = []

    def __call__(self, run, module, *args, **options):
        before = state_of(module)
        with pytest.raises(RuntimeError) as error:
            run(module, *args, **options)
        after = state_of(module)
        assert all(torch.equal(before[name], after[name]) for name in before)
        self.said.append(str(error.value))


class Started(Regression):
    """Begins with another model on each rank, before `setup`, so that one that is sent would be seen."""

    def __init__(self):
        super().__init__()
        with torch.no_grad():
            self.net[0].bias.fill_(local_rank())

    def setup(self, stage):
        pass


class More(Started):
    def __init__(self):
        super().__init__()
        if local_rank() == ODD:
            self.net[2] = torch.nn.Linear(8, 2)


def lr_of(name):
    return torch.optim.SGD if name == "sgd" else torch.optim.Adam


SETTINGS = [
    ({"period": 8}, {"period": 4}, "`period` is Every(period=4) where rank 0's is Every(period=8)"),
    ({"period": 8}, {"period": EveryEpoch()}, "`period` is EveryEpoch("),
    ({}, {"mean": Mean(bucket_mb=8)}, "`bucket_mb` is 8 where rank 0's is 64"),
    ({}, {"mean": Mean(nonfinite="exclude")}, f"`mean` is {Mean(nonfinite='exclude')!r}"),
    ({}, {"outer": DiLoCo()}, "`outer` is "),
    ({"outer": DiLoCo()}, {"outer": Outer(torch.optim.SGD)}, "`outer` is "),
    ({}, {"optimizer_state": "reset"}, "`optimizer_state` is reset where rank 0's is keep"),
    ({"optimizer_state": "average"}, {"optimizer_state": AverageState(2)}, "AverageState(every=2) where rank 0's is"),
    ({}, {"pace": "proportional"}, "`pace` is Proportional(speeds=None, average='uniform') where rank 0's is None"),
    ({}, {"pace": Proportional((1, 1, 2))}, "`pace` is Proportional(speeds=(1, 1, 2), average='uniform')"),
    ({}, {"checkpoint": "exact"}, "`checkpoint` is exact where rank 0's is consensus"),
]


def join(folder):
    """Try one run after the other in which the odd rank differs; return what this rank heard each time."""
    reports, odd = Reports(), local_rank() == ODD
    for usual, other, _ in SETTINGS:
        strategy = LocalSGDStrategy(**(usual | other if odd else usual))
        reports(trainer(3, strategy).fit, Started(), loader([4, 4, 4]))
    for run in ("fit", "validate"):
        reports(getattr(trainer(3), run), More(), loader([4, 4, 4]))
    reports(getattr(trainer(3), "validate" if odd else "fit"), Started(), loader([4, 4, 4]))

    saved = trainer(3, max_steps=4)
    saved.fit(Regression(), loader([4, 4, 4]))
    saved.save_checkpoint(f"{folder}/4.ckpt")
    torch.distributed.barrier()
    if odd:
        later = torch.load(f"{folder}/4.ckpt", weights_only=True) | {"global_step": 5}
        torch.save(later, f"{folder}/5.ckpt")
    for one, other in ((f"{folder}/4.ckpt", None), (f"{folder}/4.ckpt", f"{folder}/5.ckpt")):
        for run in ("fit", "validate"):
            path = other if odd else one
            reports(getattr(trainer(3), run), Started(), loader([4, 4, 4]), ckpt_path=path, **WEIGHTS_ONLY)
    return reports.said


def test_whoever_differs_is_refused_on_all_ranks_by_rank_and_difference(tmp_path):
    first, *others = run_workers(join, 3, str(tmp_path))
    assert all(other == first for other in others)
    start = f"All workers must run the same setting, and rank {ODD}'s "
    settings, (model, evaluated, run, *paths) = first[: len(SETTINGS)], first[len(SETTINGS) :]
    for said, (_, _, expected) in zip(settings, SETTINGS, strict=True):
        assert said.startswith(start)
        assert expected in said
        assert said.count("\n") == 0
    for said in (model, evaluated):
        assert f"the parameters and buffers of rank {ODD} differ from those of rank 0: its `net.2.weight`" in said
    assert run == start + "`run` is validate where rank 0's is fit."
    assert paths[:2] == [start + "`ckpt_path` is not given where rank 0's is given."] * 2
    assert len(paths) == 4
    for said in paths[2:]:
        assert said.startswith(start + "`ckpt_path` is of step 5 in epoch ")
        assert " where rank 0's is of step 4 in epoch " in said


class OwnWords(Schedule):
    """Has the `repr` that Python gives it, with an address."""

    def __init__(self, rule):
        self.rule = rule

    def length(self, progress):
        return 2


def fit_nameless():
    trainer(2, LocalSGDStrategy(OwnWords(lambda: 2), outer=Outer(lambda p: torch.optim.SGD(p, 1.0)))).fit(
        Constant(), loader([4, 4])
    )
    return True


def test_addresses_in_a_repr_are_no_difference():
    assert all(run_workers(fit_nameless, 2))
    assert words(OwnWords(1)) == words(OwnWords(2)) == "<tests.test_join.OwnWords object>"
    assert words(lr_of) == "<function lr_of>"


def fit_other_version():
    if local_rank() == 1:
        fingerprint.PROTOCOL = header.PROTOCOL + 1
        header.Message.row = lambda self: torch.zeros(1000, dtype=torch.int64)  # never asked for
    began = time.monotonic()
    reports = Reports()
    reports(trainer(3).fit, Started(), loader([4, 4, 4]))
    return reports.said, time.monotonic() - began


def test_another_version_is_refused_before_any_message_of_another_size():
    for said, seconds in run_workers(fit_other_version, 3):
        assert said == [
            "All workers must speak one protocol, that is have one version of lightning_localsgd, and rank 1's "
            f"protocol is {header.PROTOCOL + 1} where rank 0's is {header.PROTOCOL}."
        ]
        assert seconds < 20


def fit_beside_a_stranger():
    limit = timedelta(seconds=4)
    strategy = DDPStrategy(timeout=limit) if local_rank() == 1 else LocalSGDStrategy(timeout=limit)
    trainer(3, strategy).fit(Started(), loader([4, 4, 4]))


def test_a_worker_of_another_strategy_is_named_when_the_time_is_over():
    ends = run_workers(fit_beside_a_stranger, 3, catch=True, timeout=60)
    named = "within the `timeout` of the strategy (0:00:04) rank 1 has not said that it is a worker of"
    left = "another worker has left; see the first error above"  # whose time was over a moment before
    why = [ends[me].message.partition(f"Rank {me}, which joins the run, cannot go on, because ")[2] for me in (0, 2)]
    assert all(one.startswith((named, left)) for one in why), ends
    assert any(one.startswith(named) for one in why), ends
    assert ends[1].type != "died"


def test_the_protocol_is_raised_with_what_travels():
    """If this is red, raise `PROTOCOL` in header.py by one, and put both numbers here."""
    travels = [
        [(want.name, want.value) for want in header.Want],
        [field.name for field in fields(header.Message)],
        [field.name for field in fields(header.Report)],
    ]
    assert (header.PROTOCOL, zlib.crc32(repr(travels).encode())) == (2, 2746471519)
