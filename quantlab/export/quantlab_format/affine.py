"""Kind `affine`: uniform grids, weight = (code - zero_point) * scale."""

from typing import Any

import torch
from torch import Tensor

from quantlab.export.codes import unsigned_codes
from quantlab.export.quantlab_format.plan import Plan
from quantlab.export.quantlab_format.rows import pack_rows, packed
from quantlab.export.shards import TensorType
from quantlab.export.tensors import exactly
from quantlab.methods.solved import Quantized
from quantlab.numerics.affine import QuantizedTensor
from quantlab.schemes import TensorSpec

__all__ = ["affine_plan"]


def affine_plan(shape: tuple[int, ...], spec: TensorSpec, dtype: torch.dtype, *, real: bool) -> Plan:
    """How a matrix of this shape is stored.

    Args:
        dtype: of scales.
        real: its zero points are no whole numbers.
    """
    (rows, width), bits = shape, spec.bits
    scales = (1, 1) if spec.granularity == "tensor" else (rows, width // (spec.group_size or width))
    entry: dict[str, Any] = {"kind": "affine", "bits": bits, "scale": list(scales)}
    tensors = {"codes": packed(rows, width, bits), "scale": TensorType(dtype, scales)}
    if not spec.symmetric:
        entry["zero_point"] = "real" if real else "whole"
        tensors["zero_point"] = TensorType(dtype, scales) if real else packed(*scales, bits)

    def build(quantized: Quantized) -> dict[str, Tensor]:
        assert isinstance(quantized, QuantizedTensor)
        made = {"codes": pack_rows(unsigned_codes(quantized), bits)}
        made["scale"] = exactly(quantized.scale, dtype)
        if quantized.zero_point is not None:
            zero = quantized.zero_point
            made["zero_point"] = exactly(zero, dtype) if real else pack_rows(zero.to(torch.uint8), bits)
        return made

    return Plan(entry, tensors, build)
