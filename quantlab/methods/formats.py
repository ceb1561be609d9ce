"""Formats with an arithmetic of their own: one function, and the table of what it calls. O outputs, I inputs."""

from typing import Protocol

import torch
from torch import Tensor

from quantlab.methods.codebooks import fp4, fp4_dq, nf4, nf4_dq
from quantlab.methods.floats import fp8, fp8e5m2, mxfp4, mxfp6, mxfp6e3m2, nvfp4
from quantlab.methods.ggml import q4_0, q4_1, q5_0, q5_1, q8_0
from quantlab.methods.k_quants import SUPERBLOCK, q3_k, q4_k, q5_k, q6_k
from quantlab.methods.llm_int8 import llm_int8
from quantlab.methods.solved import Solved
from quantlab.numerics.block import BlockTensor
from quantlab.numerics.codebook import CodebookTensor
from quantlab.schemes import WeightFormat

__all__ = ["FORMATS", "quantize_format"]


class Quantizer(Protocol):
    """What stands in the table."""

    def __call__(
        self, weight_OI: Tensor, name: str, *, scale_dtype: torch.dtype
    ) -> CodebookTensor | BlockTensor:
        """Codes of one matrix; `name` is its place in the model, for messages."""


FORMATS: dict[str, Quantizer] = {
    "nf4": nf4,
    "fp4": fp4,
    "nf4_dq": nf4_dq,
    "fp4_dq": fp4_dq,
    "fp8": fp8,
    "fp8e5m2": fp8e5m2,
    "mxfp4": mxfp4,
    "mxfp6": mxfp6,
    "mxfp6e3m2": mxfp6e3m2,
    "nvfp4": nvfp4,
    "llm_int8": llm_int8,
    "q8_0": q8_0,
    "q6_k": q6_k,
    "q5_k": q5_k,
    "q5_1": q5_1,
    "q5_0": q5_0,
    "q4_k": q4_k,
    "q4_1": q4_1,
    "q4_0": q4_0,
    "q3_k": q3_k,
}
"""Name of a `WeightFormat` to the function that quantizes to it."""


def quantize_format(
    weight_OI: Tensor, fmt: WeightFormat, *, scale_dtype: torch.dtype = torch.float32, name: str = "weight"
) -> Solved:
    """Codes of one matrix in a format.

    Args:
        weight_OI: any float dtype; computed in float32.
        scale_dtype: dtype of the scales of fp8 and fp8e5m2; the other formats fix their own.
        name: the matrix's place in the model, for messages.

    Raises:
        SchemeError: the blocks of the format do not divide I, or a scale or weight is out of its range.
        CheckpointError: a weight is not finite.
    """
    quantized = FORMATS[fmt.name](weight_OI, name, scale_dtype=scale_dtype)
    return Solved(quantized, _fallback(quantized, fmt.name))


def _fallback(quantized: CodebookTensor | BlockTensor, asked: str) -> str:
    """The type that a matrix took instead of the one asked for, in words; empty where there is none."""
    if not isinstance(quantized, BlockTensor) or quantized.kind.lower() == asked:
        return ""
    width = quantized.codes.shape[-1]
    return f"width {width} is no multiple of {SUPERBLOCK}: stored as {quantized.kind}"
