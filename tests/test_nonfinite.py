"""Replicas with NaN or infinite values: found before anything is sent, and never in a mean."""

import copy
import math
import os
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_localsgd import LocalSGDStrategy, Mean
from lightning_localsgd.finite import Finiteness, runs
from lightning_localsgd.replica import Replica, pieces
from tests.models import Constant, Trajectory, loader, rank, trainer
from tests.workers import run_workers

# -------------------------------------------------------------------------------------------------- which tensors count


def examine(finiteness, **tensors):
    views = [view for tensor in tensors.values() for view in pieces(tensor)]
    other = copy.deepcopy(finiteness)
    found = finiteness.examine(tensors.items())
    assert other.examine(tensors.items(), views) == found  # with a first look at all of them together
    assert other._once_finite == finiteness._once_finite
    return found


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.complex64,
        torch.complex128,
        torch.float8_e4m3fn,
    ],
)
def test_one_bad_element_is_found_in_every_dtype(dtype, value):
    fine, empty = torch.ones(3), torch.zeros(0, 3, dtype=dtype)
    x = torch.ones(40, dtype=dtype)
    finiteness = Finiteness()
    assert examine(finiteness, fine=fine, empty=empty, x=x) == (0, True)
    x[17] = value if dtype != torch.float8_e4m3fn else math.nan  # that has no infinity
    assert examine(finiteness, fine=fine, empty=empty, x=x) == (3, False)
    assert examine(finiteness, x=x.view(8, 5).t()[1:], fine=fine) == (0, False)  # another shape: another tensor
    if dtype != torch.float8_e4m3fn:  # which cannot be trained
        assert examine(Finiteness(), fine=fine, x=nn.Parameter(x)) == (2, False)  # a trained parameter counts at once


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_large_values_are_finite(dtype):
    x = torch.full((300,), torch.finfo(dtype).max, dtype=dtype)  # whose norm overflows
    assert examine(Finiteness(), x=nn.Parameter(x)) == (0, False)
    if dtype.itemsize >= 4:
        x[:150], x[150:] = math.sqrt(torch.finfo(dtype).max), -math.sqrt(torch.finfo(dtype).max)  # whose squares do
        assert examine(Finiteness(), x=nn.Parameter(x)) == (0, False)


def test_what_a_module_is_made_with_is_no_fault():
    finiteness, mask, lowest = Finiteness(), torch.full((3, 3), -math.inf).triu(1), torch.tensor(math.inf)
    frozen = nn.Parameter(torch.tensor([math.nan, 1.0]), requires_grad=False)
    assert examine(finiteness, mask=mask, lowest=lowest, frozen=frozen, count=torch.tensor(3)) == (0, False)
    lowest.fill_(0.5)
    larger = torch.full((4, 4), -math.inf).triu(1)
    assert examine(finiteness, mask=larger, lowest=lowest, frozen=frozen) == (0, False)
    lowest.fill_(math.nan)  # it has been finite, so this is new
    assert examine(finiteness, mask=larger, lowest=lowest, frozen=frozen) == (2, False)


def test_small_tensors_share_a_look_of_bounded_size():
    sizes = [0, 3, 0, 40_000, 25_533, 1, 100_000, 0, 7]
    views = [torch.empty(size) for size in sizes]
    assert runs(views) == [[0, 1, 2, 3, 4], [5], [6], [7, 8]]  # of 2^16 elements at most, or of one tensor
    assert runs([*views, torch.zeros(3, dtype=torch.int64)]) == runs(views)  # integers are finite
    assert runs([*views, torch.empty(3, dtype=torch.float64)]) == []  # of two kinds
    assert runs([torch.empty(3, device="meta")]) == runs([torch.empty(3, dtype=torch.float16)]) == runs([]) == []


def test_one_bad_element_is_found_among_many_small_tensors():
    sizes = torch.randint(0, 9000, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    module = nn.ParameterList(torch.ones(size) for size in [*sizes, 100_000, 1, 70_000, 0])
    module.register_buffer("count", torch.tensor(3))
    replica = Replica(module)
    assert replica.examine() == (0, True)
    for place, tensor in enumerate(module.parameters(), start=1):
        for element in {0, tensor.numel() - 1} if tensor.numel() else ():
            tensor.data[element] = math.nan
            assert replica.examine() == (place, False)
            tensor.data[element] = 1
    tensor.data = torch.tensor([math.nan])
    assert replica.examine() == (44, False)  # what is rebound is seen
    module.count = torch.full((2,), math.nan)
    tensor.data = torch.ones(2)
    assert replica.examine() == (0, False)  # a float buffer now, which has never been finite
    module.count.fill_(1)
    assert replica.examine() == (0, True)
    module.count.fill_(math.nan)
    assert replica.examine() == (45, False)


# ---------------------------------------------------------------------------------------------------------------- raise


class Poisoned(Constant):
    """The gradient of some ranks is NaN in some batches."""

    def __init__(self, when):
        super().__init__()
        self.register_buffer("mask", torch.full((2, 2), -math.inf).triu(1))
        self.when = when  # (rank, batch)
        self.seen = []  # in validation

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * math.nan if (rank(), batch_idx) in self.when else loss

    def validation_step(self, batch, batch_idx):
        self.seen.append(self.weight.item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=2.0, momentum=0.5)

    def on_train_start(self):
        self.optimizers().param_groups[0]["lr"] = 1.0  # a parameter group is not reset


class Overflows(Poisoned):
    """A buffer of rank 0 becomes infinite."""

    def __init__(self):
        super().__init__([])
        self.register_buffer("largest", torch.zeros(2))

    def training_step(self, batch, batch_idx):
        self.largest += math.inf if rank() == 0 and batch_idx == 1 else 1
        return super().training_step(batch, batch_idx)


def stop(model, mean, folder=None, lengths=(9, 9), **options):
    """Return how a fit of rounds of 3 steps ends."""
    callbacks = [ModelCheckpoint(folder, every_n_train_steps=3, save_top_k=-1)] if folder else []
    run = trainer(
        int(os.environ["WORLD"]),
        LocalSGDStrategy(3, mean=mean),
        callbacks=callbacks,
        enable_checkpointing=bool(folder),
        num_sanity_val_steps=0,
        **options,
    )
    with pytest.raises(RuntimeError) as error:
        run.fit(model, loader(list(lengths)), loader([1] * 2))
    return str(error.value), run.global_step, model.weight.item()


def stop_all(folder, world):
    os.environ["WORLD"] = str(world)
    if world == 1:
        return [stop(Poisoned([(0, 1)]), Mean(nonfinite="exclude"))]
    return [
        stop(Poisoned([(1, 4)]), Mean(), folder),  # at the end of the second round
        stop(Poisoned([(1, 4)]), Mean(), folder + "/5", val_check_interval=5),  # at a validation
        stop(Poisoned([(1, 4)]), Mean(), folder + "/8", max_steps=5),  # at the end of the fit
        stop(Poisoned([(1, 4), (0, 3)]), Mean(nonfinite="exclude")),  # nobody is left
        stop(Overflows(), Mean()),
        stop(Poisoned([(1, 1)]), Mean(), lengths=(9, 2), limit_val_batches=0),  # and it has no more data
    ]


def test_all_workers_stop_at_the_same_step_and_nothing_is_poisoned(tmp_path):
    first, second = run_workers(stop_all, 2, str(tmp_path), 2)
    assert [message for message, _, _ in first] == [message for message, _, _ in second]
    assert [step for _, step, _ in first[:-1]] == [step for _, step, _ in second[:-1]]
    at_round, at_validation, at_end, nobody_left, buffer, uneven = first
    # Rank 0, gradient 1, momentum 0.5: -1, -2.5, -4.25; rank 1 twice that; their mean -6.375; then on
    assert [at_round[2], at_validation[2], at_end[2]] == [-6.375 - 1.875 - 1.9375 - 1.96875] + 2 * [-6.375 - 3.8125]
    assert math.isnan(second[0][2])
    assert "at step 6 needs finite replicas" in at_round[0]
    assert "rank 1: `weight`. Nothing has been averaged" in at_round[0]
    assert "Mean(nonfinite='exclude')" in at_round[0]
    assert "at step 5" in at_validation[0]
    assert "at step 5" in at_end[0]
    assert "rank 0: `weight`; rank 1: `weight`." in nobody_left[0]
    assert "exclude" not in nobody_left[0]
    assert "at step 3" in buffer[0]
    assert "rank 0: `largest`." in buffer[0]
    assert "at step 3" in uneven[0]
    assert "rank 1: `weight`." in uneven[0]
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.ckpt"))
    assert files == [f"{folder}epoch=0-step=3.ckpt" for folder in ("5/", "8/", "")]
    for file in files:
        assert torch.load(tmp_path / file, weights_only=True)["state_dict"]["weight"].item() == -6.375


def test_one_worker_stops_too():
    (((message, _, _),),) = run_workers(stop_all, 1, "", 1)
    assert "at step 3" in message
    assert "rank 0: `weight`. Nothing" in message


# -------------------------------------------------------------------------------------------------------------- exclude


def exclude(when):
    model, trajectory = Poisoned(when), Trajectory()
    strategy = LocalSGDStrategy(3, mean=Mean(nonfinite="exclude"))
    run = trainer(2, strategy, callbacks=[trajectory], num_sanity_val_steps=0, val_check_interval=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(model, loader([9, 9]), loader([1, 1]))
    said = [str(warning.message) for warning in caught if "left out" in str(warning.message)]
    return trajectory.column("weight"), model.seen, said


def test_a_worker_that_is_left_out_restarts_from_the_mean_of_the_others():
    ends = run_workers(exclude, 2, [(1, 1), (1, 7)])
    (first, seen, said), (second, seen_by_second, said_by_second) = ends
    assert first[:3] == [-1, -2.5, -4.25]
    assert second[0] == -2
    assert math.isnan(second[1])
    assert second[2] == -4.25
    # Rank 0 goes on with its momentum 1.75, rank 1 starts with none.
    assert first[3:5] == [-4.25 - 1.875, -4.25 - 1.875 - 1.9375]
    assert second[3:5] == [-4.25 - 2, -4.25 - 2 - 3]
    assert first[5] == second[5] == -4.25 - (1.875 + 1.9375 + 1.96875 + 2 + 3 + 3.5) / 2
    assert first[8] == second[8] == first[7] - (2 - 2**-8)  # momentum after 9 steps with gradient 1
    # Validation after each step sees the mean of the finite ones, and leaves the other as it is.
    assert seen == seen_by_second
    assert seen[:3] == [-1.5, -2.5, -4.25]
    assert [message[: message.index("because")] for message in said] == [
        "Rank 1 was left out of the average at step 3, ",
        "Rank 1 was left out of the average at step 9, ",
    ]
    assert "its `weight` has a NaN" in said[0]
    assert said[0].endswith("restart 1 of this rank.")
    assert said[1].endswith("restart 2 of this rank.")
    assert said_by_second == []


def test_what_would_do_nothing_is_refused():
    for mean in (Mean(nonfinite="exclude"), Mean(frozen="skip")):
        with pytest.raises(ValueError, match="With a `period` of 1 gradients are averaged"):
            LocalSGDStrategy(1, mean=mean)
    with pytest.raises(ValueError, match="`nonfinite` must be 'raise' or 'exclude', got 'ignore'"):
        Mean(nonfinite="ignore")
    with pytest.raises(ValueError, match="`frozen` must be 'send' or 'skip', got None"):
        Mean(frozen=None)
