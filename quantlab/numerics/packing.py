"""Packing: codes of 2 to 8 bits as a dense stream of bits, and back, exactly.

Code i occupies bits i * bits .. (i + 1) * bits - 1 of the stream, low bit first; bit j of the stream is bit j % 8 of
byte j // 8. Negative codes are stored as two's complement of `bits` bits. Eight codes fill `bits` whole bytes, also
for 3, 5, 6 and 7 bits; only the end of the stream is padded, to a whole byte.
"""

import math

import torch
from torch import Tensor

__all__ = ["pack", "packed_bytes", "unpack"]

_IN_A_WORD = 8


def packed_bytes(num_codes: int, bits: int) -> int:
    """Bytes of a packed stream."""
    return (num_codes * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """The bit stream of integer codes of any shape, uint8, [packed_bytes(codes.numel(), bits)].

    Codes are within [-2^(bits-1), 2^bits - 1]: signed, or around a zero point.
    """
    assert 2 <= bits <= 8, f"bits must be 2 to 8, found {bits}"
    flat = codes.flatten()
    if flat.numel():
        low, high = (int(end) for end in flat.aminmax())
        assert -(2 ** (bits - 1)) <= low and high < 2**bits, (
            f"codes must fit {bits} bits, found {low}..{high}"
        )
    eights = torch.nn.functional.pad(flat, (0, -flat.numel() % _IN_A_WORD)).view(-1, _IN_A_WORD)
    words = torch.zeros(len(eights), dtype=torch.int64, device=codes.device)
    stream = torch.empty(len(eights), bits, dtype=torch.uint8, device=codes.device)
    # One code of every word at a time: widened all at once, codes would take sixteen times their memory.
    for i in range(_IN_A_WORD):
        # At 8 bits the top code reaches the sign bit, which is a bit like any other.
        words |= (eights[:, i].to(torch.int64) & (2**bits - 1)) << (i * bits)
    for i in range(bits):
        stream[:, i] = (words >> (8 * i)) & 0xFF
    return stream.flatten()[: packed_bytes(flat.numel(), bits)]


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...], dtype: torch.dtype = torch.int8) -> Tensor:
    """The codes of a stream made by `pack`, in their shape; int8 reads them as signed, uint8 as unsigned."""
    assert dtype in (torch.int8, torch.uint8), f"codes are int8 or uint8, found {dtype}"
    num_codes = math.prod(shape)
    assert packed.numel() == packed_bytes(num_codes, bits), (
        f"stream of {packed.numel()} bytes for shape {shape}"
    )
    stream = torch.nn.functional.pad(packed.to(torch.int64), (0, -packed.numel() % bits))
    words = (stream.view(-1, bits) << _shifts(8, bits, packed)).sum(-1)
    codes = (words.unsqueeze(-1) >> _shifts(bits, _IN_A_WORD, packed)) & (2**bits - 1)
    if dtype == torch.int8:
        codes = codes - ((codes >> (bits - 1)) << bits)
    unpacked: Tensor = codes.flatten()[:num_codes].reshape(shape).to(dtype)
    return unpacked


def _shifts(step: int, count: int, like: Tensor) -> Tensor:
    """0, step, 2 * step, ...: where each piece begins in a word."""
    return torch.arange(0, step * count, step, device=like.device)
