"""llm_int8: the int8 weights of LLM.int8(), one scale per output; `quantlab.kernels.llm_int8` multiplies by them.

    scale = max |w| over the output;  code = round(127 w / scale)

Codes and scales are those of bitsandbytes 0.50.2's `int8_vectorwise_quant`, which takes the weights in float16.
Source: Dettmers et al. 2022, arXiv:2208.07339, section 2. O outputs, I inputs.
"""

import torch
from torch import Tensor

from quantlab.errors import SchemeError
from quantlab.methods.blocks import blocks_of
from quantlab.numerics.codebook import CodebookTensor

__all__ = ["INT8", "llm_int8"]

INT8 = torch.arange(256, dtype=torch.uint8).view(torch.int8).float() / 127
"""[256] float32: a byte, read as int8, in units of the largest magnitude."""


def llm_int8(weight_OI: Tensor, name: str, *, scale_dtype: torch.dtype = torch.float32) -> CodebookTensor:
    """int8 codes [O, I], as bytes; scale [O, 1] float32, the largest magnitude, whatever `scale_dtype`.

    Error bound: |w - dequantize| <= scale / 254, plus the rounding of w to float16.

    Raises:
        SchemeError: a weight is beyond float16's range.
        CheckpointError: a weight is not finite.
    """
    weight_OI = blocks_of(weight_OI, None, name, "llm_int8").squeeze(-2)
    half = weight_OI.half().float()
    if half.isinf().any():
        raise SchemeError(
            f"llm_int8 takes weights in float16, up to 65504: {name} holds {weight_OI.abs().max():.3g}. "
            f'Use w8, or add "*.{name.rpartition(".")[2]}" to skip.'
        )
    absmax = half.abs().amax(-1, keepdim=True)
    units = half * (127.0 / absmax)
    # An output of zeros: 0 times infinity. Its codes are 0, as its scale is.
    codes = torch.where(absmax == 0, 0.0, units).round().to(torch.int8).view(torch.uint8)
    return CodebookTensor(codes, absmax, INT8.to(codes.device), bits=8, scale_bits=32)
