"""What a checkpoint is on the disk, and what becomes of its parts, however Lightning and people handle files."""

import os
import shutil
import time
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch.utils.data import DataLoader

from lightning_localsgd import LocalSGDStrategy, adopt_replica
from lightning_localsgd.checkpoint import AtomicCheckpointIO, write
from tests.models import Regression, rank, same, state_of, trainer
from tests.resume import Points
from tests.versions import WEIGHTS_ONLY, has
from tests.workers import run_workers

KEY = "lightning_localsgd"
pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    # `OnExceptionCheckpoint` makes Lightning look for a checkpoint to go on from.
    pytest.mark.filterwarnings("ignore:`.fit.ckpt_path=None.` was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
]


class Logs(Regression):
    """Logs a score that differs between the ranks, so that the names of checkpoints do."""

    def training_step(self, batch, batch_idx):
        self.log("mine", float(10 * batch_idx + rank()))
        return super().training_step(batch, batch_idx)


def fit(folder, saver=None, *, exact=True, resume=None, workers=2, plugins=None, steps=8, model=Logs, callbacks=()):
    strategy = LocalSGDStrategy(4, checkpoint="exact" if exact else "consensus")
    callbacks = [*callbacks, *([] if saver is None else [ModelCheckpoint(folder, **saver)])]
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    run = trainer(workers, strategy, callbacks=callbacks, enable_checkpointing=saves, plugins=plugins, max_epochs=2)
    torch.manual_seed(int(os.environ["LOCAL_RANK"]))
    module = model("adamw")
    data = DataLoader(Points(2 * steps), batch_size=2, shuffle=True)
    run.fit(module, data, ckpt_path=resume, **WEIGHTS_ONLY)
    return state_of(module)


def mains(folder):
    return sorted(path.name for path in Path(folder).glob("*.ckpt"))


def ids(folder):
    """Return the ids that main files name, and those that there are parts of."""
    named = {torch.load(Path(folder) / name, weights_only=True)[KEY]["id"] for name in mains(folder)}
    parts = Path(folder) / "localsgd-parts"
    return named, {path.name for path in parts.iterdir()} if parts.exists() else set()


@pytest.mark.parametrize(
    ("saver", "expected"),
    [
        ({"filename": "{step}", "every_n_train_steps": 3, "save_top_k": 1}, ["step=15.ckpt"]),
        (
            {"filename": "{step}", "every_n_train_steps": 3, "save_top_k": 2, "monitor": "mine", "mode": "max"},
            ["step=15.ckpt", "step=6.ckpt"],
        ),
        (
            {"filename": "{step}", "every_n_train_steps": 3, "save_top_k": 1, "save_last": True},
            ["last.ckpt", "step=15.ckpt"],
        ),
        (
            {"filename": "{step}", "every_n_train_steps": 3, "save_top_k": 1, "save_last": "link"},
            ["last.ckpt", "step=15.ckpt"],
        ),
        (
            {"filename": "{step}-{mine:.0f}", "every_n_train_steps": 3, "save_top_k": 1},
            ["step=15-mine=60.ckpt"],
        ),
    ],
    ids=["the newest", "the best", "last", "link", "names that differ"],
)
def test_the_parts_go_with_their_main_file(saver, expected, tmp_path):
    straight = run_workers(fit, 2, str(tmp_path), saver)
    assert mains(tmp_path) == expected
    named, there = ids(tmp_path)
    assert named == there
    for name in expected:
        check_goes_on(tmp_path / name, straight)


def test_only_weights_and_without_the_option_it_is_one_plain_file(tmp_path):
    run_workers(fit, 2, str(tmp_path / "weights"), {"save_weights_only": True})
    run_workers(fit_plain, 2, str(tmp_path / "plain"))
    for folder in ("weights", "plain"):
        assert not (tmp_path / folder / "localsgd-parts").exists()
        assert len(mains(tmp_path / folder)) == 1


def fit_plain(folder):
    return fit(folder, {}, exact=False)


def save_once(folder, **options):
    return fit(folder, {"filename": "{step}", "every_n_train_steps": 6, "save_top_k": 1}, **options)


def goes_on(path):
    return fit("", resume=str(path))


def check_goes_on(path, straight):
    for one, other in zip(run_workers(goes_on, 2, path), straight, strict=True):
        assert same([one, other])


def test_links_copies_and_renames_keep_their_parts(tmp_path):
    folder = tmp_path / "run"
    straight = run_workers(save_once, 2, str(folder))
    shutil.copy(folder / "step=12.ckpt", tmp_path / "copy.ckpt")  # finds them by the folder that it names
    (tmp_path / "link.ckpt").symlink_to(folder / "step=12.ckpt")
    (folder / "step=12.ckpt").rename(folder / "renamed.ckpt")
    shutil.copytree(folder, tmp_path / "moved")  # finds them beside itself
    for path in (tmp_path / "copy.ckpt", folder / "renamed.ckpt"):
        check_goes_on(path, straight)
    shutil.rmtree(folder)
    check_goes_on(tmp_path / "moved" / "renamed.ckpt", straight)


def test_the_parts_of_a_copy_outlive_the_original(tmp_path):
    run_workers(save_and_copy, 2, str(tmp_path))
    assert mains(tmp_path) == ["kept.ckpt", "step=12.ckpt"]
    named, there = ids(tmp_path)
    assert named == there
    assert len(there) == 2


class CopiesFirst(Callback):
    """Copies the first checkpoint, before ModelCheckpoint removes it for the second."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        folder = Path(trainer.checkpoint_callback.dirpath)
        if trainer.is_global_zero and (folder / "step=6.ckpt").exists():
            shutil.copy(folder / "step=6.ckpt", folder / "kept.ckpt")


def save_and_copy(folder):
    return save_once(folder, callbacks=[CopiesFirst()])


def test_an_incomplete_checkpoint_is_refused_by_name_on_all_ranks(tmp_path):
    run_workers(save_once, 2, str(tmp_path))
    (_,) = ids(tmp_path)[1]
    next((tmp_path / "localsgd-parts").iterdir()).joinpath("00001.pt").unlink()
    ends = run_workers(goes_on, 2, tmp_path / "step=12.ckpt", catch=True, timeout=60)
    assert ends[1].type == "FileNotFoundError"
    assert ends[0].type == "RuntimeError"
    for end in ends:
        assert "step=12.ckpt is incomplete: rank 1's part" in end.message
    plain = run_workers(goes_on_plainly, 2, str(tmp_path / "step=12.ckpt"))
    assert same(plain)


def goes_on_plainly(path):
    return fit("", exact=False, resume=path)


def test_a_truncated_checkpoint_is_one_error_on_all_ranks(tmp_path):
    run_workers(save_once, 2, str(tmp_path))
    path = tmp_path / "step=12.ckpt"
    path.write_bytes(path.read_bytes()[:1000])
    ends = run_workers(goes_on, 2, path, catch=True, timeout=60)
    assert ends[0] == ends[1]
    assert ends[0].message.startswith(f"The checkpoint {path} is damaged, or none")


class Looks(Callback):
    """Keeps the moments of this worker when it saves in its sixth step, and those with which it starts."""

    def __init__(self, folder):
        self.folder, self.own, self.resumed = folder, [], []

    def moments(self, trainer):
        return [state["exp_avg"].clone() for state in trainer.optimizers[0].state.values()]

    def on_train_start(self, trainer, pl_module):
        self.resumed = self.moments(trainer)

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 6 and not self.resumed:
            self.own = self.moments(trainer)
            trainer.save_checkpoint(f"{self.folder}/six.ckpt")


def moments(folder):
    looks = Looks(folder)
    fit(folder, exact=False, callbacks=[looks])
    state = torch.load(f"{folder}/six.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    fit("", exact=False, resume=f"{folder}/six.ckpt", callbacks=[again := Looks(folder)])
    return looks.own, [value["exp_avg"] for value in state.values()], again.resumed


def test_the_plain_file_has_the_mean_of_the_moments_and_all_go_on_with_it(tmp_path):
    (first, file, resumed), (second, _, other) = run_workers(moments, 2, str(tmp_path))
    for a, b, mean, here, there in zip(first, second, file, resumed, other, strict=True):
        assert not torch.equal(a, b)
        torch.testing.assert_close(mean, (a + b) / 2)
        assert torch.equal(here, mean)
        assert torch.equal(there, mean)


class Fails(Logs):
    """Rank 1 raises in its sixth step."""

    def training_step(self, batch, batch_idx):
        if rank() == 1 and self.trainer.global_step == 6:
            raise ZeroDivisionError("on purpose")
        return super().training_step(batch, batch_idx)


def fail(folder):
    saves = {"save_on_exception": True} if has("2.5.3") else {}
    savers = [
        ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, **saves),
        OnExceptionCheckpoint(folder),
    ]
    fit(folder, model=Fails, callbacks=savers)


def test_who_raises_saves_its_own_replica_under_its_rank_and_nobody_takes_it_for_the_consensus(tmp_path):
    ends = run_workers(fail, 2, str(tmp_path), catch=True, timeout=60)
    assert ends[1].type == "ZeroDivisionError"
    names = mains(tmp_path)
    assert "step=4.ckpt" in names  # the last good one
    assert ("step=6-rank1.ckpt" in names) == has("2.5.3")
    assert "on_exception-rank1.ckpt" in names
    assert all("rank" in name for name in names if name != "step=4.ckpt")
    ends = run_workers(goes_on, 2, tmp_path / "on_exception-rank1.ckpt", catch=True, timeout=60)
    for end in ends:
        assert "holds the replica of rank 1 alone" in end.message
    run_workers(goes_on, 2, tmp_path / "step=4.ckpt")

    with pytest.raises(ValueError, match="must be a checkpoint of one worker's replica"):
        adopt_replica(tmp_path / "step=4.ckpt", tmp_path / "adopted.ckpt")
    adopt_replica(tmp_path / "on_exception-rank1.ckpt", tmp_path / "adopted.ckpt")
    assert same(run_workers(goes_on_plainly, 2, str(tmp_path / "adopted.ckpt")))


class Slow(AtomicCheckpointIO):
    """Takes longer to save than the training takes to the next save, which removes this one."""

    def save_checkpoint(self, *args, **options):
        time.sleep(1)
        super().save_checkpoint(*args, **options)


def save_in_the_background(folder):
    return save_once(folder, plugins=[AsyncCheckpointIO(Slow())])


def test_saving_in_the_background_keeps_the_order(tmp_path):
    straight = run_workers(save_in_the_background, 2, str(tmp_path))
    assert mains(tmp_path) == ["step=12.ckpt"]
    named, there = ids(tmp_path)
    assert named == there
    check_goes_on(tmp_path / "step=12.ckpt", straight)


class Remote(DirFileSystem):
    """A file system that is not the local one, although its files lie in a local folder."""

    protocol = "remote"

    def __init__(self, **options):
        super().__init__(path=os.environ["REMOTE"], fs=LocalFileSystem(), **options)

    @classmethod
    def _strip_protocol(cls, path):
        return path.removeprefix("remote://").strip("/")


def save_remotely(folder, path):
    os.environ["REMOTE"] = folder
    fsspec.register_implementation("remote", Remote, clobber=True)
    return save_once(path) if path == "remote://runs" else goes_on(path)


def test_remote_paths(tmp_path):
    straight = run_workers(save_remotely, 2, str(tmp_path), "remote://runs")
    assert mains(tmp_path / "runs") == ["step=12.ckpt"]
    assert len(list((tmp_path / "runs" / "localsgd-parts").iterdir())) == 1
    again = run_workers(save_remotely, 2, str(tmp_path), "remote://runs/step=12.ckpt")
    for one, other in zip(again, straight, strict=True):
        assert same([one, other])


def test_all_names_leave_lightnings_search_for_hpc_checkpoints_alone(tmp_path):
    """Lightning reads every digit of each name that contains `ckpt_`."""
    run_workers(save_once, 2, str(tmp_path))
    assert not [path.name for path in tmp_path.rglob("*") if "ckpt_" in path.name]


def test_a_file_is_whole_or_not_there(tmp_path):
    path = str(tmp_path / "file.ckpt")
    write({"old": 1}, path)
    with pytest.raises(Exception, match=r"cannot pickle|pickle"):
        AtomicCheckpointIO().save_checkpoint({"bad": (i for i in ())}, path)
    assert torch.load(path, weights_only=True) == {"old": 1}
    assert [one.name for one in tmp_path.iterdir()] == ["file.ckpt"]
    with pytest.raises(TypeError, match="storage_options"):
        AtomicCheckpointIO().save_checkpoint({}, path, storage_options=1)
