"""Blocks: codes whose scales are stored in low bits themselves, as GGUF has them.

A block of a simple type holds 32 weights and one scale d. One of a K type holds 256 weights: sub-blocks of 16 or 32
share an integer, and the scale of a sub-block is d times it. The same goes for minima. Every stored part is kept, so
that the bytes can be written. Source of types and sizes: ggml's `ggml-common.h`.
O outputs, I inputs, G scales in a row, S blocks in a row.
"""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

__all__ = ["BLOCK_TYPES", "BlockTensor", "BlockType"]


@dataclass(frozen=True)
class BlockType:
    """The size of one ggml type."""

    bits: int
    """Bits of a code."""
    block_size: int
    """Weights of a block."""
    num_scales: int
    """Sub-blocks of a block, each with a scale of its own."""
    num_bytes: int
    """Bytes of a block on disk."""


BLOCK_TYPES: dict[str, BlockType] = {
    "Q8_0": BlockType(8, 32, 1, 34),
    "Q5_1": BlockType(5, 32, 1, 24),
    "Q5_0": BlockType(5, 32, 1, 22),
    "Q4_1": BlockType(4, 32, 1, 20),
    "Q4_0": BlockType(4, 32, 1, 18),
    "Q6_K": BlockType(6, 256, 16, 210),
    "Q5_K": BlockType(5, 256, 8, 176),
    "Q4_K": BlockType(4, 256, 8, 144),
    "Q3_K": BlockType(3, 256, 16, 110),
}
"""Name of a ggml type to its size."""


@dataclass(frozen=True)
class BlockTensor:
    """A matrix quantized to one ggml type."""

    kind: str
    """A name of `BLOCK_TYPES`: the type that is stored, which may be another than was asked for."""
    codes: Tensor
    """[O, I] uint8, 0 .. 2^bits - 1."""
    d: Tensor
    """[O, S] float16, the scale of each block."""
    dmin: Tensor | None = None
    """[O, S] float16: the minimum that Q4_1 and Q5_1 add, the scale of the minima that Q4_K and Q5_K subtract."""
    sub_scales: Tensor | None = None
    """[O, G] int16, of K types: 0 .. 63 in Q4_K and Q5_K, -128 .. 127 in Q6_K, -32 .. 31 in Q3_K."""
    sub_mins: Tensor | None = None
    """[O, G] int16, 0 .. 63, of Q4_K and Q5_K."""

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return BLOCK_TYPES[self.kind].bits

    @cached_property
    def scale(self) -> Tensor:
        """[O, G] float32: d, times the sub-scale where there is one, rounded once."""
        return _scaled(self.d, self.sub_scales)

    @cached_property
    def offset(self) -> Tensor | None:
        """[O, G] float32, what is added to code * scale; None where codes are centred on 2^(bits-1) instead."""
        if self.dmin is None:
            return None
        minimum = _scaled(self.dmin, self.sub_mins)
        return minimum if self.sub_mins is None else -minimum

    def dequantize(self) -> Tensor:
        """The real matrix [O, I], float32, the bits that ggml gives: each operation is rounded."""
        codes, scale = self.codes.float().view(*self.scale.shape, -1), self.scale.unsqueeze(-1)
        if self.offset is None:
            return ((codes - float(1 << self.bits - 1)) * scale).flatten(-2)
        return (codes * scale + self.offset.unsqueeze(-1)).flatten(-2)

    def storage_bits(self, scale_bits: int) -> int:
        """Bits of the blocks on disk; the type fixes how scales are stored, whatever `scale_bits`."""
        return 8 * BLOCK_TYPES[self.kind].num_bytes * self.d.numel()


def _scaled(of_block_OS: Tensor, of_group_OG: Tensor | None) -> Tensor:
    """float16 numbers times the integers of their sub-blocks, float32 [O, G]."""
    if of_group_OG is None:
        return of_block_OS.float()
    groups = of_group_OG.float().view(*of_block_OS.shape, -1)
    return (of_block_OS.float().unsqueeze(-1) * groups).flatten(-2)
