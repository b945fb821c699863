"""Damaged and foreign checkpoints: an error that names file and tensor, on all ranks, or the right result."""

import pickle
import random
import shutil
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import gethostname

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.serialization import get_crc32_options, set_crc32_options
from torch.utils.data import DataLoader

from lightning_localsgd import LocalSGDStrategy, adopt_replica
from lightning_localsgd.checkpoint import AtomicCheckpointIO, write
from lightning_localsgd.intact import load
from tests.damage import damaged, equal
from tests.models import Regression, loader, state_of, trainer
from tests.resume import Points
from tests.versions import WEIGHTS_ONLY
from tests.workers import run_workers

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*has no checksums"),
]
STEPS = 6


class Remembers(ModelCheckpoint):
    """Has a state of a user's own, of plain Python."""

    def state_dict(self):
        return super().state_dict() | {"mine": {"words": ["a", "b"], "number": 0.5}}


def fit(folder, workers, resume=None):
    savers = [Remembers(folder, filename="{step}", every_n_train_steps=4)] if folder else []
    strategy = LocalSGDStrategy(4, checkpoint="exact")
    run = trainer(workers, strategy, callbacks=savers, enable_checkpointing=bool(folder), max_steps=STEPS)
    model = Regression("adamw")
    data = DataLoader(Points(workers * 2 * STEPS), batch_size=2, shuffle=True)
    run.fit(model, data, ckpt_path=resume, **WEIGHTS_ONLY)
    return model


def save(folder):
    fit(folder, 2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return the folder of a checkpoint by two workers: its main file, and their parts."""
    folder = tmp_path_factory.mktemp("saved")
    run_workers(save, 2, str(folder))
    return folder


def main_of(folder):
    return next(Path(folder).glob("*.ckpt"))


def part_of(folder, of):
    return next(Path(folder).glob(f"localsgd-parts/*/{of:05d}.pt"))


def break_tensor(path, name):
    """Flip one bit of the tensor that stands under these keys."""
    content = torch.load(path, weights_only=True)
    tensor = content
    for key in name:
        tensor = tensor[key]
    sought = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    data = bytearray(path.read_bytes())
    data[data.index(sought) + len(sought) // 2] ^= 4
    path.write_bytes(data)


class Evaluated(Regression):
    """Can be tested and predict, too."""

    test_step = predict_step = Regression.validation_step


def hear(path, way):
    """Load ``path`` in this way; return what is said."""
    run = trainer(2, LocalSGDStrategy(4, checkpoint="exact"))
    with pytest.raises((ValueError, RuntimeError)) as error:
        getattr(run, way)(Evaluated("adamw"), loader([2, 2]), ckpt_path=path, **WEIGHTS_ONLY)
    return str(error.value)


def hear_all(main, part):
    return [hear(main, way) for way in ("fit", "validate", "test", "predict")], [hear(part, "fit")]


def test_a_flipped_bit_is_named_by_file_and_tensor_on_all_ranks_however_it_is_loaded(saved, tmp_path):
    for name in ("main", "part"):
        shutil.copytree(saved, tmp_path / name)
        content = torch.load(main_of(tmp_path / name), weights_only=True)
        content["lightning_localsgd"]["folder"] = "gone"  # so that the parts are taken that lie beside it
        write(content, str(main_of(tmp_path / name)))
    main, part = main_of(tmp_path / "main"), main_of(tmp_path / "part")
    break_tensor(main, ["state_dict", "net.2.weight"])
    break_tensor(part_of(tmp_path / "part", 1), ["optimizers", 0, "state", 1, "exp_avg"])
    heard = run_workers(hear_all, 2, str(main), str(part))
    for of, (mains, parts) in enumerate(heard):
        assert len(mains) == 4
        for said in mains:
            assert said.endswith(f"{main} is damaged: `state_dict/net.2.weight` is not as saved.")
            assert said.startswith("The checkpoint ")
        (said,) = parts
        assert said.startswith(
            "The checkpoint " if of == 1 else f"Rank 1 on host {gethostname()} failed where all ranks must "
        )
        assert said.endswith("00001.pt is damaged: `optimizers/0/state/1/exp_avg` is not as saved.")


def test_data_of_others_is_verified_too(saved, tmp_path):
    path = shutil.copy(main_of(saved), tmp_path / "copy.ckpt")
    data = bytearray(path.read_bytes())
    data[data.index(b"words")] ^= 1  # of the callback's state, which torch loads without a word
    path.write_bytes(data)
    assert "vords" in repr(torch.load(path, weights_only=True))
    with pytest.raises(ValueError, match=r"copy.ckpt is damaged: what is not a tensor in it is not as it was saved\."):
        load(str(path))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is damaged, or none: it is no whole file as `torch.save` writes it"),
        (b"epoch: 3", "is damaged, or none"),
        ("cut", "is damaged, or none"),
        ("folder", "must be a file, and .* is a folder"),
        ("legacy", "is damaged, or none"),
        ("zip", "is damaged: what is not a tensor in it"),
        ("tensor", "must be a dict, and .* holds a Tensor"),
    ],
    ids=str,
)
def test_what_is_no_checkpoint_is_refused_in_one_sentence(content, says, saved, tmp_path):
    path = tmp_path / "odd.ckpt"
    if content == "folder":
        path.mkdir()
    elif content == "legacy":
        torch.save({}, path, _use_new_zipfile_serialization=False)
    elif content == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/b.txt", "text")
    elif content == "tensor":
        torch.save(torch.ones(3), path)
    else:
        path.write_bytes(main_of(saved).read_bytes()[:-100] if content == "cut" else content)
    for read in (load, AtomicCheckpointIO().load_checkpoint, partial(adopt_replica, new_path=tmp_path / "new.ckpt")):
        with pytest.raises(ValueError, match=says) as error:
            read(str(path))
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


def test_a_tensor_that_is_marked_as_a_folder_is_refused(tmp_path):
    """The list of records has room for such marks, and torch reads nothing into the memory of one that is a folder."""
    path = tmp_path / "file.ckpt"
    write({"weight": torch.arange(100.0)}, str(path))
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\x01\x02", data.rindex(b"archive/data/0") - 50)
    data[entry + 38] |= 0x10  # of the external attributes
    path.write_bytes(data)
    with pytest.raises(ValueError, match="`weight` is not as saved"):
        load(str(path))


def test_a_missing_file_is_lightnings_own_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="Checkpoint file not found"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "none.ckpt")
    for number in range(5):
        (tmp_path / f"step={number}.ckpt").touch()
    (tmp_path / "notes.txt").touch()
    beside = r"none\.ckpt\. In its folder there is step=0\.ckpt, step=1\.ckpt, step=2\.ckpt and 2 more$"
    with pytest.raises(FileNotFoundError, match=beside):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(FileNotFoundError, match=r"not found: nowhere\.ckpt$"):
        AtomicCheckpointIO().load_checkpoint("nowhere.ckpt")


def test_checksums_are_written_always_and_read_where_there_are_any(tmp_path):
    content = {"state_dict": {"weight": torch.arange(100.0)}}
    try:
        set_crc32_options(False)
        write(content, str(tmp_path / "ours.ckpt"))
        assert not get_crc32_options()
        torch.save(content, tmp_path / "theirs.ckpt")
    finally:
        set_crc32_options(True)
    assert equal(load(str(tmp_path / "ours.ckpt")), content)
    break_tensor(tmp_path / "ours.ckpt", ["state_dict", "weight"])
    with pytest.raises(ValueError, match="`state_dict/weight` is not as saved"):
        load(str(tmp_path / "ours.ckpt"))
    with pytest.warns(UserWarning, match="has no checksums") as told:
        assert equal(load(str(tmp_path / "theirs.ckpt")), content)
    assert len(told) == 1


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")  # torch 2.14: that it takes a moment
def test_tensors_of_every_kind_are_named(tmp_path):
    tied = torch.rand(50)
    content = {
        "a": [{"b": (tied, torch.rand(3, 5).t())}],
        "view": tied[10:],
        "parameter": torch.nn.Parameter(torch.rand(7)),
        "half": torch.rand(11).half(),
        "sparse": torch.eye(4).to_sparse(),
    }
    path = tmp_path / "file.ckpt"
    for name, says in [
        (["a", 0, "b", 0], "`a/0/b/0`, `view` are not as saved"),
        (["a", 0, "b", 1], "`a/0/b/1` is not as saved"),
        (["parameter"], "`parameter` is not as saved"),
        (["half"], "`half` is not as saved"),
    ]:
        write(content, str(path))
        assert equal(load(str(path), weights_only=True)["a"], content["a"])
        tensor = content
        for key in name:
            tensor = tensor[key]
        data = bytearray(path.read_bytes())
        memory = bytes(tensor.detach().untyped_storage().tolist())
        data[data.index(memory) + 1] ^= 1
        path.write_bytes(data)
        with pytest.raises(ValueError, match=says):
            load(str(path))


# ------------------------------------------------------------------------------------------------------------ execution


class Harms:
    """What a pickle can do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def load_harmful(path, url, done):
    """Return the types of the errors, of every way to load by our strategy."""
    said = []
    for where in (path, url):
        for way in ("fit", "validate"):
            with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
                getattr(trainer(1), way)(Regression(), loader([2]), ckpt_path=where)
            said.append(Path(done).exists())
    if WEIGHTS_ONLY:  # unless the user says so
        with pytest.raises(KeyError):  # it is no real checkpoint
            trainer(1).validate(Regression(), loader([2]), ckpt_path=path, weights_only=False)
        assert Path(done).exists()
    return said


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_nothing_in_a_file_is_executed_unless_the_user_says_so(tmp_path, served):
    torch.save({"harm": Harms(tmp_path / "done")}, tmp_path / "harmful.ckpt")
    said = run_workers(
        load_harmful, 1, str(tmp_path / "harmful.ckpt"), f"{served}/harmful.ckpt", str(tmp_path / "done")
    )
    assert said == [[False] * 4]


def test_the_names_of_a_damaged_file_are_found_without_executing_it(tmp_path):
    path = tmp_path / "both.ckpt"
    torch.save({"harm": Harms(tmp_path / "done"), "weight": torch.arange(100.0)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(torch.arange(100.0).numpy().tobytes()) + 7] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="`weight` is not as saved"):
        load(str(path), weights_only=False)
    assert not (tmp_path / "done").exists()


def test_a_url_is_verified(saved, tmp_path, served):
    path = Path(shutil.copy(main_of(saved), tmp_path / "it.ckpt"))
    assert equal(AtomicCheckpointIO().load_checkpoint(f"{served}/it.ckpt"), load(str(path)))
    break_tensor(path, ["state_dict", "net.2.weight"])
    with pytest.raises(ValueError, match=f"{served}/it.ckpt is damaged: `state_dict/net.2.weight` is not as saved"):
        AtomicCheckpointIO().load_checkpoint(f"{served}/it.ckpt")


# ----------------------------------------------------------------------------------------------------------------- fuzz


def load_mutations(folder, seeds):
    """Load each mutation of a checkpoint by Trainer; return how often it was refused, and how often right."""
    fit(f"{folder}/saved", 1)
    main, part = main_of(f"{folder}/saved"), part_of(f"{folder}/saved", 0)
    good = {path: path.read_bytes() for path in (main, part)}
    expected = {path: load(str(path)) for path in good}
    weights = {way: by_trainer(way, main) for way in ("fit", "validate")}
    outcomes = {"refused": 0, "right": 0}
    for seed in seeds:
        path = part if seed % 3 == 0 else main
        way = "fit" if path is part or seed % 2 else "validate"
        what, mutated = damaged(good[path], seed)
        path.write_bytes(mutated)
        try:
            right = equal(by_trainer(way, main), weights[way]) and equal(load(str(path)), expected[path])
        except ValueError as error:
            right = str(path) in str(error) and "\n" not in str(error)
            outcomes["refused"] += 1
        else:
            outcomes["right"] += 1
        assert right, (seed, what)
        path.write_bytes(good[path])
    return outcomes


def by_trainer(way, path):
    """Return the model that Trainer has after it has loaded ``path``: of the sixth step, or as it was saved."""
    if way == "fit":
        return state_of(fit(None, 1, str(path)))
    model = Regression()
    trainer(1, LocalSGDStrategy(4)).validate(model, loader([0]), ckpt_path=str(path), **WEIGHTS_ONLY, verbose=False)
    return state_of(model)


def check_mutations(folder, seeds):
    (outcomes,) = run_workers(load_mutations, 1, str(folder), seeds, timeout=60 + 2 * len(seeds))
    assert sum(outcomes.values()) == len(seeds)
    assert outcomes["refused"] > len(seeds) / 2
    assert outcomes["right"] > 0


def test_mutations_are_refused_or_right(tmp_path):
    check_mutations(tmp_path, range(40))


@pytest.mark.soak
def test_many_mutations_are_refused_or_right(tmp_path):
    check_mutations(tmp_path, range(1000, 1500))


def test_what_torch_alone_loads_wrong(saved, tmp_path):
    """Most flipped bits: the reason for all this."""
    data, expected = main_of(saved).read_bytes(), torch.load(main_of(saved), weights_only=True)
    path, wrong = tmp_path / "flipped.ckpt", 0
    rng = random.Random(0)
    for _ in range(100):
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            wrong += not equal(torch.load(path, weights_only=True), expected)
        except Exception:
            continue

    assert wrong > 10
