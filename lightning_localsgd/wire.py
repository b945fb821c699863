"""WHAT travels: numbers as 16, 8 or 4 bits each, as pure functions of the numbers."""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

WireName = Literal["float32", "bfloat16", "float16", "int8", "int4"]
_SCALE = torch.bfloat16  # of a block; it has the range of float32, and its rounding is part of the format
_SMALLEST = 2.0**-120  # a scale below it counts as 0: its inverse would not be finite


class Format(ABC):
    """How numbers become bytes: in blocks of a fixed number of elements, each of a fixed number of bytes.

    Args:
        block: elements of a block.
        remembers: whether what it leaves out is so much that it has to be sent later.
    """

    block: int
    remembers: bool

    @property
    @abstractmethod
    def block_bytes(self) -> int:
        """Bytes of a block."""

    def size(self, elements: int) -> int:
        """Return the number of bytes of so many elements, a multiple of the block."""
        return elements // self.block * self.block_bytes

    @abstractmethod
    def encode(self, values: Tensor, code: Tensor, noise: torch.Generator | None = None) -> None:
        """Write ``values`` into ``code``, and leave in ``values`` what the code leaves out.

        Args:
            values: finite floats of shape (rows, elements), elements being a multiple of the block.
            code: bytes of shape (rows, size(elements)).
            noise: draws the direction of each rounding, so that it is right on average; None rounds to the nearest.
        """

    @abstractmethod
    def decode(self, code: Tensor, values: Tensor) -> None:
        """Write the numbers in ``code`` into ``values``, of the same shapes."""


@dataclass(frozen=True)
class Cast(Format):
    """Each number as bfloat16, which has the range of float32."""

    block: int = 1
    remembers: bool = False

    @property
    def block_bytes(self) -> int:
        return 2

    def encode(self, values: Tensor, code: Tensor, noise: torch.Generator | None = None) -> None:
        sent = code.view(torch.bfloat16)
        sent.copy_(values)
        values.sub_(sent)

    def decode(self, code: Tensor, values: Tensor) -> None:
        values.copy_(code.view(torch.bfloat16))


@dataclass(frozen=True)
class Scaled(Format):
    """Each number as float16, in blocks whose largest is moved by a power of two to just below 2^15."""

    block: int = 512
    remembers: bool = False

    @property
    def block_bytes(self) -> int:
        return 2 * self.block + _SCALE.itemsize

    def encode(self, values: Tensor, code: Tensor, noise: torch.Generator | None = None) -> None:
        blocks, sent, scales = _parts(self, values, code, 2 * self.block)
        _, exponent = torch.frexp(_largest(blocks))
        power = torch.ldexp(torch.ones_like(blocks[..., :1]), (exponent - 15).clamp_(min=-110))
        scales.copy_(power)
        numbers = sent.view(torch.float16)
        numbers.copy_(blocks / power)
        blocks.sub_(numbers.to(blocks.dtype).mul_(power))

    def decode(self, code: Tensor, values: Tensor) -> None:
        blocks, sent, scales = _parts(self, values, code, 2 * self.block)
        blocks.copy_(sent.view(torch.float16)).mul_(scales)


@dataclass(frozen=True)
class Integers(Format):
    r"""Each number as an integer of 8 or 4 bits, in blocks with a scale of their own.

    .. math:: s = \max_j |x_j| / L, \qquad q_j = \mathrm{round}(x_j / s) \in \{-L, \dots, L\}

    with L = 127 or 7; two integers of 4 bits share a byte.
    """

    bits: Literal[4, 8]
    block: int
    remembers: bool = True

    @property
    def block_bytes(self) -> int:
        return self.block * self.bits // 8 + _SCALE.itemsize

    def encode(self, values: Tensor, code: Tensor, noise: torch.Generator | None = None) -> None:
        blocks, sent, scales = _parts(self, values, code, self.block * self.bits // 8)
        limit = 2 ** (self.bits - 1) - 1
        scales.copy_(_largest(blocks).div_(limit))
        scale = scales.to(blocks.dtype)
        numbers = blocks * torch.where(scale < _SMALLEST, 0, 1 / scale)
        if noise is None:
            numbers.round_()  # to L at most, although the scale may have been rounded down by a part in 512
        else:
            numbers.add_(torch.rand(numbers.shape, generator=noise, dtype=numbers.dtype, device=numbers.device))
            numbers.floor_().clamp_(-limit, limit)
        if self.bits == 8:
            sent.view(torch.int8).copy_(numbers)
        else:
            low, high = ((half + 8).to(torch.int8).view(torch.uint8) for half in numbers.chunk(2, dim=-1))
            torch.bitwise_or(low, high.bitwise_left_shift_(4), out=sent)
        blocks.sub_(numbers.mul_(scale))

    def decode(self, code: Tensor, values: Tensor) -> None:
        blocks, sent, scales = _parts(self, values, code, self.block * self.bits // 8)
        if self.bits == 8:
            blocks.copy_(sent.view(torch.int8))
        else:
            low, high = blocks.chunk(2, dim=-1)
            low.copy_(sent.bitwise_and(15).view(torch.int8)).sub_(8)
            high.copy_(sent.bitwise_right_shift(4).view(torch.int8)).sub_(8)
        blocks.mul_(scales)


FORMATS: dict[str, Format] = {
    "bfloat16": Cast(),
    "float16": Scaled(),
    "int8": Integers(8, block=128),
    "int4": Integers(4, block=64),
}


def noise(device: torch.device, *key: int) -> torch.Generator:
    """Return a generator that depends on the numbers ``key`` alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)


def _parts(form: Format, values: Tensor, code: Tensor, number_bytes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the blocks, the bytes of their numbers, and their scales: views of (rows, blocks, ...)."""
    rows = len(values)
    blocks = values.view(rows, -1, form.block)
    count = blocks.shape[1]
    numbers = code[:, : count * number_bytes].view(rows, count, number_bytes)
    scales = code[:, count * number_bytes :].view(_SCALE).view(rows, count, 1)
    return blocks, numbers, scales


def _largest(blocks: Tensor) -> Tensor:
    """Return the largest magnitude in each block."""
    return blocks.abs().amax(dim=-1, keepdim=True)  # five times as fast as `aminmax`
