"""Codes of a scheme, one linear at a time: what a writer asks for, and the digests that the MANIFEST keeps of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from quantlab.methods.solved import Quantized, Solved
from quantlab.numerics.affine import QuantizedTensor
from quantlab.numerics.codebook import CodebookTensor
from quantlab.reading.decoded import Decoded

__all__ = ["Codes", "as_decoded", "unsigned_codes"]


@dataclass
class Codes:
    """Chooses, or fetches, the codes of one linear when a writer asks, and remembers their digests."""

    solve: Callable[[str], Solved]
    """Codes of one linear; scales already rounded to the stored dtype."""
    stored: Callable[[str], str] = str
    """Name of a linear -> its name in the files that are written."""
    digests: dict[str, Mapping[str, str]] = field(default_factory=dict)
    """Of every linear that was asked for, by its stored name: SHA-256 of codes and of scales (`Decoded.digests`)."""
    notes: dict[str, str] = field(default_factory=dict)
    """Of linears whose method took another way than asked: how, in words."""

    def __call__(self, name: str) -> Quantized:
        """The codes of one linear."""
        solved = self.solve(name)
        self.digests[self.stored(name)] = as_decoded(solved.quantized).digests()
        if solved.note:
            self.notes[name] = solved.note
        return solved.quantized


def as_decoded(quantized: Quantized) -> Decoded:
    """What a decoder must find in a folder that holds these codes."""
    scale = _numpy(quantized.scale)
    if isinstance(quantized, CodebookTensor):
        return Decoded(_codes(quantized.codes), quantized.bits, scale, table=_numpy(quantized.values))
    if isinstance(quantized, QuantizedTensor):
        qtype, zero = quantized.qtype, quantized.zero_point
        codes = _codes(unsigned_codes(quantized))
        return Decoded(codes, qtype.bits, scale, zero_OG=None if zero is None else _numpy(zero))
    offset = quantized.offset
    return Decoded(
        _codes(quantized.codes), quantized.bits, scale, offset_OG=None if offset is None else _numpy(offset)
    )


def unsigned_codes(quantized: QuantizedTensor) -> Tensor:
    """Codes [O, I] as they count from 0, uint8 on the CPU: those of a symmetric grid plus 2^(b-1)."""
    codes = quantized.codes.cpu().contiguous()
    # uint8 wraps around: -2^(b-1) + 2^(b-1) is 0.
    return codes.view(torch.uint8) + 2 ** (quantized.qtype.bits - 1) if quantized.qtype.symmetric else codes


def _codes(codes: Tensor) -> np.ndarray:
    return codes.cpu().contiguous().numpy()


def _numpy(values: Tensor) -> np.ndarray:
    return values.detach().float().cpu().contiguous().numpy()
