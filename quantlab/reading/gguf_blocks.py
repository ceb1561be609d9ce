"""GGUF's block types, decoded: codes and what they mean, from bytes alone. No torch.

Written from the layout in the docstring of `quantlab.export.gguf_blocks`, and sharing no code with it: every weight of
a block has an address (byte, lowest bit), computed from its number alone, and so have the higher bits of its code.
O outputs, I inputs, N blocks, G scales in a row.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantlab.errors import CheckpointError
from quantlab.reading.decoded import Decoded

__all__ = ["KINDS", "unpack"]

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
Address = Callable[[Integers], tuple[Integers, Integers]]
"""Number of a weight in its block -> the byte, and the lowest bit in it."""


@dataclass(frozen=True)
class Kind:
    """How the blocks of one type are read."""

    num_bytes: int
    num_weights: int
    bits: int
    low_bits: int
    """Lower bits of a code, which have an address of their own."""
    low: Address
    high: Address | None = None
    scales: Callable[[Bytes], tuple[Floats, Floats | None]] = lambda blocks: (_half(blocks, 0), None)
    """Blocks [N, num_bytes] -> scale and offset, [N, scales of a block]."""


def unpack(kind: str, rows: Bytes) -> Decoded:
    """Codes, scales and offsets of rows [O, bytes of a row].

    Raises:
        CheckpointError: an unknown type, rows that are no whole blocks, or a scale that is not finite.
    """
    if kind not in KINDS:
        raise CheckpointError(f"block types that can be decoded are {', '.join(KINDS)}: found {kind!r}.")
    of = KINDS[kind]
    if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] == 0 or rows.shape[1] % of.num_bytes:
        raise CheckpointError(
            f"rows of {kind} must be whole blocks of {of.num_bytes} bytes: found {rows.dtype} {list(rows.shape)}."
        )
    blocks = np.ascontiguousarray(rows).reshape(-1, of.num_bytes)
    scale, offset = of.scales(blocks)
    for each in (scale,) if offset is None else (scale, offset):
        if not np.isfinite(each).all():
            bad = int(np.argmin(np.isfinite(each).all(axis=1)))
            raise CheckpointError(
                f"scales of {kind} must be finite: block {bad} of {len(blocks)} has one that is not."
            )
    num_outputs = len(rows)
    return Decoded(
        _codes(blocks, of).reshape(num_outputs, -1),
        of.bits,
        scale.reshape(num_outputs, -1),
        offset_OG=None if offset is None else offset.reshape(num_outputs, -1),
    )


def _codes(blocks: Bytes, of: Kind) -> Bytes:
    """Codes [N, weights of a block]."""
    number = np.arange(of.num_weights)
    codes = _bits_at(blocks, *of.low(number), of.low_bits)
    if of.high is not None:
        codes |= _bits_at(blocks, *of.high(number), of.bits - of.low_bits) << np.uint8(of.low_bits)
    # int8 codes count from -128, ours from 0.
    return codes + np.uint8(128) if of.bits == 8 else codes


def _bits_at(blocks: Bytes, byte: Integers, bit: Integers, num_bits: int) -> Bytes:
    return (blocks[:, byte] >> bit.astype(np.uint8)) & np.uint8(2**num_bits - 1)


def _half(blocks: Bytes, at: int) -> Floats:
    """The float16 number at a byte of every block, [N, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _with_minimum(blocks: Bytes) -> tuple[Floats, Floats | None]:
    return _half(blocks, 0), _half(blocks, 2)


def _six_bits(blocks: Bytes) -> tuple[Floats, Floats | None]:
    """Scales and minima of Q4_K and Q5_K: sub-blocks 0..3 have whole bytes, 4..7 a nibble and two borrowed bits."""
    field = blocks[:, 4:16].astype(np.int16)
    s, m = np.empty((2, len(blocks), 8), dtype=np.float32)
    for g in range(4):
        s[:, g], m[:, g] = field[:, g] % 64, field[:, 4 + g] % 64
        s[:, 4 + g] = field[:, 8 + g] % 16 + field[:, g] // 64 * 16
        m[:, 4 + g] = field[:, 8 + g] // 16 + field[:, 4 + g] // 64 * 16
    return _half(blocks, 0) * s, -(_half(blocks, 2) * m)


def _eight_bits(blocks: Bytes) -> tuple[Floats, Floats | None]:
    return _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32), None


def _signed_six_bits(blocks: Bytes) -> tuple[Floats, Floats | None]:
    g = np.arange(16)
    low = _bits_at(blocks, 96 + g % 8, g // 8 * 4, 4)
    high = _bits_at(blocks, 104 + g % 4, g // 4 * 2, 2)
    return _half(blocks, 108) * ((low + high * np.uint8(16)).astype(np.float32) - 32), None


def _nibble(start: int) -> Address:
    """Byte j holds weights j and j + 16."""
    return lambda i: (start + i % 16, i // 16 * 4)


def _bit(start: int) -> Address:
    """One bit after the other."""
    return lambda i: (start + i // 8, i % 8)


def _nibble_of_64(start: int) -> Address:
    """32 bytes hold 64 weights, the first 32 in their lower halves."""
    return lambda i: (start + i // 64 * 32 + i % 32, i // 32 % 2 * 4)


def _bit_of_32(start: int) -> Address:
    """Bit k of byte l belongs to weight 32 k + l."""
    return lambda i: (start + i % 32, i // 32)


def _pair_of_128(start: int) -> Address:
    """32 bytes hold two bits of each of 128 weights."""
    return lambda i: (start + i // 128 * 32 + i % 32, i // 32 % 4 * 2)


def _nibble_of_128(start: int) -> Address:
    """64 bytes hold 128 weights, the first 64 in their lower halves."""
    return lambda i: (start + i // 128 * 64 + i % 64, i // 64 % 2 * 4)


KINDS: dict[str, Kind] = {
    "Q8_0": Kind(34, 32, 8, 8, lambda i: (2 + i, 0 * i)),
    "Q5_1": Kind(24, 32, 5, 4, _nibble(8), _bit(4), _with_minimum),
    "Q5_0": Kind(22, 32, 5, 4, _nibble(6), _bit(2)),
    "Q4_1": Kind(20, 32, 4, 4, _nibble(4), None, _with_minimum),
    "Q4_0": Kind(18, 32, 4, 4, _nibble(2)),
    "Q6_K": Kind(210, 256, 6, 4, _nibble_of_128(0), _pair_of_128(128), _eight_bits),
    "Q5_K": Kind(176, 256, 5, 4, _nibble_of_64(48), _bit_of_32(16), _six_bits),
    "Q4_K": Kind(144, 256, 4, 4, _nibble_of_64(16), None, _six_bits),
    "Q3_K": Kind(110, 256, 3, 2, _pair_of_128(32), _bit_of_32(0), _signed_six_bits),
}
"""Name of a ggml type to how it is read."""
