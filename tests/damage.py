"""Damage to a file, as disks, links and half-finished copies do it, and what may come of it."""

import random
from collections.abc import Callable
from typing import Any

import torch

_LISTS = 3000  # bytes at the end, where an archive of some tensors lists its records


def place(data: bytearray, rng: random.Random) -> int:
    """Return a place anywhere, or in half of the cases in the lists at the end, which are small beside the tensors."""
    return rng.randrange(max(0, len(data) - _LISTS) if rng.random() < 0.5 else 0, len(data))


def flip(data: bytearray, rng: random.Random) -> None:
    data[place(data, rng)] ^= 1 << rng.randrange(8)


def truncate(data: bytearray, rng: random.Random) -> None:
    del data[place(data, rng) :]


def zero(data: bytearray, rng: random.Random) -> None:
    start, size = place(data, rng), rng.choice([1, 16, 512, 4096])
    data[start : start + size] = bytes(len(data[start : start + size]))


def swap(data: bytearray, rng: random.Random) -> None:
    size = rng.choice([4, 64, 512])
    here, there = (place(data, rng) // size * size for _ in range(2))
    blocks = data[here : here + size], data[there : there + size]
    if len(blocks[0]) == len(blocks[1]) == size:
        data[here : here + size], data[there : there + size] = blocks[1], blocks[0]


def drop(data: bytearray, rng: random.Random) -> None:
    start = place(data, rng)
    del data[start : start + rng.choice([1, 64, 512])]


DAMAGES: list[Callable[[bytearray, random.Random], None]] = [flip, truncate, zero, swap, drop]


def damaged(data: bytes, seed: int) -> tuple[str, bytes]:
    """Return the name of the damage of this number, and the data with it."""
    rng, copy = random.Random(seed), bytearray(data)
    damage = DAMAGES[seed % len(DAMAGES)]
    damage(copy, rng)
    return damage.__name__, bytes(copy)


def equal(one: Any, other: Any) -> bool:
    """Whether two checkpoints are the same, bit for bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and _bits(one) == _bits(other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return repr(one) == repr(other)


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
