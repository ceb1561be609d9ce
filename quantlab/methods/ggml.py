"""GGUF's simple types: blocks of 32 inputs, each with a float16 scale d, in Q4_1 and Q5_1 with a minimum as well.

    Q8_0         d = absmax / 127                 code = round(w / d) + 128, half away from 0
    Q4_0, Q5_0   d = peak / -2^(b-1)              code = round(w / d) + 2^(b-1), half up; peak: the w of the largest
                                                  magnitude, the first of its like, so that it gets code 0
    Q4_1, Q5_1   d = (max - min) / (2^b - 1)      code = round((w - min) / d), half up

Codes are found with d as it is in float32, and it is stored in float16 after that: so codes, scales and minima are
those of gguf-py 0.19.0's `gguf.quants.quantize` and of llama.cpp, bit for bit. O outputs, I inputs, S = G = I / 32.
"""

import torch
from torch import Tensor

from quantlab.errors import SchemeError
from quantlab.methods.blocks import blocks_of
from quantlab.numerics.block import BLOCK_TYPES, BlockTensor

__all__ = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "simple_blocks", "stored_in_half"]

_BLOCK_SIZE = 32


def q8_0(weight_OI: Tensor, name: str, *, scale_dtype: torch.dtype = torch.float32) -> BlockTensor:
    """Codes [O, I]; d [O, G] float16, whatever `scale_dtype`: the type fixes it.

    Error bound: |w - dequantize| <= absmax / 254 + absmax * 2^-11 of the block, and 127 * 2^-25 where d is subnormal.

    Raises:
        SchemeError: 32 does not divide I, or d is beyond float16's range.
        CheckpointError: a weight is not finite.
    """
    return simple_blocks(weight_OI, name, "Q8_0")


def q5_1(weight_OI: Tensor, name: str, *, scale_dtype: torch.dtype = torch.float32) -> BlockTensor:
    """As `q8_0`, with 5-bit codes and a minimum."""
    return simple_blocks(weight_OI, name, "Q5_1")


def q5_0(weight_OI: Tensor, name: str, *, scale_dtype: torch.dtype = torch.float32) -> BlockTensor:
    """As `q8_0`, with 5-bit codes."""
    return simple_blocks(weight_OI, name, "Q5_0")


def q4_1(weight_OI: Tensor, name: str, *, scale_dtype: torch.dtype = torch.float32) -> BlockTensor:
    """As `q8_0`, with 4-bit codes and a minimum."""
    return simple_blocks(weight_OI, name, "Q4_1")


def q4_0(weight_OI: Tensor, name: str, *, scale_dtype: torch.dtype = torch.float32) -> BlockTensor:
    """As `q8_0`, with 4-bit codes."""
    return simple_blocks(weight_OI, name, "Q4_0")


def simple_blocks(weight_OI: Tensor, name: str, kind: str, asked: str | None = None) -> BlockTensor:
    """One matrix in Q8_0, Q5_1, Q5_0, Q4_1 or Q4_0; `asked` is the format for messages. Raises what `q8_0` does."""
    blocks = blocks_of(weight_OI, _BLOCK_SIZE, name, asked or kind.lower())
    if kind.endswith("_1"):
        return _with_minimum(blocks, name, kind)
    half = 2 ** (BLOCK_TYPES[kind].bits - 1)
    if kind == "Q8_0":
        d = blocks.abs().amax(-1) / (half - 1)
        units = blocks * _inverse(d)
        size = units.abs().trunc()
        # Half away from 0, which no rounding of torch does; a + 0.5 would be rounded first.
        units = units.sign() * (size + (2 * (units.abs() - size)).trunc()) + half
    else:
        peak = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)).squeeze(-1)
        d = peak / -half
        units = (blocks * _inverse(d) + (half + 0.5)).trunc().clamp_(0, 2 * half - 1)
    return BlockTensor(kind, units.to(torch.uint8).flatten(-2), stored_in_half(d, name, kind))


def _with_minimum(blocks_OGg: Tensor, name: str, kind: str) -> BlockTensor:
    low, steps = blocks_OGg.amin(-1), 2 ** BLOCK_TYPES[kind].bits - 1
    d = (blocks_OGg.amax(-1) - low) / steps
    stored, dmin = stored_in_half(d, name, kind), stored_in_half(low, name, kind)
    units = ((blocks_OGg - low.unsqueeze(-1)) * _inverse(d) + 0.5).trunc().clamp_(0, steps)
    return BlockTensor(kind, units.to(torch.uint8).flatten(-2), stored, dmin)


def _inverse(d_OG: Tensor) -> Tensor:
    """1 / d as [O, G, 1]; 0 where d is 0, or so small that float16 holds none of it and float32 not its inverse."""
    inverse = 1 / d_OG
    return torch.where(inverse.isfinite(), inverse, 0.0).unsqueeze(-1)


def stored_in_half(exact: Tensor, name: str, kind: str) -> Tensor:
    """The numbers in float16.

    Raises:
        SchemeError: one is beyond float16's range.
    """
    stored = exact.half()
    if stored.isinf().any():
        raise SchemeError(
            f"scales and minima of {kind} must fit float16, up to 65504: {name} needs {exact.abs().max():.3g}. "
            f'Use w8, or add "*.{name.rpartition(".")[2]}" to skip.'
        )
    return stored
