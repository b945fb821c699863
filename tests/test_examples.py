"""The examples: real runs, and the data that they are judged by."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml

from examples.digits import DigitsData
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
