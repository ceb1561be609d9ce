"""nf4 and fp4: bitsandbytes' 4-bit tables, blocks of 64 inputs scaled by their largest magnitude.

    scale = max |w| over the block;  code = the table's value nearest to w / scale

Codes and scales are those of bitsandbytes 0.50.2's `quantize_4bit` on the same matrix, bit for bit; it cuts the
flattened matrix into blocks, which is the same where 64 divides the inputs.

nf4_dq and fp4_dq quantize the scales too (double quantization), blocks of 256 scales of the flattened matrix:

    offset = mean of all scales;  absmax = max |scale - offset| over the block
    code = place of round((u + 1) 65535 / 2) in 8-bit dynamic table, u = (scale - offset) / absmax
    scale that is used = table[code] * absmax + offset

The rounding to 65536 steps is how bitsandbytes looks codes up on a CPU, so these are bit for bit its own, given the
same number of threads (the mean is a sum of parts); a search of the table itself, as a GPU may do it, would give about
one scale in 700 the neighbouring code. Codes of weights are chosen from the scale before it was quantized.

Source: Dettmers et al. 2023, arXiv:2305.14314, section 3. O outputs, I inputs, G = I / 64.
"""

from dataclasses import replace
from math import ceil

import torch
from torch import Tensor

from quantlab.errors import SchemeError
from quantlab.methods.blocks import blocks_of
from quantlab.numerics.codebook import CodebookTensor, NestedScales, nearest_codes
from quantlab.numerics.tables import DYNAMIC8, FP4, NF4

__all__ = ["BLOCK_SIZE", "NESTED_SIZE", "fp4", "fp4_dq", "nf4", "nf4_dq"]

BLOCK_SIZE = 64
"""Inputs that share a scale; bitsandbytes' default."""
NESTED_SIZE = 256
"""Scales that share a scale of scales."""

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


def nf4_dq(weight_OI: Tensor, name: str, *, scale_dtype: torch.dtype = torch.float32) -> CodebookTensor:
    """As `nf4`, its scales in 8 bits; `scale` holds what they stand for, `nested` how they are stored.

    Error bound: that of nf4, plus the error of the scale times the value of the code: at most 0.0071 * absmax of its
    block of scales, half the widest gap of the dynamic table, plus half a step of the lookup, 1 / 65535.
    Raises SchemeError too where the mean of the scales is beyond float32.
    """
    return _nested(_quantize(weight_OI, name, "nf4_dq", NF4), name)


def fp4_dq(weight_OI: Tensor, name: str, *, scale_dtype: torch.dtype = torch.float32) -> CodebookTensor:
    """As `fp4`, its scales in 8 bits."""
    return _nested(_quantize(weight_OI, name, "fp4_dq", FP4), name)


def _nested(plain: CodebookTensor, name: str) -> CodebookTensor:
    """The same codes, with scales that were quantized themselves."""
    flat, table = plain.scale.flatten(), DYNAMIC8.to(plain.scale.device)
    offset, count = flat.mean(), ceil(flat.numel() / NESTED_SIZE)
    blocks = torch.nn.functional.pad(flat - offset, (0, count * NESTED_SIZE - flat.numel())).view(count, -1)
    absmax = blocks.abs().amax(-1)
    codes = _dynamic_codes(blocks, absmax.unsqueeze(-1), table)
    used = (table[codes.long()] * absmax.unsqueeze(-1) + offset).flatten()[: flat.numel()]
    if not used.isfinite().all():
        raise SchemeError(
            f"scales must have a finite mean for double quantization: those of {name} reach {flat.max():.3g}. "
            "Use a format without _dq."
        )
    nested = NestedScales(codes.flatten()[: flat.numel()], absmax, offset, table)
    bits = 32 * (count + 1)
    return replace(plain, scale=used.view_as(plain.scale), scale_bits=8, tensor_bits=bits, nested=nested)


def _dynamic_codes(blocks: Tensor, absmax: Tensor, table: Tensor) -> Tensor:
    """Places in the 8-bit table, uint8, of blocks [n, 256] in units of their absmax [n, 1]."""
    inverse = 1.0 / absmax
    # Scales that are all the mean, or within float32's subnormal numbers of it: bitsandbytes' code is 0.
    units = torch.where(inverse.isinf(), -1.0, blocks * inverse)
    steps = ((units + 1.0) * 32767.5 + 0.5).int()
    return nearest_codes((steps.double() / 65535 * 2 - 1).float(), table)


def _quantize(weight_OI: Tensor, name: str, format_name: str, values: Tensor) -> CodebookTensor:
    blocks = blocks_of(weight_OI, BLOCK_SIZE, name, format_name)
    absmax = blocks.abs().amax(-1)
    # A product with the inverse, not a quotient: near a midpoint the two round to different codes.
    units = blocks * (1.0 / absmax.clamp(min=_SMALLEST)).unsqueeze(-1)
    codes = nearest_codes(units, values).flatten(-2)
    return CodebookTensor(codes, absmax, values.to(absmax.device), bits=4, scale_bits=32)
