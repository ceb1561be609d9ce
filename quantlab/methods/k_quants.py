"""GGUF's K types: superblocks of 256 inputs, whose sub-blocks have low-bit scales and minima.

    Q6_K         w = d * s * (code - 32)         16 sub-blocks of 16; s int8
    Q3_K         w = d * s * (code - 4)          16 sub-blocks of 16; s 6 bits with a sign
    Q5_K, Q4_K   w = d * s * code - dmin * m     8 sub-blocks of 32; s and m 6 bits

In three steps, each for many superblocks at once. Every sub-block's own scale and minimum (`k_search`). Then d and
dmin in float16, from the largest of a superblock, and the integers s and m: of those next to the quotients the ones
with the least squared error. Last the codes, nearest to w for d * s and dmin * m as they are stored.
A width that is no multiple of 256 takes llama.cpp's fallback. O outputs, I inputs, S superblocks; in a batch
g inputs of a sub-block, N superblocks, K sub-blocks of each.
"""

from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from quantlab.methods.blocks import blocks_of
from quantlab.methods.ggml import simple_blocks, stored_in_half
from quantlab.methods.k_search import fit_range, fit_scale, inverse, rounded
from quantlab.numerics.block import BLOCK_TYPES, BlockTensor

__all__ = ["FALLBACKS", "SUPERBLOCK", "q3_k", "q4_k", "q5_k", "q6_k"]

FALLBACKS = {"Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""K type to the type of a matrix whose width is no multiple of 256."""
SUPERBLOCK = 256
"""Inputs of a superblock."""

_BATCH = 512
"""Superblocks of a batch: half a megabyte of weights, which stays in cache."""


class _Grid(NamedTuple):
    """Smallest and largest code, before a half is added, and smallest and largest s."""

    low: int
    high: int
    least: int
    most: int


_GRIDS = {
    "Q6_K": _Grid(-32, 31, -128, 127),
    "Q5_K": _Grid(0, 31, 0, 63),
    "Q4_K": _Grid(0, 15, 0, 63),
    "Q3_K": _Grid(-4, 3, -32, 31),
}


def q6_k(weight_OI: Tensor, name: str, *, scale_dtype: torch.dtype = torch.float32) -> BlockTensor:
    """Codes [O, I]; d [O, S] float16, whatever `scale_dtype`: the type fixes it.

    Raises:
        SchemeError: 32 does not divide I, or d or dmin is beyond float16's range.
        CheckpointError: a weight is not finite.
    """
    return _quantize(weight_OI, name, "Q6_K")


def q5_k(weight_OI: Tensor, name: str, *, scale_dtype: torch.dtype = torch.float32) -> BlockTensor:
    """As `q6_k`, with 5-bit codes and minima."""
    return _quantize(weight_OI, name, "Q5_K")


def q4_k(weight_OI: Tensor, name: str, *, scale_dtype: torch.dtype = torch.float32) -> BlockTensor:
    """As `q6_k`, with 4-bit codes and minima."""
    return _quantize(weight_OI, name, "Q4_K")


def q3_k(weight_OI: Tensor, name: str, *, scale_dtype: torch.dtype = torch.float32) -> BlockTensor:
    """As `q6_k`, with 3-bit codes."""
    return _quantize(weight_OI, name, "Q3_K")


@dataclass(frozen=True)
class _Parts:
    """What is stored of a batch beside its codes. d and dmin are [N, 1] float16, s and m [N, K] float32 integers."""

    d: Tensor
    s: Tensor
    dmin: Tensor | None = None
    m: Tensor | None = None

    def codes(self, x_gNK: Tensor, grid: _Grid) -> tuple[Tensor, Tensor]:
        """The nearest codes [g, N, K] float32, and the squared error [N, K] that they leave."""
        if self.dmin is not None and self.m is not None:
            x_gNK = x_gNK + self.dmin.float() * self.m
        scale = self.d.float() * self.s
        codes = rounded(x_gNK, inverse(scale), grid.low, grid.high)
        return codes, (codes * scale).sub_(x_gNK).square_().sum(0)


def _quantize(weight_OI: Tensor, name: str, kind: str) -> BlockTensor:
    if weight_OI.shape[-1] % SUPERBLOCK:
        return simple_blocks(weight_OI, name, FALLBACKS[kind], kind.lower())
    blocks = blocks_of(weight_OI, SUPERBLOCK, name, kind.lower())
    batches = blocks.flatten(0, 1).split(_BATCH)
    codes, *parts = zip(*(_solve(batch, name, kind) for batch in batches), strict=True)
    rows = [torch.cat(part).view(len(blocks), -1) for part in (codes, *parts)]
    d, s, *minima = rows[1:]
    dmin, m = minima or (None, None)
    return BlockTensor(kind, rows[0], d, dmin, s, m)


def _solve(blocks: Tensor, name: str, kind: str) -> tuple[Tensor, ...]:
    """Of superblocks [N, 256]: codes [N, 256] uint8, d [N, 1], s [N, K], and where the type has minima dmin and m."""
    grid = _GRIDS[kind]
    x_gNK = blocks.unflatten(-1, (BLOCK_TYPES[kind].num_scales, -1)).permute(2, 0, 1).contiguous()
    solve = _mirrored if grid.low else _with_minima
    parts = _refined(x_gNK, solve(x_gNK, grid, name, kind), grid)
    codes = (parts.codes(x_gNK, grid)[0] - grid.low).to(torch.uint8).permute(1, 2, 0).flatten(1)
    if parts.dmin is None or parts.m is None:
        return codes, parts.d, parts.s.short()
    return codes, parts.d, parts.s.short(), parts.dmin, parts.m.short()


def _mirrored(x_gNK: Tensor, grid: _Grid, name: str, kind: str) -> _Parts:
    scale = fit_scale(x_gNK, -grid.low)
    low, high = scale.amin(-1, keepdim=True), scale.amax(-1, keepdim=True)
    peak = torch.where(high > -low, high, low)
    # The largest scale gets the s that reaches furthest.
    d = _shared(peak.abs(), -grid.least, name, kind)
    d = torch.where(peak > 0, -d, d)
    return _Parts(d, rounded(scale, inverse(d.float()), grid.least, grid.most))


def _with_minima(x_gNK: Tensor, grid: _Grid, name: str, kind: str) -> _Parts:
    found = fit_range(x_gNK, grid.high)
    d, dmin = (_shared(each.amax(-1, keepdim=True), grid.most, name, kind) for each in found)
    s, m = (
        rounded(each, inverse(of.float()), 0, grid.most) for each, of in zip(found, (d, dmin), strict=True)
    )
    return _Parts(d, s, dmin, m)


def _shared(largest: Tensor, steps: int, name: str, kind: str) -> Tensor:
    """largest / steps in float16, or the next number above it where it was rounded down by more than s makes up for."""
    stored = stored_in_half(largest / steps, name, kind)
    above = (stored.view(torch.int16) + 1).view(torch.float16)
    return torch.where(largest > stored.float() * (steps + 0.5), above, stored)


def _refined(x_gNK: Tensor, parts: _Parts, grid: _Grid) -> _Parts:
    """The integers s and m, or their neighbours, that leave the least squared error in each sub-block."""
    best, least = parts, torch.full_like(parts.s, torch.inf)
    for by_s, by_m in product((0, -1, 1), (0,) if parts.m is None else (0, -1, 1)):
        s = (parts.s + by_s).clamp_(grid.least, grid.most)
        m = None if parts.m is None else (parts.m + by_m).clamp_(0, grid.most)
        error = replace(parts, s=s, m=m).codes(x_gNK, grid)[1]
        better = error < least
        least = torch.where(better, error, least)
        best = replace(
            best,
            s=torch.where(better, s, best.s),
            m=None if m is None or best.m is None else torch.where(better, m, best.m),
        )
    return best
