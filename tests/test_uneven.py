"""No rank ever waits for one that will not come: uneven data, and every way to leave an epoch or the fit."""

import os
import tempfile
from datetime import timedelta

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from tests.models import Constant, Regression, Trajectory, batch, loader, rank, same, state_of, trainer
from tests.workers import run_workers

# What happens in mid-epoch where some ranks have no more data is told once; the tests below bring it about on purpose.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Rank . reached a validation in mid-epoch"),
    pytest.mark.filterwarnings("ignore:Rank . has written"),
    pytest.mark.filterwarnings("ignore:Some ranks have ended their fit"),
    pytest.mark.filterwarnings("ignore:Total length of `.*Loader` across ranks is zero"),
]


class Logged(Regression):
    """Logs through everything that communicates: `sync_dist`, a metric, and both at epoch end."""

    def __init__(self):
        super().__init__()
        self.seen, self.val_seen = MeanMetric(), MeanMetric()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.seen(loss)
        self.log("seen", self.seen, on_step=False, on_epoch=True)
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.val_seen(self.loss(batch))
        self.log("val_seen", self.val_seen)


class Reloaded(Logged):
    """Makes its own loaders: ``kind`` of data, ``lengths[rank]`` batches in even epochs, one fewer in odd ones."""

    allow_zero_length_dataloader_with_multiple_devices = True

    def __init__(self, kind, lengths):
        super().__init__()
        self.kind, self.lengths = kind, lengths

    def train_dataloader(self):
        lengths = [max(0, length - self.trainer.current_epoch % 2) for length in self.lengths]
        if self.kind == "iterable":
            return loader(lengths)
        return DataLoader([batch(rank(), index) for index in range(lengths[rank()])], batch_size=None)

    def val_dataloader(self):
        return loader([2] * len(self.lengths))


def fit_drawn(case):
    options = dict(case["options"])
    callbacks = [ModelCheckpoint(f"{case['folder']}/{i}", **chosen) for i, chosen in enumerate(case["checkpoints"])]
    if case["stopping"]:
        callbacks.append(EarlyStopping(**case["stopping"]))
    run = trainer(
        len(case["lengths"]),
        case["period"],
        max_epochs=case["epochs"],
        callbacks=callbacks,
        enable_checkpointing=bool(case["checkpoints"]),
        **options,
    )
    model = Reloaded(case["kind"], case["lengths"])
    run.fit(model)
    return state_of(model), run.current_epoch, run.global_step


CHECKPOINTS = [
    {"every_n_train_steps": 2, "save_top_k": -1},
    {"every_n_train_steps": 3, "save_last": True},
    {"every_n_train_steps": 1, "save_top_k": 1, "monitor": "step", "mode": "max", "save_last": "link"},
    {"save_last": "link"},
    {"monitor": "val_loss", "save_top_k": 1},
    {"monitor": "val_loss", "save_top_k": 2, "save_last": True, "mode": "max"},
    {"monitor": "train_loss", "every_n_epochs": 1, "save_on_train_epoch_end": True},
    {"train_time_interval": timedelta(milliseconds=5), "save_top_k": -1},
    {"every_n_epochs": 2, "save_weights_only": True},
]
STOPPING = [
    {"monitor": "val_loss", "patience": 0, "mode": "max", "strict": False},
    {"monitor": "val_loss", "patience": 1, "check_on_train_epoch_end": True, "strict": False},
    {"monitor": "train_loss", "patience": 0, "mode": "max", "strict": False},
]


@st.composite
def uneven(draw):
    kind = draw(st.sampled_from(["iterable", "map"]))
    shortest = 1 if kind == "map" else 0  # Lightning refuses a loader of length zero
    lengths = draw(st.lists(st.integers(shortest, 17), min_size=2, max_size=4))
    options = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "val_check_interval": st.integers(1, 9),
                "check_val_every_n_epoch": st.integers(1, 2),
                "limit_val_batches": st.sampled_from([0, 1, 1.0]),
                "limit_train_batches": st.sampled_from([2, 5]),
                "max_steps": st.integers(1, 25),
                "accumulate_grad_batches": st.integers(2, 3),
                "reload_dataloaders_every_n_epochs": st.just(1),
            },
        )
    )
    known = [options.get("limit_train_batches", 17), *([length - 1 for length in lengths] if kind == "map" else [])]
    if options.get("val_check_interval", 0) > min(known):
        options.pop("val_check_interval", None)  # more than the batches of an epoch: Lightning refuses it
    return {
        "kind": kind,
        "lengths": lengths,
        "period": draw(st.integers(2, 9)),
        "epochs": draw(st.integers(1, 3)),
        "options": options,
        "checkpoints": draw(st.lists(st.sampled_from(CHECKPOINTS), max_size=2, unique_by=str)),
        "stopping": draw(st.none() | st.sampled_from(STOPPING)),
    }


def drawn(lengths, period, options, checkpoint, **more):
    """Return a case by hand."""
    case = {"kind": "iterable", "lengths": lengths, "period": period, "epochs": 2, "options": options}
    return {**case, "checkpoints": [checkpoint] if checkpoint else [], "stopping": None, **more}


@pytest.mark.drawn
@pytest.mark.filterwarnings("ignore:.*makes the workers wait for each other at every training step")
@pytest.mark.filterwarnings("ignore:`ModelCheckpoint.monitor=.*could not find")  # where `max_steps` comes first
@given(uneven())
@example(drawn([3, 17], 4, {"val_check_interval": 5}, {"every_n_train_steps": 5, "save_last": True}))
@example(drawn([17, 3], 4, {"val_check_interval": 5}, {"every_n_train_steps": 5, "save_last": True}))
@example(drawn([0, 6], 2, {}, {"save_last": True}))
@example(
    drawn([6, 0], 50, {"val_check_interval": 2}, {"every_n_train_steps": 2, "save_top_k": 2, "monitor": "val_loss"})
)
@pytest.mark.filterwarnings("ignore:.*could not find the monitored key")  # Lightning before 2.5.5 does not wait for it
def test_no_combination_of_lengths_hangs_and_all_end_equal(case):
    with tempfile.TemporaryDirectory() as folder:
        ends = run_workers(fit_drawn, len(case["lengths"]), {**case, "folder": folder}, timeout=120)
    assert same([state for state, _, _ in ends])
    assert len({epoch for _, epoch, _ in ends}) == 1
    if "max_steps" not in case["options"] and not case["stopping"]:
        assert ends[0][1] == case["epochs"]


class Leaves(Callback):
    """Rank ``who`` leaves its first epoch, or its fit, in one way after ``after`` batches."""

    def __init__(self, way, who, after=3):
        self.way, self.who, self.after = way, who, after

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_rank == self.who and trainer.current_epoch == 0 and batch_idx + 1 == self.after:
            trainer.should_stop |= self.way == "should_stop"

    def on_train_epoch_end(self, trainer, pl_module):
        if self.way == "stop_at_epoch_end" and trainer.global_rank == self.who:
            trainer.should_stop = True


class Skips(Logged):
    """Rank ``who`` skips the rest of the epoch (-1), or its last optimizer steps."""

    def __init__(self, way, who):
        super().__init__()
        self.way, self.who = way, who

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if self.way == "minus_one" and self.trainer.global_rank == self.who and batch_idx == 3 else None

    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        if self.way == "skipped_step" and self.trainer.global_rank == self.who and batch_idx >= 3:
            closure()
        else:
            optimizer.step(closure)


def fit_and_leave(way, who, period, validate):
    torch.manual_seed(rank())
    model = Skips(way, who)
    mine = int(os.environ["LOCAL_RANK"]) == who
    options = {"max_steps": 3} if way == "max_steps" and mine else {}
    lengths = [6, 6]
    if way == "no_batch":
        lengths[who] = 0
    if way == "last_batch":
        lengths[who] = 4
    run = trainer(2, period, max_epochs=2, callbacks=[Leaves(way, who)], **options)
    run.fit(model, loader(lengths), loader([2, 2]) if validate else None)
    return state_of(model), run.current_epoch


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize(
    "way",
    ["last_batch", "no_batch", "should_stop", "stop_at_epoch_end", "max_steps", "minus_one", "skipped_step"],
)
def test_a_rank_leaves_while_its_partner_goes_on(way, who):
    ends = run_workers(fit_and_leave, 2, way, who, 4, True, timeout=60)
    assert same([state for state, _ in ends])
    assert len({epoch for _, epoch in ends}) == 1


def weights_of(lengths, period, epochs=1):
    model, trajectory = Constant(), Trajectory()
    run = trainer(len(lengths), period, callbacks=[trajectory], max_epochs=epochs)
    run.fit(model, loader(lengths))
    return trajectory.column("weight"), model.weight.item()


def test_the_mean_is_over_those_who_worked_since_the_last_average():
    # Gradients 1 and 2, period 2. Rank 1 has one batch and ends at -2. At rank 0's step 2 both have worked: the mean of
    # -2 and -2 is -2. At its steps 4 and 5 it alone has worked: -4, then -5, which rank 1 takes over.
    long, short = run_workers(weights_of, 2, [5, 1], 2)
    assert long == ([-1, -2, -3, -4, -5], -5)
    assert short == ([-2], -5)


def test_rounds_run_on_over_the_end_of_an_epoch():
    # 3 batches an epoch, period 2: averages at steps 2, 4, 6 of the run, not at the end of the first epoch.
    first, second = run_workers(weights_of, 2, [3, 3], 2, 2)
    assert first[0] == [-1, -3, -4, -6, -7, -9]
    assert second[0] == [-2, -3, -5, -6, -8, -9]


class KeepsLosses(Logged):
    def __init__(self):
        super().__init__()
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss


def epoch_metrics(lengths):
    model = KeepsLosses()
    run = trainer(len(lengths), 4)
    run.fit(model, loader(lengths))
    return model.losses, {name: value.item() for name, value in run.callback_metrics.items()}


@pytest.mark.parametrize("lengths", [[2, 6], [6, 1], [0, 3]])
def test_the_metrics_of_an_epoch_are_over_the_data_of_all_ranks(lengths):
    ranks = run_workers(epoch_metrics, 2, lengths)
    losses = [loss for mine, _ in ranks for loss in mine]
    assert len(losses) == sum(lengths)
    for (mine, metrics), length in zip(ranks, lengths, strict=True):
        assert len(mine) == length
        if length:
            assert metrics["seen"] == pytest.approx(sum(losses) / len(losses))


class Sized(Regression):
    """May have a loader of length zero on some ranks."""

    allow_zero_length_dataloader_with_multiple_devices = True

    def train_dataloader(self):
        x = torch.randn(0 if self.trainer.global_rank == 1 else 12, 6)
        return DataLoader(TensorDataset(x, x[:, :1]), batch_size=4)


def fit_without_data():
    model = Sized()
    model.allow_zero_length_dataloader_with_multiple_devices = True
    run = trainer(2, 2, max_epochs=2)
    run.fit(model)
    return state_of(model), run.current_epoch


def test_a_loader_of_length_zero_is_an_epoch_without_a_batch():
    ends = run_workers(fit_without_data, 2)
    assert same([state for state, _ in ends])
    assert [epoch for _, epoch in ends] == [2, 2]


@pytest.mark.parametrize("lengths", [[5, 3], [3, 5], [4, 0]])
def test_uneven_data_while_gradients_are_averaged_is_one_error_on_all_ranks(lengths):
    ends = run_workers(weights_of, 2, lengths, 1, catch=True, timeout=60)
    assert {end.type for end in ends} == {"RuntimeError"}
    assert ends[0].message == ends[1].message
    assert "same number of batches on every rank" in ends[0].message
    short = min(range(2), key=lengths.__getitem__)
    assert f"rank {short} has no more data in this epoch" in ends[0].message
    assert f"at its step {min(lengths)}" in ends[0].message


class AllGathers(Regression):
    def training_step(self, batch, batch_idx):
        gathered = self.all_gather(torch.ones(1))
        assert gathered.shape == (2, 1)
        return super().training_step(batch, batch_idx)


def fit_gathering(lengths):
    trainer(2, 4).fit(AllGathers(), loader(lengths))


@pytest.mark.filterwarnings("ignore:torch.distributed.nn.functional.all_gather is deprecated")  # Lightning calls it
@pytest.mark.filterwarnings("ignore:A collective in `training_step`")
def test_all_gather_needs_all_ranks():
    assert run_workers(fit_gathering, 2, [3, 3]) == [None, None]
    ends = run_workers(fit_gathering, 2, [3, 2], catch=True, timeout=60)
    assert ends[0] == ends[1]
    assert "rank 0 calls `all_gather`" in ends[0].message


def fit_with_early_stopping(lengths):
    stopper = EarlyStopping("val_loss", patience=0, mode="max")  # the loss falls, so it stops at the second validation
    model = Logged()
    run = trainer(2, 3, max_epochs=5, callbacks=[stopper])
    run.fit(model, loader(lengths), loader([2, 2]))
    return state_of(model), run.current_epoch, stopper.stopped_epoch


@pytest.mark.parametrize("lengths", [[6, 6], [2, 7]])
def test_early_stopping_stops_all_in_the_same_epoch(lengths):
    ends = run_workers(fit_with_early_stopping, 2, lengths)
    assert same([state for state, _, _ in ends])
    assert ends[0][1:] == ends[1][1:]
    assert ends[0][1] < 5


def save_in_mid_epoch(lengths, folder):
    model = Logged()
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=1, monitor="step", mode="max")
    trainer(2, 4, callbacks=[saver], enable_checkpointing=True).fit(model, loader(lengths))
    return state_of(model)


@pytest.mark.parametrize("lengths", [[1, 7], [7, 1]])
def test_checkpoints_in_mid_epoch_are_written_by_a_rank_that_is_there(lengths, tmp_path):
    ends = run_workers(save_in_mid_epoch, 2, lengths, str(tmp_path))
    assert same(ends)
    assert [path.name for path in tmp_path.iterdir()] == ["step=6.ckpt"]
    checkpoint = torch.load(tmp_path / "step=6.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 6


def reduce_while_the_other_has_ended():
    class Reduces(Constant):
        def training_step(self, batch, batch_idx):
            ours = self.trainer.strategy
            results.append(
                [
                    ours.reduce(torch.tensor(3.0 + rank()), reduce_op="mean").item(),
                    ours.reduce(torch.tensor([2, 4]), reduce_op="sum").tolist(),
                    ours.reduce(torch.tensor(-7.0), reduce_op="max").item(),
                    ours.broadcast({"from": rank()}, src=0),
                    ours.reduce_boolean_decision(True, all=True),
                    ours.reduce_boolean_decision(False, all=False),
                ]
            )
            return super().training_step(batch, batch_idx)

    results = []
    trainer(2, 4).fit(Reduces(), loader([1, 2]))
    return results


@pytest.mark.filterwarnings("ignore:A collective in `training_step`")
def test_reductions_are_over_those_who_ask():
    first, second = run_workers(reduce_while_the_other_has_ended, 2)
    both = [3.5, [4, 8], -7.0, {"from": 0}, True, False]
    assert first == [both]
    assert second == [both, [4.0, [2, 4], -7.0, {"from": 1}, True, False]]
