"""Small floats as weights: FP8 per output channel, and the block formats MXFP4, MXFP6 and NVFP4.

    fp8, fp8e5m2     scale = absmax / largest value of the format, in the scale dtype
    mxfp4, mxfp6...  scale = 2^(floor(log2 absmax) - max_exponent), stored as E8M0; blocks of 32
    nvfp4            scale = e4m3(absmax / 6 / t) * t with t = (absmax of the matrix) / (6 * 448); blocks of 16

The code of w is w / scale rounded to nearest, half to even; what lies beyond the largest value saturates.
Sources: OCP FP8 v1.0 (Micikevicius et al. 2022, arXiv:2209.05433); OCP Microscaling Formats (MX) v1.0, section 6.3;
NVIDIA, Pretraining Large Language Models with NVFP4, arXiv:2509.25149, section 2. O outputs, I inputs, G blocks.
"""

import torch
from torch import Tensor

from quantlab.methods.blocks import blocks_of, fitted_scale
from quantlab.numerics.codebook import CodebookTensor, float_codes
from quantlab.numerics.tables import E8M0, FLOATS, FloatFormat

__all__ = ["fp8", "fp8e5m2", "mxfp4", "mxfp6", "mxfp6e3m2", "nvfp4"]

_MX_BLOCK, _NV_BLOCK = 32, 16
_SCALE = FLOATS["e4m3"]


def fp8(weight_OI: Tensor, name: str, *, scale_dtype: torch.dtype = torch.float32) -> CodebookTensor:
    """E4M3 codes [O, I], one scale per output [O, 1].

    Raises:
        SchemeError: a scale overflows `scale_dtype`.
        CheckpointError: a weight is not finite.
    """
    return _per_channel(weight_OI, name, "fp8", FLOATS["e4m3"], scale_dtype)


def fp8e5m2(weight_OI: Tensor, name: str, *, scale_dtype: torch.dtype = torch.float32) -> CodebookTensor:
    """As `fp8`, with E5M2 codes."""
    return _per_channel(weight_OI, name, "fp8e5m2", FLOATS["e5m2"], scale_dtype)


def mxfp4(weight_OI: Tensor, name: str, *, scale_dtype: torch.dtype = torch.float32) -> CodebookTensor:
    """E2M1 codes [O, I], scale [O, I / 32]: powers of two, whatever `scale_dtype`, since the format fixes it.

    Raises:
        SchemeError: 32 does not divide I.
        CheckpointError: a weight is not finite.
    """
    return _power_of_two(weight_OI, name, "mxfp4", FLOATS["e2m1"])


def mxfp6(weight_OI: Tensor, name: str, *, scale_dtype: torch.dtype = torch.float32) -> CodebookTensor:
    """As `mxfp4`, with E2M3 codes."""
    return _power_of_two(weight_OI, name, "mxfp6", FLOATS["e2m3"])


def mxfp6e3m2(weight_OI: Tensor, name: str, *, scale_dtype: torch.dtype = torch.float32) -> CodebookTensor:
    """As `mxfp4`, with E3M2 codes."""
    return _power_of_two(weight_OI, name, "mxfp6e3m2", FLOATS["e3m2"])


def nvfp4(weight_OI: Tensor, name: str, *, scale_dtype: torch.dtype = torch.float32) -> CodebookTensor:
    """E2M1 codes [O, I]; scale [O, I / 16] is the product of an E4M3 number and one float32 for the matrix.

    A block whose E4M3 scale would round to 0 takes the smallest one above it, 2^-9; the matrix's own stays above
    2^-126, so that every product is exact to float32's last place. `scale_dtype` changes nothing.

    Raises:
        SchemeError: 16 does not divide I.
        CheckpointError: a weight is not finite.
    """
    blocks = blocks_of(weight_OI, _NV_BLOCK, name, "nvfp4")
    absmax, element = blocks.abs().amax(-1), FLOATS["e2m1"]
    of_matrix = (absmax.max() / (element.largest * _SCALE.largest)).clamp(min=2.0**-126)
    codes = float_codes(absmax / element.largest / of_matrix, _SCALE).clamp_(min=1)
    scale = _SCALE.values().to(absmax.device)[codes.long()] * of_matrix
    return _coded(blocks, scale, element, scale_bits=_SCALE.bits, tensor_bits=32)


def _per_channel(
    weight_OI: Tensor, name: str, format_name: str, element: FloatFormat, scale_dtype: torch.dtype
) -> CodebookTensor:
    blocks = blocks_of(weight_OI, None, name, format_name)
    scale = fitted_scale(blocks.abs().amax(-1), element.largest, scale_dtype, name)
    return _coded(blocks, scale, element, scale_bits=torch.finfo(scale_dtype).bits)


def _power_of_two(weight_OI: Tensor, name: str, format_name: str, element: FloatFormat) -> CodebookTensor:
    blocks = blocks_of(weight_OI, _MX_BLOCK, name, format_name)
    absmax = blocks.abs().amax(-1)
    # frexp: absmax = m 2^e with 1/2 <= m < 1, so floor(log2 absmax) = e - 1, without the rounding of a logarithm.
    exponent = torch.frexp(absmax).exponent - 1 - element.max_exponent
    places = torch.where(absmax == 0, 127, (exponent + 127).clamp(0, 254))
    return _coded(blocks, E8M0.to(absmax.device)[places.long()], element, scale_bits=8)


def _coded(
    blocks_OGg: Tensor, scale_OG: Tensor, element: FloatFormat, scale_bits: int, tensor_bits: int = 0
) -> CodebookTensor:
    codes = float_codes(blocks_OGg / scale_OG.unsqueeze(-1), element).flatten(-2)
    values = element.values().to(codes.device)
    return CodebookTensor(codes, scale_OG, values, element.bits, scale_bits, tensor_bits)
