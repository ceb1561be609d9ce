"""The bytes of GGUF's block types, as ggml has them (`ggml-common.h`, `ggml-quants.c`).

A row of a matrix is its blocks one after the other. Numbers of several bytes are little-endian, f16 is IEEE half.
x[a..b] are bits a to b of x, bit 0 the lowest; code i stands for weight i of the block. A block is

    Q8_0    34 bytes   0 d f16    2 + i: code_i - 128 as int8, i < 32
    Q4_0    18 bytes   0 d f16    2 + j: code_j in bits 0..3, code_(j+16) in bits 4..7, j < 16
    Q4_1    20 bytes   0 d f16    2 min f16   4 + j: as Q4_0
    Q5_0    22 bytes   0 d f16    2 high bits, uint32: bit i is code_i[4], i < 32
                       6 + j: code_j[0..3] in bits 0..3, code_(j+16)[0..3] in bits 4..7, j < 16
    Q5_1    24 bytes   0 d f16    2 min f16   4 high bits as Q5_0   8 + j: as Q5_0

    in the K types l < 32 counts neighbours, and 256 weights are

    Q6_K   210 bytes   code of weight 128 h + 32 k + l, h < 2, k < 4:
                       0 + 64 h + 32 (k mod 2) + l: code[0..3], in bits 0..3 for k < 2, 4..7 for the others
                       128 + 32 h + l: code[4..5] in bits 2 k .. 2 k + 1
                       192 + g: s_g as int8, g < 16    208 d f16
    Q5_K   176 bytes   0 d f16    2 dmin f16   4 scales, 12 bytes
                       code of weight 64 c + 32 k + l, c < 4, k < 2:
                       16 + l: code[4] in bit 2 c + k    48 + 32 c + l: code[0..3] in bits 4 k .. 4 k + 3
    Q4_K   144 bytes   0 d f16    2 dmin f16   4 scales, 12 bytes
                       16 + 32 c + l: code of weight 64 c + 32 k + l in bits 4 k .. 4 k + 3
    Q3_K   110 bytes   code of weight 128 h + 32 k + l, h < 2, k < 4:
                       0 + l: code[2] in bit 4 h + k     32 + 32 h + l: code[0..1] in bits 2 k .. 2 k + 1
                       96 scales, 12 bytes               108 d f16

    scales of Q4_K and Q5_K, g < 4:  byte g      s_g in bits 0..5,         s_(g+4)[4..5] in bits 6..7
                                     byte 4 + g  m_g in bits 0..5,         m_(g+4)[4..5] in bits 6..7
                                     byte 8 + g  s_(g+4)[0..3] in bits 0..3, m_(g+4)[0..3] in bits 4..7
    scales of Q3_K, t = s + 32:      byte g      t_g[0..3] in bits 0..3,   t_(g+8)[0..3] in bits 4..7, g < 8
                                     byte 8 + g  t_(g+4r)[4..5] in bits 2 r .. 2 r + 1, g < 4, r < 4

and means (code - 2^(b-1)) * d; with min code * d + min; with s_g of its sub-block (code - 2^(b-1)) * (d * s_g), and
with minima code * (d * s_g) - (dmin * m_g); each operation rounded to float32. Sub-blocks are 16 neighbours in Q6_K
and Q3_K, 32 in Q5_K and Q4_K. O outputs, N blocks of the matrix.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from quantlab.numerics.block import BLOCK_TYPES, BlockTensor

__all__ = ["block_bytes"]

Bytes = NDArray[np.uint8]


def block_bytes(tensor: BlockTensor) -> Bytes:
    """The rows [O, bytes of a row], as a GGUF file holds them."""
    of = BLOCK_TYPES[tensor.kind]
    codes = tensor.codes.cpu().contiguous().numpy().reshape(-1, of.block_size)
    blocks: Bytes = np.concatenate(_LAYOUTS[tensor.kind](tensor, codes), axis=1)
    assert blocks.shape[1] == of.num_bytes
    rows: Bytes = blocks.reshape(len(tensor.codes), -1)
    return rows


def _planes(codes: Bytes, runs: int, parts: int) -> Bytes:
    """Codes of 8 / `parts` bits packed within each of `runs` runs: byte l holds code l of every part, the first lowest.

    Higher bits of a code are left out.
    """
    bits = 8 // parts
    split = codes.reshape(len(codes), runs, parts, -1) & np.uint8(2**bits - 1)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    packed: Bytes = np.bitwise_or.reduce(split << shifts, axis=2).reshape(len(codes), -1)
    return packed


def _halves(values: Tensor | None) -> Bytes:
    """float16 numbers [O, S] as bytes [N, 2]."""
    assert values is not None
    return values.cpu().contiguous().numpy().astype("<f2", copy=False).reshape(-1, 1).view(np.uint8)


def _integers(values: Tensor | None, num: int) -> NDArray[np.int16]:
    """Integers of sub-blocks [O, G] as [N, num]."""
    assert values is not None
    return values.cpu().contiguous().numpy().reshape(-1, num)


def _scales_with_minima(tensor: BlockTensor) -> Bytes:
    s, m = (_integers(each, 8).astype(np.uint8) for each in (tensor.sub_scales, tensor.sub_mins))
    high = [each[:, :4] | (each[:, 4:] >> 4) << 6 for each in (s, m)]
    return np.concatenate([*high, (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4], axis=1)


def _signed_scales(tensor: BlockTensor) -> Bytes:
    t = (_integers(tensor.sub_scales, 16) + 32).astype(np.uint8)
    return np.concatenate([_planes(t, 1, 2), _planes(t >> np.uint8(4), 1, 4)], axis=1)


def _q8_0(tensor: BlockTensor, codes: Bytes) -> list[Bytes]:
    # In bytes that wrap around, adding 128 is taking 128 away.
    return [_halves(tensor.d), codes ^ np.uint8(128)]


def _q4(tensor: BlockTensor, codes: Bytes) -> list[Bytes]:
    minimum = [] if tensor.dmin is None else [_halves(tensor.dmin)]
    return [_halves(tensor.d), *minimum, _planes(codes, 1, 2)]


def _q5(tensor: BlockTensor, codes: Bytes) -> list[Bytes]:
    *head, low = _q4(tensor, codes)
    return [*head, _planes(codes >> np.uint8(4), 4, 8), low]


def _q6_k(tensor: BlockTensor, codes: Bytes) -> list[Bytes]:
    scales = _integers(tensor.sub_scales, 16).astype(np.int8).view(np.uint8)
    return [_planes(codes, 2, 2), _planes(codes >> np.uint8(4), 2, 4), scales, _halves(tensor.d)]


def _q4_k(tensor: BlockTensor, codes: Bytes) -> list[Bytes]:
    head = [_halves(tensor.d), _halves(tensor.dmin), _scales_with_minima(tensor)]
    return [*head, _planes(codes, 4, 2)]


def _q5_k(tensor: BlockTensor, codes: Bytes) -> list[Bytes]:
    *head, low = _q4_k(tensor, codes)
    return [*head, _planes(codes >> np.uint8(4), 1, 8), low]


def _q3_k(tensor: BlockTensor, codes: Bytes) -> list[Bytes]:
    return [
        _planes(codes >> np.uint8(2), 1, 8),
        _planes(codes, 2, 4),
        _signed_scales(tensor),
        _halves(tensor.d),
    ]


_LAYOUTS: dict[str, Callable[[BlockTensor, Bytes], list[Bytes]]] = {
    "Q8_0": _q8_0,
    "Q5_1": _q5,
    "Q5_0": _q5,
    "Q4_1": _q4,
    "Q4_0": _q4,
    "Q6_K": _q6_k,
    "Q5_K": _q5_k,
    "Q4_K": _q4_k,
    "Q3_K": _q3_k,
}
"""Name of a type to the parts of its blocks [N, ..] in their order."""
