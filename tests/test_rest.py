"""Runs that go on with other numbers of workers in the midst of an epoch: who gets which sample, each once."""

import itertools
import logging
import os
import pickle
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from filelock import FileLock  # which torch needs
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, RandomSampler

from lightning_localsgd import LocalSGDStrategy, Schedule
from lightning_localsgd._lightning import logged_step
from lightning_localsgd.rest import Deal, count_left, left_over, why_not
from tests.models import trainer
from tests.versions import WEIGHTS_ONLY
from tests.workers import run_workers


@st.composite
def changes(draw):
    """Draw how many samples there are, and for each deal of them its rule and how many each worker has had."""
    samples = draw(st.integers(0, 60))
    deals, cuts = [], []
    for _ in range(draw(st.integers(1, 4))):
        deal = Deal(draw(st.integers(1, 5)), draw(st.integers(1, 4)))
        size = deal.size(count_left(samples, cuts))
        batches = draw(st.lists(st.integers(0, 9), min_size=deal.workers, max_size=deal.workers))
        deals.append(deal)
        cuts.append([min(count * deal.batch, size) for count in batches])
    return samples, deals, cuts


@pytest.mark.drawn
@given(changes())
def test_through_any_changes_each_sample_is_dealt_once(drawn):
    samples, deals, cuts = drawn
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(samples)).tolist()
    had, padding = [], 0
    for done, (deal, cut) in enumerate(zip(deals, cuts, strict=True)):
        left = left_over(order, cuts[:done])
        assert left == [one for one in order if one in set(left)]  # the same permutation
        assert count_left(samples, cuts[:done]) == len(left)
        for worker, count in enumerate(cut):
            share = deal.share(left, worker)[:count]
            own = [one for place, one in enumerate(share) if worker + place * deal.workers < len(left)]
            had += own
            padding += len(share) - len(own)
        assert padding <= sum(deal.workers - 1 for deal in deals) or len(left) < deal.workers
    assert sorted(had + left_over(order, cuts)) == list(range(samples))


@pytest.mark.drawn
@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 7), st.booleans(), st.booleans())
def test_a_deal_is_that_of_torch(samples, workers, batch, drops_samples, drops_batch):
    deal = Deal(workers, batch, drops_samples, drops_batch)
    data = list(range(samples))
    for worker in range(workers):
        sampler = DistributedSampler(data, workers, worker, shuffle=False, drop_last=drops_samples)
        assert deal.share(data, worker) == list(sampler)
        assert deal.batches(samples) == len(DataLoader(data, batch, sampler=sampler, drop_last=drops_batch))


@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 9))
def test_the_same_workers_go_on_with_their_own_shares(samples, workers, had):
    left = left_over(range(samples), [[had] * workers])
    for worker in range(workers):
        assert left[worker::workers] == list(range(samples))[worker::workers][had:]


class Ids(Dataset):
    """Points, each with its id."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        x = torch.randn(6, generator=torch.Generator().manual_seed(index))
        return torch.tensor(index), x, x.sum().reshape(1)


class Seen(NamedTuple):
    """One batch of one worker."""

    epoch: int
    batch: int  # by Lightning's count
    batches: int  # of this epoch
    step: int
    logged: int  # what loggers take for the step
    rate: float
    ids: list[int]


class Notes(LightningModule):
    """Notes on which samples it was trained, which epochs have begun, and after which batches it was validated."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Linear(6, 1)
        self.seen, self.began, self.ended, self.validated = [], [], [], []

    def on_train_epoch_start(self):
        self.began.append(self.current_epoch)

    def on_train_epoch_end(self):
        self.ended.append(self.current_epoch)

    def loss(self, batch):
        _, x, y = batch
        return ((self.net(x) - y) ** 2).mean()

    def training_step(self, batch, batch_idx):
        rate = self.optimizers().param_groups[0]["lr"]
        batch_of = self.current_epoch, batch_idx, self.trainer.num_training_batches
        steps = self.global_step, logged_step(self.trainer)
        self.seen.append(Seen(*batch_of, *steps, rate, torch.atleast_1d(batch[0]).tolist()))
        return self.loss(batch)

    def on_validation_start(self):
        self.validated.append((self.seen[-1].epoch, self.seen[-1].batch))

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]  # each epoch


@dataclass(frozen=True)
class Left(Schedule):
    """Rounds of 4 steps; notes how many steps are left."""

    needs: ClassVar = frozenset({"steps_left"})
    noted: ClassVar[list[int]] = []

    def length(self, progress):
        self.noted.append(progress.steps_left)
        return 4


class Ends(Callback):
    """Ends a turn after so many batches; saves by hand on all ranks, or on rank 0 alone two batches earlier."""

    def __init__(self, after, saves, path):
        self.after, self.saves, self.path, self.batches = after, saves, path, 0

    def on_train_batch_end(self, trainer, *_):
        self.batches += 1
        first = self.saves == "first" and trainer.global_rank == 0 and self.batches == self.after - 2
        if first or (self.saves == "all" and self.batches == self.after):
            trainer.save_checkpoint(self.path)
        trainer.should_stop = self.batches >= self.after

    def on_validation_end(self, trainer, *_):
        if self.saves == "validated" and self.batches == self.after:
            trainer.save_checkpoint(self.path)


WORKERS = (4, 3, 3, 4)


@dataclass(frozen=True)
class Case:
    """A training in four turns, of 4, 3, 3 and 4 workers."""

    samples: int = 203
    batch: int | None = 4
    stops: tuple[int, ...] = (3, 6, 2)  # batches of each turn but the last
    saves: Any = "all"  # by hand; or "first", on rank 0; or when "validated"; or every so many steps
    lost: int = 0  # batches after the save, of each worker, or of rank 0 if it alone saves
    left_out: int = 0  # samples at the end of an epoch
    epochs: int = 2
    period: Any = 4
    more: int = 0  # samples from the second turn on
    in_order: bool = False  # by a sampler of the user's own, which leaves out samples that are too many
    data: dict[str, Any] = field(default_factory=lambda: {"shuffle": True})
    options: dict[str, Any] = field(default_factory=dict)
    checkpoint: str = "consensus"
    why: str = ""  # the rest cannot be dealt ...
    told: tuple[int, ...] = (1, 2, 3)  # ... in these turns


@dataclass
class Turn:
    """What one worker did in a turn."""

    seen: list[Seen]
    began: list[int]
    ended: list[int]
    validated: list[tuple[int, int]]
    loss: float  # of all samples in the end
    said: list[str]
    entry: dict[str, Any]  # in the checkpoint it went on from
    left: list[int]  # steps, at the start of each round


def fit(case, turn, folder):
    """Do one turn of a training, from the newest checkpoint of the one before."""
    resume = max(Path(folder, str(turn - 1)).glob("*.ckpt"), key=lambda path: path.stat().st_mtime) if turn else None
    model, callbacks = Notes(), []
    if turn < len(case.stops):
        callbacks.append(Ends(case.stops[turn], case.saves, f"{folder}/{turn}/by-hand.ckpt"))
        if isinstance(case.saves, int):
            options = {"save_top_k": -1, "every_n_train_steps": case.saves}
            callbacks.append(ModelCheckpoint(f"{folder}/{turn}", "{step}", **options))
    run = trainer(
        WORKERS[turn],
        LocalSGDStrategy(case.period, checkpoint=case.checkpoint),
        callbacks=callbacks,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        **({"use_distributed_sampler": True, "max_epochs": case.epochs, "num_sanity_val_steps": 0} | case.options),
    )
    Left.noted.clear()
    os.environ["PL_GLOBAL_SEED"] = str(turn)  # what Lightning's sampler shuffles by; for an epoch that is gone on with,
    torch.manual_seed(turn)  # neither must matter
    samples = case.samples + (case.more if turn else 0)
    own = {}
    if case.in_order:
        rank = int(os.environ["LOCAL_RANK"])
        own["sampler"] = DistributedSampler(Ids(samples), WORKERS[turn], rank, shuffle=False, drop_last=True)
    loader = DataLoader(Ids(samples), case.batch, **own, **case.data)
    validation = DataLoader(Ids(4)) if "val_check_interval" in case.options else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(model, loader, validation, ckpt_path=resume, **(WEIGHTS_ONLY if resume else {}))
    assert loader.sampler is own.get("sampler", loader.sampler)
    said = [str(one.message) for one in caught]
    said = [text for text in said if "gone on with" in text or "not resumable" in text or "exactly" in text]
    with torch.no_grad():
        loss = float(model.loss(next(iter(DataLoader(Ids(samples), samples)))))
    entry = torch.load(resume, weights_only=True)["lightning_localsgd"] if resume else {}
    return Turn(
        model.seen, model.began, model.ended, model.validated, loss, said, entry.get("rest", {}), list(Left.noted)
    )


def fit_all(cases, turn, folder):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return {name: fit(case, turn, f"{folder}/{number}") for number, (name, case) in enumerate(cases.items())}


PROCESSES = {"shuffle": True, "num_workers": 2}
CASES = {
    "shuffled": Case(),
    "loader processes": Case(stops=(15, 6, 2), data=PROCESSES),
    "in order, what is not full left out": Case(in_order=True, data={"drop_last": True}, left_out=15),
    "single samples": Case(samples=59, batch=None),
    "exact where it can be": Case(checkpoint="exact"),
    "gradients averaged": Case(period=1),
    "half of it": Case(options={"limit_train_batches": 0.5}, left_out=107),
    "accumulated, in the midst of a step": Case(stops=(3, 5, 3), lost=1, options={"accumulate_grad_batches": 2}),
    "saved earlier": Case(stops=(6, 6, 6), saves=4, lost=2),
    "one worker behind": Case(stops=(4, 4, 4), saves="first", lost=2),
    "the ends of epochs": Case(stops=(13, 17, 17), epochs=4, data=PROCESSES),
    "too little for a batch": Case(samples=52, stops=(1, 1, 1), data={"shuffle": True, "drop_last": True}, left_out=15),
    "validated": Case(saves="validated", options={"val_check_interval": 0.25}),
    "validated at the ends of epochs": Case(
        stops=(13, 17, 17), epochs=4, saves="validated", options={"val_check_interval": 1.0}
    ),
    "by the steps that are left": Case(period=Left(), checkpoint="exact"),
    "so many steps": Case(options={"max_steps": 15}, epochs=-1),
    "samplers of their own": Case(options={"use_distributed_sampler": False}, why="but by a `RandomSampler`"),
    "more data": Case(stops=(3, 16, 2), more=1, why="it had 203 samples and has 204", told=(1,)),
}


@pytest.fixture(scope="module")
def turns(tmp_path_factory):
    """The turns of all cases: by name, for each turn and worker; made once for all processes of this pytest."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    kept = tmp_path_factory.getbasetemp().parent / f"turns-{run}"
    with FileLock(f"{kept}.lock"):
        if not kept.exists():
            kept.write_bytes(pickle.dumps(all_turns(tmp_path_factory.mktemp("turns"))))
        found = pickle.loads(kept.read_bytes())
    return {name: [[worker[name] for worker in turn] for turn in found] for name in CASES}


def all_turns(folder):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Rank . has written")
        return [
            run_workers(fit_all, workers, CASES, turn, str(folder), timeout=400) for turn, workers in enumerate(WORKERS)
        ]


def of_epoch(turns, epoch, lost=lambda turn, worker: 0):
    """Return the ids of all batches of an epoch, but for so many at the end of each worker's turn."""
    return Counter(
        one
        for number, turn in enumerate(turns)
        for rank, worker in enumerate(turn)
        for seen in worker.seen[: len(worker.seen) - lost(number, rank)]
        if seen.epoch == epoch
        for one in seen.ids
    )


DEALT = [name for name, case in CASES.items() if not case.why]


@pytest.mark.parametrize("name", DEALT)
def test_each_sample_of_an_epoch_once_with_four_three_and_four_workers(name, turns):
    case, of = CASES[name], turns[name]

    def lost(turn, rank):
        return case.lost * (turn < 3 and (rank == 0 or case.saves != "first"))

    epochs = {seen.epoch for turn in of for worker in turn for seen in worker.seen}
    assert epochs == set(range(max(case.epochs, 1)))
    for epoch in epochs:
        kept, everything = of_epoch(of, epoch, lost), of_epoch(of, epoch)
        missing = case.samples - len(kept)
        assert missing == 0 if not case.left_out else 0 < missing <= case.left_out
        assert kept.total() - len(kept) < 4  # `DistributedSampler`'s padding, where the data of the epoch ends
        twice = everything.total() - kept.total()
        assert twice <= sum(workers * (case.batch or 1) * 4 for workers in WORKERS[:3])
        assert (twice > 0) == (case.lost > 0 and epoch == 0)


@pytest.mark.parametrize("name", CASES)
def test_it_is_said_once_where_the_rest_cannot_be_dealt(name, turns):
    why = CASES[name].why
    for number, turn in enumerate(turns[name]):
        for rank, worker in enumerate(turn):
            assert len(worker.said) == (why != "" and number in CASES[name].told and rank == 0), worker.said
    if why:
        assert why in turns[name][1][0].said[0]


@pytest.mark.parametrize("name", DEALT)
def test_lightnings_counts_are_those_of_an_epoch_with_so_many_workers(name, turns):
    case = CASES[name]
    before = -1
    for number, turn in enumerate(turns[name]):
        deal = Deal(WORKERS[number], case.batch or 1, case.in_order, case.data.get("drop_last", False))
        whole = deal.batches(case.samples)
        for worker in turn:
            assert {seen.batches for seen in worker.seen} == {int(whole * case.options.get("limit_train_batches", 1))}
            for one, next_one in itertools.pairwise(worker.seen):
                ends = one.batch + 1 == one.batches
                assert (next_one.epoch, next_one.batch) == ((one.epoch + 1, 0) if ends else (one.epoch, one.batch + 1))
            assert all(seen.logged == seen.step for seen in worker.seen)
            assert all(seen.rate == 0.05 * 0.5**seen.epoch for seen in worker.seen)
            began = [seen.epoch for seen in worker.seen if seen.batch == 0]
            assert worker.began == began
        if number == 3:
            assert all(worker.seen[-1].batch + 1 == worker.seen[-1].batches for worker in turn)
        step = turn[0].seen[0].step  # goes on where it was
        assert step <= before + 1
        before = turn[0].seen[-1].step


@pytest.mark.parametrize("name", DEALT)
def test_the_loss_goes_on_falling(name, turns):
    losses = [turn[0].loss for turn in turns[name]]
    assert losses == sorted(losses, reverse=True)
    for turn in turns[name]:
        assert len({worker.loss for worker in turn}) == 1


def test_what_is_left_is_of_the_same_permutation(turns):
    of = turns["in order, what is not full left out"]
    ids = [sorted(one for worker in turn for seen in worker.seen if not seen.epoch for one in seen.ids) for turn in of]
    assert list(itertools.chain(*ids)) == list(
        range(48 + 72 + 24 + 48)
    )  # of 203, dealt to four by full batches at last


def test_a_checkpoint_keeps_how_many_samples_all_have_had(turns):
    cuts = [turn[0].entry.get("cuts") for turn in turns["shuffled"]]
    assert cuts == [None, [[12] * 4], [[12] * 4, [24] * 3], [[12] * 4, [24] * 3, [8] * 3]]
    assert turns["exact where it can be"][3][0].entry["cuts"] == [[12] * 4, [32] * 3]  # in the third turn exactly
    assert turns["one worker behind"][1][0].entry["cuts"] == [[8, 16, 16, 16]]


def test_an_epoch_that_was_gone_on_with_in_the_dark_is_followed_by_ordinary_ones(turns):
    ids = of_epoch(turns["more data"], epoch=1)  # of which two batches in the second turn, and two in the third
    assert ids.keys() == set(range(204))
    assert ids.total() == 204


def test_what_was_to_be_done_at_the_end_of_an_epoch_after_its_validation_is_done(turns):
    found = [[worker.ended for worker in turn] for turn in turns["validated at the ends of epochs"]]
    assert found == [[[0]] * 4, [[0, 1]] * 3, [[1, 2]] * 3, [[2, 3]] * 4]
    found = [[worker.ended for worker in turn] for turn in turns["the ends of epochs"]]
    assert found == [[[0]] * 4, [[1]] * 3, [[2]] * 3, [[3]] * 4]  # as Lightning, which leaves it out


def test_validations_are_where_they_are_in_an_epoch_with_so_many_workers(turns):
    for number, turn in enumerate(turns["validated"]):
        every = int((13, 17, 17, 13)[number] * 0.25)
        for worker in turn:
            last = worker.seen[-1]
            due = [(seen.epoch, seen.batch) for seen in worker.seen if (seen.batch + 1) % every == 0 or seen is last]
            assert worker.validated == (due if number < 3 else due[:-1])  # a turn that is stopped ends with one


def test_it_is_known_how_many_steps_are_left(turns):
    whole, rest, exact, end = turns["by the steps that are left"]
    assert {worker.left[0] for worker in whole} == {2 * 13}
    assert {worker.left[0] for worker in rest} == {13 + 17}  # it goes on at batch 4 of 17
    assert {worker.left[0] for worker in exact} == {5 + 17}  # its first round is planned when it is stopped
    assert {worker.left[0] for worker in end} == {len(end[0].seen)} == {4 + 13}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(8))


class TwoByTwo:
    """Batches of a user's own."""

    def __iter__(self):
        return iter([[0, 1], [2, 3]])

    def __len__(self):
        return 2


@pytest.mark.parametrize(
    ("loader", "why"),
    [
        ([1, 2, 3], "a `list` has no indices"),
        (DataLoader(Stream()), "a `Stream` has no indices"),
        (DataLoader(Ids(4), batch_sampler=TwoByTwo()), "a `TwoByTwo` makes its own batches"),
        (DataLoader(Ids(4), sampler=RandomSampler(Ids(4))), "but by a `RandomSampler`"),
        (DataLoader(Ids(4), sampler=DistributedSampler(Ids(4), 3, 0)), "deals to 3"),
        (DataLoader(Ids(4), sampler=DistributedSampler(Ids(4), 2, 1)), None),
    ],
)
def test_what_can_be_dealt(loader, why):
    found = why_not(loader, 1, 2)
    assert found is None if why is None else why in found
