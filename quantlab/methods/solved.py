"""What a weight method makes of one matrix."""

from dataclasses import dataclass, replace

from quantlab.numerics.affine import QuantizedTensor
from quantlab.numerics.block import BlockTensor
from quantlab.numerics.codebook import CodebookTensor

__all__ = ["Quantized", "Solved"]

Quantized = QuantizedTensor | CodebookTensor | BlockTensor
"""Codes and what they stand for: all have `dequantize()` [O, I] and `storage_bits(scale_bits)`."""


@dataclass(frozen=True)
class Solved:
    """Codes of one matrix, and how they came about."""

    quantized: Quantized
    note: str = ""
    """Every fallback that was taken, in words for the record; empty where the method ran as asked."""

    def noted(self, note: str) -> "Solved":
        """The same with a further note in front, where there is one."""
        return replace(self, note="; ".join(filter(None, (note, self.note))))
