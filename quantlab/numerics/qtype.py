"""QType: the integers that a quantized value may take.

    symmetric    signed codes, zero point 0: scale = absmax / (2^(bits-1) - 1)
    asymmetric   codes 0 .. 2^bits - 1 around a zero point: scale = (max - min) / (2^bits - 1)

Weights may use the code -2^(bits-1), as integer formats do; activations and logits may not, so that their grid
is its own mirror image. What is never negative (probabilities, lambda) has the codes 0 .. 2^bits - 1 without a zero
point, which are those of a zero point at 0.
"""

from dataclasses import dataclass

import torch

from quantlab.schemes import TensorSpec

__all__ = ["QType"]


@dataclass(frozen=True)
class QType:
    """A uniform integer grid."""

    bits: int
    """Bits that a code carries, 2..8."""
    symmetric: bool = True
    """Signed around zero, or unsigned around a zero point."""
    full_range: bool = False
    """Whether a symmetric grid holds the code -2^(bits-1) too."""

    def __post_init__(self) -> None:
        assert 2 <= self.bits <= 8, f"bits must be 2 to 8, found {self.bits}"

    @classmethod
    def of_weights(cls, spec: TensorSpec) -> "QType":
        """The grid of a weight's codes."""
        return cls(spec.bits, spec.symmetric, full_range=spec.symmetric)

    @classmethod
    def of_activations(cls, spec: TensorSpec) -> "QType":
        """The grid of codes of inputs, of queries, keys and values, and of logits."""
        return cls(spec.bits, spec.symmetric)

    @property
    def qmax(self) -> int:
        """The largest code."""
        return (1 << self.bits - 1) - 1 if self.symmetric else (1 << self.bits) - 1

    @property
    def qmin(self) -> int:
        """The smallest code."""
        if not self.symmetric:
            return 0
        return -self.qmax - 1 if self.full_range else -self.qmax

    @property
    def dtype(self) -> torch.dtype:
        """The container of a code: int8 signed, uint8 around a zero point."""
        return torch.int8 if self.symmetric else torch.uint8
