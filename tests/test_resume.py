"""A run that goes on from an exact checkpoint is, bit for bit, the run that was not stopped."""

import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from lightning_localsgd import (
    QSR,
    AdaComm,
    AtEnd,
    AverageState,
    DiLoCo,
    DriftLimit,
    EveryEpoch,
    LocalSGDStrategy,
    Mean,
    Outer,
    PostLocal,
    Proportional,
    SlowMo,
    Stages,
)
from lightning_localsgd.place import Follower, random_state, set_random_state
from tests.resume import Case, go_on, later, run
from tests.workers import run_workers

# Lightning's and the callbacks' words on resuming are recorded by `go_on`, and looked at.
pytestmark = [
    pytest.mark.filterwarnings("ignore:It is recommended to use `self.log"),
    pytest.mark.filterwarnings("ignore:Rank . has written"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata 0.11 with torch 2.13
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork"),
]

EVERY = {"every_n_train_steps": 3}
WORKERS = {"shuffle": True, "num_workers": 2}
DEALT = {"use_distributed_sampler": True}
CASES = {
    "shuffled, random transforms": (Case(transform=True), EVERY),
    "loader processes": (Case(data=WORKERS, epochs=2), {"every_n_train_steps": 5}),
    "processes that persist": (Case(data=WORKERS | {"persistent_workers": True}, epochs=2), {"every_n_train_steps": 5}),
    "Lightning's sampler": (Case(options={"use_distributed_sampler": True}), {"every_n_train_steps": 2}),
    "Lightning's sampler, processes": (
        Case(options={"use_distributed_sampler": True}, data=WORKERS),
        {"every_n_train_steps": 3},
    ),
    "a generator of its own": (Case(data={"generator": True}), EVERY),
    "a generator within Lightning's sampler": (
        Case(data={"weighted": True}, options={"use_distributed_sampler": True}),
        {"every_n_train_steps": 2},
    ),
    "a loader and a stream": (Case(data={"and stream": True}), EVERY),
    "loaders that cycle": (Case(data={"combined": "max_size_cycle"}), EVERY),
    "the shortest of two loaders": (Case(data={"combined": "min_size"}, batches=5), {"every_n_train_steps": 2}),
    "a loader that keeps its place": (Case(data={"stateful": True, "shuffle": True}), EVERY),
    "a stream that keeps its place": (Case(stream="stateful", data={}), EVERY),
    "validation after the batch": (
        Case(options={"val_check_interval": 3}, scheduler="plateau"),
        {"every_n_train_steps": 3},
    ),
    "at the end of validation": (
        Case(options={"val_check_interval": 3}, scheduler="plateau"),
        {"monitor": "val_loss"},
    ),
    "at the end of an epoch": (
        Case(options={"check_val_every_n_epoch": 1}, scheduler="plateau"),
        {"every_n_epochs": 1, "save_on_train_epoch_end": True},
    ),
    "counted in steps, end of an epoch": (
        Case(options={"max_steps": 18, "max_epochs": -1}),
        {"every_n_epochs": 1, "save_on_train_epoch_end": True},
    ),
    "counted in steps": (Case(options={"max_steps": 11, "max_epochs": -1}), {"every_n_train_steps": 1}),
    "accumulated": (Case(accumulate=3), {"every_n_train_steps": 1}),
    "manual optimization, two optimizers": (Case(manual=True, optimizer="momentum"), EVERY),
    "gradients averaged, batch norm": (Case(period=1, kind="norm"), {"every_n_train_steps": 4}),
    "LBFGS": (Case(optimizer="lbfgs", kind="norm", epochs=2), {"every_n_train_steps": 5}),
    "a schedule of learning rates": (Case(scheduler="step"), {"every_n_train_steps": 4}),
    "loaders made anew": (Case(options={"reload_dataloaders_every_n_epochs": 1}), {"every_n_train_steps": 4}),
    "warm-up, and DiLoCo": (Case(period=PostLocal(3, then=4), outer=DiLoCo()), {"every_n_train_steps": 2}),
    "SlowMo": (Case(outer=SlowMo(0.9, 0.5), scheduler="step", kind="norm", optimizer="momentum"), EVERY),
    "an outer Adam in small buckets": (
        Case(outer=Outer(partial(torch.optim.Adam, lr=0.01)), bucket_mb=2**-14),
        {"every_n_train_steps": 5},
    ),
    "an outer Adafactor": (Case(outer=Outer(partial(torch.optim.Adafactor, lr=0.01))), {"every_n_train_steps": 5}),
    "rounds by the learning rate": (Case(period=QSR(0.02, 2), scheduler="step"), {"every_n_train_steps": 2}),
    "rounds by the loss": (Case(period=AdaComm(4, every=4, learning_rate=True), scheduler="step"), EVERY),
    "rounds by the drift": (Case(period=DriftLimit(0.5, first=3, check=2)), {"every_n_train_steps": 2}),
    "rounds of two passes": (Case(period=EveryEpoch(2), epochs=4), {"every_n_train_steps": 5}),
    "one average": (Case(period=AtEnd(), epochs=2), EVERY),
    "stages by epochs": (Case(period=Stages({0: 2, 1: 5}, unit="epoch")), EVERY),
    "averaged moments": (Case(optimizer_state=AverageState({"exp_avg": 1, "exp_avg_sq": 2})), EVERY),
    "an average in flight, batch norm": (
        Case(mean=Mean(delay=3), kind="norm", period=5),
        {"every_n_train_steps": 1},
    ),
    "int4 in flight, with DiLoCo": (
        Case(mean=Mean(wire="int4", delay=2), outer=DiLoCo(), epochs=2),
        {"every_n_train_steps": 1},
    ),
    "int8 after a warm-up": (
        Case(period=PostLocal(3, then=4), mean=Mean(wire="int8", delay=2), kind="norm", epochs=2),
        {"every_n_train_steps": 2},
    ),
    "int8 with noise, in small buckets": (
        Case(mean=Mean(wire="int8", rounding="stochastic"), bucket_mb=2**-9, optimizer="momentum"),
        {"every_n_train_steps": 3},
    ),
    "bfloat16 in flight for a whole round": (
        Case(mean=Mean(wire="bfloat16", delay=4), options={"val_check_interval": 3}),
        {"every_n_train_steps": 3},
    ),
    "paces": (
        Case(pace=Proportional((1, 0.4)), options=DEALT, scheduler="step", batches=14),
        {"every_n_train_steps": 4},
    ),
    "paces by steps, with DiLoCo and loader processes": (
        Case(
            pace=Proportional((0.3, 1), average="steps"),
            outer=DiLoCo(),
            options=DEALT | {"val_check_interval": 0.5},
            data=WORKERS,
            accumulate=2,
            batches=24,
            epochs=2,
        ),
        {"every_n_train_steps": 4},
    ),
    "fewer batches than there are": (Case(options={"limit_train_batches": 5}), {"every_n_train_steps": 2}),
}


def go_on_all(cases, folder):
    return {
        name: go_on(case, f"{folder}/{number}", saver) for number, (name, (case, saver)) in enumerate(cases.items())
    }


def check(ranks):
    for found in ranks:
        for name, resumes in found.items():
            for one in resumes:
                assert one.first is not None, (name, one)
                assert not one.differ, (name, one)
                assert not one.said, (name, one)


@pytest.mark.parametrize("part", range(4))
def test_it_goes_on_bit_for_bit(part, tmp_path):
    cases = dict(list(CASES.items())[part::4])
    check(run_workers(go_on_all, 2, cases, str(tmp_path), timeout=240))


def test_one_worker_goes_on_bit_for_bit(tmp_path):
    check(run_workers(go_on_all, 1, {"alone": (Case(workers=1), EVERY)}, str(tmp_path)))


@pytest.mark.parametrize("period", [1, 4])
def test_three_workers_go_on_bit_for_bit_whatever_the_order_of_summation(period, tmp_path):
    check(run_workers(go_on_all, 3, {"three": (Case(workers=3, period=period), EVERY)}, str(tmp_path)))


def test_what_was_used_of_the_epoch_is_not_loaded_again(tmp_path):
    for found in run_workers(go_on, 2, Case(data={}, epochs=1), str(tmp_path), EVERY):
        assert [one.loaded for one in found] == [list(range(6, 14))]  # saved at 3 of 7 batches of 2


@pytest.mark.parametrize("lengths", [[7, 4], [4, 7]])
def test_uneven_data_goes_on_exactly_or_says_why_not(lengths, tmp_path):
    case = Case(lengths=lengths, epochs=2)
    ranks = run_workers(go_on, 2, case, str(tmp_path), {"every_n_train_steps": 1})
    exact = 0
    for both in zip(*ranks, strict=True):
        said = [text for one in both for text in one.said]
        if said:  # a rank waited in its average while the other one saved
            assert all("saved in the middle of a training step" in text for text in said)
        else:
            exact += 1
            assert not any(one.differ for one in both), both
    assert exact >= 4


AT_EPOCH_END = {"every_n_epochs": 1, "save_on_train_epoch_end": True}


@pytest.mark.parametrize(
    ("case", "saver", "why"),
    [
        (Case(stream="plain", data={}), EVERY, "over an iterable dataset cannot be found again"),
        (
            Case(stream="stateful", data={}, options={"limit_train_batches": 3}),
            AT_EPOCH_END,
            "an epoch that is cut short leaves an iterable dataset where only the dataset knows",
        ),
        (Case(data=WORKERS, transform=True, epochs=2), EVERY, "draws random numbers in the loader's processes"),
        (
            Case(options={"val_check_interval": 3}, scheduler="plateau on train_loss"),
            EVERY,
            "`train_loss` of this epoch, which decides on the training, counts only the batches after the resume",
        ),
    ],
    ids=["stream", "cut stream", "processes", "metric"],
)
def test_where_it_is_not_exact_the_resume_says_so_once_and_why(case, saver, why, tmp_path):
    first, second = run_workers(go_on, 2, case, str(tmp_path), saver)
    assert len(first[0].said) == 1
    assert "does not go on exactly as it would have without the stop" in first[0].said[0]
    assert why in first[0].said[0]
    assert second[0].said in ([], first[0].said)  # of the loader's processes each worker speaks for itself


def test_without_the_option_a_new_round_starts_at_the_consensus(tmp_path):
    ranks = run_workers(go_on, 2, Case(checkpoint="consensus", data={}), str(tmp_path), EVERY)
    for found in ranks:
        assert found[0].differ


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"workers": 1}, "it was saved by 2 workers, and these are 1"),
        ({"bucket_mb": 0.0001}, "`bucket_mb` was 64.0 and is 0.0001"),
        ({"period": 3}, "`period` was 'Every(period=4)' and is 'Every(period=3)'"),
        ({"outer": DiLoCo()}, "`outer` was 'None' and is 'DiLoCo("),
        ({"optimizer_state": "reset"}, "`optimizer_state` was 'keep' and is 'reset'"),
    ],
)
def test_another_setting_is_told(other, why, tmp_path):
    case = Case(epochs=2)
    run_workers(run, 2, case, str(tmp_path), EVERY)
    changed = Case(epochs=2, **other)
    said = run_workers(go_on_with, changed.workers, changed, str(tmp_path / "step=3.ckpt"))[0]
    assert len(said) == 1
    assert why in said[0]


def go_on_with(case, path):
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(case, resume=path)
    texts = [str(one.message) for one in caught]
    return [text for text in texts if "new round" in text or "does not go on exactly" in text]


def test_the_option_is_one_of_two():
    with pytest.raises(ValueError, match='`checkpoint` must be "consensus" or "exact", got True'):
        LocalSGDStrategy(checkpoint=True)


def test_random_states_are_plain_and_come_back(tmp_path):
    import random

    import numpy as np

    others = [torch.Generator(), np.random.default_rng(1), np.random.RandomState(2), random.Random(3)]

    def draw():
        return [
            torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), np.random.randn(), random.gauss(0, 1),
            torch.rand(3, generator=others[0]).tolist(), others[1].normal(), others[2].randn(), others[3].gauss(0, 1),
        ]  # fmt: skip

    draw()
    torch.save(random_state(generators=others), tmp_path / "state.pt")
    first = draw()
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True), generators=others)
    assert draw() == first


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", [0, 1, 3])
def test_a_followed_loader_has_the_order_of_a_free_one_and_is_left_as_it_was(workers, taken):
    def order(loader, skip=0):
        return [int(x) for x in loader][skip:]

    def loader():
        torch.manual_seed(5)
        return torch.utils.data.DataLoader(list(range(6)), batch_size=None, shuffle=True, num_workers=workers)

    free = loader()
    expected = [order(free), order(free)]
    followed = loader()
    own = followed.sampler
    follower = Follower(followed)
    assert order(followed) == expected[0]
    iterator = iter(followed)
    for _ in range(taken):
        next(iterator)
    state = follower.state(iterator, redo=0)

    torch.manual_seed(6)
    again = loader()
    torch.manual_seed(7)
    other = Follower(again)
    other.go_on_from(state)
    iterator = iter(again)
    other.settle(state)
    assert [int(x) for x in iterator] == expected[1][taken:]
    follower.leave()
    assert followed.sampler is own


def test_the_parts_are_where_their_main_file_says(tmp_path):
    run_workers(run, 2, Case(epochs=1), str(tmp_path), EVERY)
    entry = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["lightning_localsgd"]
    parts = sorted((Path(entry["folder"]) / entry["id"]).iterdir())
    assert [part.name for part in parts] == ["00000.pt", "00001.pt"]


class Asks(Callback):
    """Has the loaders made where the optimizers are, as a schedule of learning rates over the whole run does."""

    def __init__(self, hook):
        self.hook = hook

    def setup(self, trainer, pl_module, stage):
        if self.hook == "setup":
            self.steps = trainer.estimated_stepping_batches
        else:
            make = pl_module.configure_optimizers

            def configure_optimizers():
                self.steps = trainer.estimated_stepping_batches
                return make()

            pl_module.configure_optimizers = configure_optimizers


def asks_for_the_number_of_steps(folder):
    case, saver = Case(options=DEALT), {"every_n_train_steps": 5}
    whole = {}
    for hook in ("setup", "configure_optimizers"):
        digests, end, _ = run(case, f"{folder}/{hook}", saver, callbacks=[Asks(hook)])
        path = next(Path(folder, hook).glob("step=10*"))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
            resumed, its_end, _ = run(case, f"{folder}/{hook}", saver, str(path), [Asks(hook)])
        whole[hook] = later(digests, 11) == resumed and end == its_end
    return whole


def test_it_goes_on_exactly_where_loaders_were_made_before_the_fit(tmp_path):
    for found in run_workers(asks_for_the_number_of_steps, 2, tmp_path):
        assert found == {"setup": True, "configure_optimizers": True}
