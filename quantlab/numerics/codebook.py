"""Codebooks: a code is a place in a table of real values, scaled by its group. O outputs, I inputs, G groups."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.numerics.tables import FloatFormat

__all__ = ["CodebookTensor", "NestedScales", "float_codes", "nearest_codes"]


@dataclass(frozen=True)
class NestedScales:
    """Scales that are quantized themselves: scale = values[codes] * absmax + offset, each step rounded to float32."""

    codes: Tensor
    """[O * G] uint8, places in `values`, output after output."""
    absmax: Tensor
    """[ceil(O * G / 256)] float32, what one unit of the table means in each 256 neighbours."""
    offset: Tensor
    """Scalar float32."""
    values: Tensor
    """[256] float32, the table."""


@dataclass(frozen=True)
class CodebookTensor:
    """A matrix quantized to a table of values."""

    codes: Tensor
    """[O, I] uint8, places in `values`."""
    scale: Tensor
    """[O, G] float32, what one unit of the table means in each group of I / G neighbours along the input."""
    values: Tensor
    """[2^bits] float32, the table."""
    bits: int
    """Bits of a code."""
    scale_bits: int
    """Bits in which the format stores one scale."""
    tensor_bits: int = 0
    """Bits that the format stores once for the whole matrix."""
    nested: NestedScales | None = None
    """How `scale` itself is stored, where that is in low bits."""

    def dequantize(self) -> Tensor:
        """The real matrix [O, I], float32: values[codes] * scale."""
        real = self.values[self.codes.long()].view(*self.scale.shape, -1)
        return (real * self.scale.unsqueeze(-1)).flatten(-2)

    def storage_bits(self, scale_bits: int) -> int:
        """Bits of codes and scales packed densely; the format fixes how a scale is stored, whatever `scale_bits`."""
        packed = self.codes.numel() * self.bits + self.scale.numel() * self.scale_bits
        return packed + self.tensor_bits


def nearest_codes(x: Tensor, values: Tensor) -> Tensor:
    """Codes of the values nearest to x, uint8, same shape; half way between two values the lower one is taken.

    Args:
        x: float32, in units of the table.
        values: float32, finite. Where two codes mean the same value, the lower code stands for x at or below it.
    """
    ascending, code = values.to(x.device).sort(stable=True)
    midpoints = (ascending[:-1] + ascending[1:]) / 2
    return code.to(torch.uint8)[torch.bucketize(x.contiguous(), midpoints, out_int32=True)]


def float_codes(x: Tensor, fmt: FloatFormat) -> Tensor:
    """Codes of x rounded to a small float, uint8, same shape: to nearest, half to even, beyond the largest saturated.

    Args:
        x: float32, in units of the format; -0.0 keeps its sign.
    """
    magnitudes = fmt.magnitudes().to(x.device)
    # Exact in float32, so a tie is a tie; of two neighbouring codes one is even.
    midpoints = (magnitudes[:-1] + magnitudes[1:]) / 2
    size = x.abs().contiguous()
    below = torch.bucketize(size, midpoints, out_int32=True)
    above = torch.bucketize(size, midpoints, out_int32=True, right=True)
    even = torch.where(below % 2 == 0, below, above)
    return (even + (x.signbit().int() << fmt.bits - 1)).to(torch.uint8)
