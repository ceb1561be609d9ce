"""Codebooks: a code is a place in a table of real values, scaled by its group. O outputs, I inputs, G groups."""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["CodebookTensor"]


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

    def dequantize(self) -> Tensor:
        """The real matrix [O, I], float32: values[codes] * scale."""
        real = self.values[self.codes.long()].unflatten(-1, (self.scale.shape[-1], -1))
        dequantized: Tensor = (real * self.scale.unsqueeze(-1)).flatten(-2)
        return dequantized

    def storage_bits(self, scale_bits: int) -> int:
        """Bits of codes and scales packed densely; the format fixes how a scale is stored, whatever `scale_bits`."""
        return self.codes.numel() * self.bits + self.scale.numel() * self.scale_bits
