"""The examples: real runs, and the data that they are judged by."""

import re
import sys
from pydoc_data.topics import topics
from types import SimpleNamespace

import pytest
import torch
import yaml

from examples.digits import DigitsData
from examples.gpt import CHARACTERS, GPT, ReferenceData
from tests.shell import ROOT, ok


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
