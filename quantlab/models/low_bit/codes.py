"""Decoded codes as kernels take them, and the grid that they are on."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantlab.methods.solved import Quantized
from quantlab.numerics.affine import QuantizedTensor
from quantlab.numerics.codebook import CodebookTensor
from quantlab.numerics.qtype import QType
from quantlab.reading.decoded import Decoded
from quantlab.schemes import TensorSpec, WeightFormat

__all__ = ["DecodedTensor", "as_quantized", "as_tensor", "grid_of"]


@dataclass(frozen=True)
class DecodedTensor:
    """A matrix with a minimum in each group, as GGUF has them: `real` of what was decoded, on torch's side."""

    decoded: Decoded

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.decoded.bits

    def dequantize(self) -> Tensor:
        """The real matrix [O, I], float32."""
        return torch.from_numpy(self.decoded.real())


def as_quantized(decoded: Decoded) -> Quantized | DecodedTensor:
    """Decoded codes as kernels take them."""
    codes, scale = as_tensor(decoded.codes_OI), as_tensor(decoded.scale_OG)
    if decoded.table is not None:
        return CodebookTensor(codes, scale, as_tensor(decoded.table), decoded.bits, scale_bits=32)
    if decoded.offset_OG is not None:
        return DecodedTensor(decoded)
    if decoded.zero_OG is None:
        # uint8 wraps around: read as int8, code - 2^(b-1) is itself.
        signed = (codes - 2 ** (decoded.bits - 1)).view(torch.int8)
        return QuantizedTensor(signed, scale, None, QType(decoded.bits, full_range=True))
    zero, qtype = as_tensor(decoded.zero_OG), QType(decoded.bits, symmetric=False)
    # Real zero points may be whole by chance, and lie where no integer does.
    whole = bool((zero == zero.round().clamp(qtype.qmin, qtype.qmax)).all())
    return QuantizedTensor(codes, scale, zero.int() if whole else zero, qtype)


def grid_of(quantized: Quantized | DecodedTensor) -> TensorSpec | WeightFormat:
    """The grid of codes that no recipe speaks of."""
    if not isinstance(quantized, QuantizedTensor):
        return WeightFormat("table", quantized.bits)
    rows, groups = quantized.scale.shape
    symmetric, bits = quantized.qtype.symmetric, quantized.qtype.bits
    if groups == 1:
        return TensorSpec(bits, "channel" if rows > 1 else "tensor", symmetric=symmetric)
    return TensorSpec(bits, "group", quantized.codes.shape[1] // groups, symmetric)


def as_tensor(array: NDArray[Any]) -> Tensor:
    """The same values in memory that may be written, as torch asks."""
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))
