"""nf4 and fp4: bitsandbytes' 4-bit tables, blocks of 64 inputs scaled by their largest magnitude.

    scale = max |w| over the block;  code = the table's value nearest to w / scale

Codes and scales are those of bitsandbytes 0.50.2's `quantize_4bit` on the same matrix, bit for bit; it cuts the
flattened matrix into blocks, which is the same where 64 divides the inputs. Source: Dettmers et al. 2023,
arXiv:2305.14314, section 3. O outputs, I inputs, G = I / 64.
"""

import torch
from torch import Tensor

from quantlab.methods.blocks import blocks_of
from quantlab.numerics.codebook import CodebookTensor, nearest_codes
from quantlab.numerics.tables import FP4, NF4

__all__ = ["BLOCK_SIZE", "fp4", "nf4"]

BLOCK_SIZE = 64
"""Inputs that share a scale; bitsandbytes' default."""

_SMALLEST = 1e-38
"""A block whose largest magnitude lies below is divided by this instead, as bitsandbytes does."""


def nf4(weight_OI: Tensor, name: str, *, scale_dtype: torch.dtype = torch.float32) -> CodebookTensor:
    """Codes of the normal-float table, [O, I]; scale [O, G] float32, whatever `scale_dtype`: the format fixes it.

    Error bound: |w - dequantize| <= 0.152 * scale, half the widest gap of the table (-1 to -0.696), plus rounding.
    Raises SchemeError where 64 does not divide I, CheckpointError where a weight is not finite.
    """
    return _quantize(weight_OI, name, "nf4", NF4)


def fp4(weight_OI: Tensor, name: str, *, scale_dtype: torch.dtype = torch.float32) -> CodebookTensor:
    """As `nf4`, with the table of bitsandbytes' 4-bit float.

    Error bound: |w - dequantize| <= scale / 6, half the gap between 2/3 and 1, plus rounding.
    """
    return _quantize(weight_OI, name, "fp4", FP4)


def _quantize(weight_OI: Tensor, name: str, format_name: str, values: Tensor) -> CodebookTensor:
    blocks = blocks_of(weight_OI, BLOCK_SIZE, name, format_name)
    absmax = blocks.abs().amax(-1)
    # A product with the inverse, not a quotient: near a midpoint the two round to different codes.
    units = blocks * (1.0 / absmax.clamp(min=_SMALLEST)).unsqueeze(-1)
    codes = nearest_codes(units, values).flatten(-2)
    return CodebookTensor(codes, absmax, values.to(absmax.device), bits=4, scale_bits=32)
