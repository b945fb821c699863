"""Data of every kind and length, with numbers known on paper: which batches each worker sees, and what is averaged."""

import itertools
import math

import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, Sampler

from tests.models import Constant, Regression, Trajectory, batch, rank, trainer
from tests.workers import run_workers

pytestmark = pytest.mark.filterwarnings("ignore:Some ranks have ended their fit")

ENDLESS = math.inf


class Numbers(IterableDataset):
    """0, 1, 2, ...: ``length`` numbers, or without an end, and without a length that Lightning could see."""

    def __init__(self, length):
        self.length = length

    def __iter__(self):
        return iter(itertools.count()) if self.length == ENDLESS else iter(range(self.length))


def loader(kind, length, **options):
    return DataLoader(list(range(length)) if kind == "map" else Numbers(length), batch_size=None, **options)


class Counts(Constant):
    """Gradient rank + 1 at each of its batches, which it writes down by epoch."""

    def __init__(self, loaders):
        super().__init__()
        self.loaders, self.asked, self.seen = loaders, 0, []

    def train_dataloader(self):
        self.asked += 1
        return self.loaders(self.trainer)

    def on_train_epoch_start(self):
        self.seen.append([])

    def training_step(self, batch, batch_idx):
        self.seen[-1].append(_plain(batch))
        return super().training_step(batch, batch_idx)


def _plain(batch):
    if isinstance(batch, list | tuple):
        return [_plain(part) for part in batch]
    return batch.tolist() if isinstance(batch, torch.Tensor) else batch


def walk(loaders, period=2, **options):
    """Fit; return the weight after each step and at the end, the batches seen in each epoch, and how they were made."""
    model, trajectory = Counts(loaders), Trajectory()
    mine = {name: value[rank()] if isinstance(value, list) else value for name, value in options.items()}
    trainer(2, period, callbacks=[trajectory], **mine).fit(model)
    return [*trajectory.column("weight"), "end", model.weight.item()], model.seen, model.asked


def own(kind, lengths):
    """Data of its own for each rank; lengths may differ with the epoch."""

    def loaders(trainer):
        mine = lengths[rank()]
        return loader(kind, mine[trainer.current_epoch] if isinstance(mine, list) else mine)

    return loaders


def combined(mode):
    """Two loaders of 2 and 3 batches on rank 0, and of 3 and 1 on rank 1."""
    parts = [[2, 3], [3, 1]]
    return lambda trainer: CombinedLoader([loader("map", length) for length in parts[rank()]], mode)


# name: (what each rank is given), what becomes of rank 0's weight, and of rank 1's. Gradients 1 and 2, period 2.
RUNS = {
    # Rank 1 ends at -2. At rank 0's second step the mean of -2 and -2 is -2; then rank 0 is alone.
    "iterable": (lambda: walk(own("iterable", [5, 1])), [-1, -2, -3, -4, -5, "end", -5], [-2, "end", -5]),
    "map": (lambda: walk(own("map", [5, 1])), [-1, -2, -3, -4, -5, "end", -5], [-2, "end", -5]),
    # The mean of -6 and -3, rank 0's after three steps alone and rank 1's before they agree at the end of the fit.
    "longer elsewhere": (lambda: walk(own("map", [1, 3])), [-1, "end", -4.5], [-2, -2.5, -4.5, "end", -4.5]),
    "limit": (lambda: walk(own("map", [5, 1]), limit_train_batches=3), [-1, -2, -3, "end", -3], [-2, "end", -3]),
    "share": (lambda: walk(own("map", [6, 2]), limit_train_batches=0.5), [-1, -2, -3, "end", -3], [-2, "end", -3]),
    "overfit": (lambda: walk(own("map", [5, 1]), overfit_batches=2), [-1, -2, "end", -2], [-2, "end", -2]),
    "endless, limit": (
        lambda: walk(own("iterable", [ENDLESS, ENDLESS]), limit_train_batches=3),
        [-1, -3, -4, "end", -4.5],
        [-2, -3, -5, "end", -4.5],
    ),
    # max_steps in mid-round: five steps are two rounds and a half.
    "endless, max_steps": (
        lambda: walk(own("iterable", [ENDLESS, ENDLESS]), max_steps=5, max_epochs=-1),
        [-1, -3, -4, -6, -7, "end", -7.5],
        [-2, -3, -5, -6, -8, "end", -7.5],
    ),
    # Rank 1 leaves at -5, in mid-round; rank 0 meets it there at its step 4, and goes on alone.
    "endless, max_steps earlier on one": (
        lambda: walk(own("iterable", [ENDLESS, ENDLESS]), max_steps=[5, 3], max_epochs=-1),
        [-1, -3, -4, -5, -6, "end", -6],
        [-2, -3, -5, "end", -6],
    ),
    # Rank 1's epoch ends at step 2 and would be followed by another one, but rank 0 ends the fit for all.
    "endless on one, max_steps": (
        lambda: walk(own("iterable", [ENDLESS, 2]), max_steps=5, max_epochs=-1),
        [-1, -3, -4, -5, -6, "end", -6],
        [-2, -3, "end", -6],
    ),
    # Three epochs of two batches in rounds of five: -5 and -10 meet at -7.5, one more step each at the end.
    "epochs shorter than a round": (
        lambda: walk(own("map", [2, 2]), period=5, max_epochs=3),
        [-1, -2, -3, -4, -7.5, -8.5, "end", -9],
        [-2, -4, -6, -8, -7.5, -9.5, "end", -9],
    ),
    # 3 and 1 batches, then 1 and 3. Rank 0's first step of the second epoch ends its round: -4 meets rank 1's -6.
    "reload": (
        lambda: walk(own("map", [[3, 1], [1, 3]]), max_epochs=2, reload_dataloaders_every_n_epochs=1),
        [-1, -2, -3, -5, "end", -7],
        [-2, -4, -5, -7, "end", -7],
    ),
    "reload, iterable": (
        lambda: walk(own("iterable", [[3, 1], [1, 3]]), max_epochs=2, reload_dataloaders_every_n_epochs=1),
        [-1, -2, -3, -5, "end", -7],
        [-2, -4, -5, -7, "end", -7],
    ),
    # 2 and 1 batches; 3 and 3.
    "min_size": (lambda: walk(combined("min_size")), [-1, -2, "end", -2], [-2, "end", -2]),
    "max_size": (lambda: walk(combined("max_size")), [-1, -3, -4, "end", -4.5], [-2, -3, -5, "end", -4.5]),
    "max_size_cycle": (lambda: walk(combined("max_size_cycle")), [-1, -3, -4, "end", -4.5], [-2, -3, -5, "end", -4.5]),
}
SEEN = {
    "map": ([[0, 1, 2, 3, 4]], [[0]]),
    "share": ([[0, 1, 2]], [[0]]),
    "overfit": ([[0, 1]], [[0]]),
    "endless, max_steps": ([[0, 1, 2, 3, 4]], [[0, 1, 2, 3, 4]]),
    "epochs shorter than a round": ([[0, 1]] * 3, [[0, 1]] * 3),
    "reload": ([[0, 1, 2], [0]], [[0], [0, 1, 2]]),
    "min_size": ([[[0, 0], [1, 1]]], [[[0, 0]]]),
    "max_size": ([[[0, 0], [1, 1], [None, 2]]], [[[0, 0], [1, None], [2, None]]]),
    "max_size_cycle": ([[[0, 0], [1, 1], [0, 2]]], [[[0, 0], [1, 0], [2, 0]]]),
}


def all_runs():
    return {name: run() for name, (run, *_) in RUNS.items()}


@pytest.fixture(scope="module")
def ends():
    return run_workers(all_runs, 2)


@pytest.mark.parametrize("name", RUNS)
def test_each_worker_steps_and_averages_as_on_paper(name, ends):
    _, *expected = RUNS[name]
    assert [worker[name][0] for worker in ends] == expected
    seen = [worker[name][1] for worker in ends]
    assert name not in SEEN or seen == list(SEEN[name])
    assert [len(list(itertools.chain(*mine))) for mine in seen] == [weights.index("end") for weights in expected]
    assert {worker[name][2] for worker in ends} == {2 if name.startswith("reload") else 1}


def fit_three():
    model = Counts(own("iterable", [2, 2, 0]))
    trainer(3, 2).fit(model)
    return model.weight.item(), model.seen


def test_a_worker_without_a_batch_takes_the_mean_of_the_others():
    # -2 and -4 meet at -3; rank 2 has never worked.
    assert run_workers(fit_three, 3) == [(-3.0, [[0, 1]]), (-3.0, [[0, 1]]), (-3.0, [[]])]


class Told(Sampler):
    """Writes down the epochs that it is told, and begins with them; fewer samples for rank 1."""

    def __init__(self):
        self.epoch, self.epochs = 0, []

    def set_epoch(self, epoch):
        self.epoch = epoch
        self.epochs.append(epoch)

    def __len__(self):
        return 3 - rank()

    def __iter__(self):
        return iter(range(self.epoch, self.epoch + len(self)))


class Backwards(Sampler):
    def __len__(self):
        return 8

    def __iter__(self):
        return iter(range(7, -1, -1))


DATA = list(range(8))


def sample():
    torch.manual_seed(3)  # a RandomSampler under Lightning's is of the user's seed
    told = Told()
    runs = {
        "shuffled": (DataLoader(DATA, 2, shuffle=True), True),
        "in order": (DataLoader(DATA, 2), True),
        "own, dealt": (DataLoader(DATA, 2, sampler=Backwards()), True),
        "own, not dealt": (DataLoader(DATA, 4, sampler=Backwards()), False),
        "told the epoch": (DataLoader(DATA, 1, sampler=told), False),
        "overfit": (DataLoader(DATA, 1, sampler=RandomSampler(DATA)), True),
    }
    seen = {}
    for name, (data, dealt) in runs.items():
        model = Counts(lambda trainer, data=data: data)
        options = {"overfit_batches": 2} if name == "overfit" else {}
        run = trainer(2, 3, max_epochs=2, use_distributed_sampler=dealt, **options)
        run.fit(model)
        seen[name] = [list(itertools.chain(*epoch)) for epoch in model.seen]
    return seen, told.epochs


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_samplers_deal_each_worker_its_samples():
    (first, first_epochs), (second, second_epochs) = run_workers(sample, 2)
    for worker, mine in enumerate([first, second]):
        reference = DistributedSampler(DATA, num_replicas=2, rank=worker, shuffle=True, seed=0)
        for epoch in range(2):
            reference.set_epoch(epoch)
            # Lightning shuffles the training data that it deals, also where the loader would not.
            assert mine["shuffled"][epoch] == mine["in order"][epoch] == list(reference)
            assert mine["own, dealt"][epoch] == [list(Backwards())[place] for place in reference]
    assert sorted(first["shuffled"][1] + second["shuffled"][1]) == DATA
    assert first["shuffled"][0] != first["shuffled"][1]
    assert first["own, not dealt"] == second["own, not dealt"] == [DATA[::-1]] * 2
    assert (first["told the epoch"], second["told the epoch"]) == ([[0, 1, 2], [1, 2, 3]], [[0, 1], [1, 2]])
    assert first_epochs == second_epochs == [0, 1]
    assert (first["overfit"], second["overfit"]) == ([[0, 2]] * 2, [[1, 3]] * 2)  # Lightning takes the shuffling out


class Validates(Regression):
    """Several validation loaders, of different lengths on each rank."""

    parts = ((3, 1), (2, 4))

    def __init__(self):
        super().__init__()
        self.losses = {0: [], 1: []}

    def train_dataloader(self):
        return DataLoader([batch(rank(), index) for index in range(4)], batch_size=None)

    def val_dataloader(self):
        return [
            DataLoader([batch(rank(), 100 + index) for index in range(length)], batch_size=None)
            for length in self.parts[rank()]
        ]

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        loss = self.loss(batch)
        self.losses[dataloader_idx].append(loss.item())
        self.log("val_loss", loss, sync_dist=True, batch_size=len(batch[0]))


def validate_uneven():
    model = Validates()
    run = trainer(2, 3, num_sanity_val_steps=0)
    run.fit(model)
    return model.losses, {name: value.item() for name, value in run.callback_metrics.items()}


def test_validation_loaders_in_sequence_may_be_uneven_too():
    (first, metrics), (second, others) = run_workers(validate_uneven, 2, timeout=60)
    for index in (0, 1):
        losses = first[index] + second[index]
        assert len(losses) == 5
        assert metrics[f"val_loss/dataloader_idx_{index}"] == pytest.approx(sum(losses) / len(losses))
    assert metrics == others


def refused():
    seen = []
    for loaders, options in [
        (lambda trainer: CombinedLoader([loader("map", 2), loader("map", 3)], "sequential"), {}),
        (own("iterable", [4, 2]), {"limit_train_batches": 0.5}),
        (own("iterable", [4, 2]), {"val_check_interval": 0.5, "limit_val_batches": 1}),
    ]:
        model = Counts(loaders)
        model.val_dataloader = lambda: loader("map", 1)
        model.validation_step = lambda batch, batch_idx: None
        try:
            trainer(2, 2, **options).fit(model)
        except (ValueError, MisconfigurationException) as error:
            seen.append(str(error))
    return seen


def test_what_lightning_cannot_do_with_a_loader_it_refuses_on_all_ranks():
    first, second = run_workers(refused, 2, timeout=60)
    assert first == second
    assert 'does not support the `CombinedLoader(mode="sequential")`' in first[0]
    assert "limit_train_batches" in first[1]
    assert "val_check_interval" in first[2]
