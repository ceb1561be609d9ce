"""Affine quantization: real value = (code - zero_point) * scale.

Everything is computed in float32, whatever the dtype of the input. Rounding is half to even, as torch.round.
Source of the asymmetric form: Jacob et al. 2018, arXiv:1712.05877, section 2.1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.errors import SchemeError
from quantlab.numerics.qtype import QType

__all__ = [
    "QuantizedTensor",
    "choose_qparams",
    "choose_real_qparams",
    "dequantize",
    "fake_quantize",
    "fake_quantize_from",
    "quantize",
]


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantized matrix: codes and what they stand for. O outputs, I inputs, G = I / group_size groups."""

    codes: Tensor
    """[O, I]; int8 on a symmetric grid, uint8 (0 .. 2^bits - 1) on one with a zero point."""
    scale: Tensor
    """[O, G], [O, 1] per channel or [1, 1] per tensor; float32 values that the stored dtype holds exactly."""
    zero_point: Tensor | None
    """int32, shape of `scale`, within the grid; None on a symmetric grid. HQQ's are float32, rounded as scales are."""
    qtype: QType
    """The grid of the codes."""

    def dequantize(self) -> Tensor:
        """The real matrix [O, I], float32: (codes - zero_point) * scale."""
        groups = self.codes.unflatten(-1, (self.scale.shape[-1], -1))
        zero_point = None if self.zero_point is None else self.zero_point.unsqueeze(-1)
        return dequantize(groups, self.scale.unsqueeze(-1), zero_point).flatten(-2)

    def storage_bits(self, scale_bits: int) -> int:
        """Bits of the codes, scales (`scale_bits` each) and zero points when they are packed densely."""
        zero_point_bits = 0 if self.zero_point is None else self.qtype.bits
        if self.zero_point is not None and self.zero_point.is_floating_point():
            zero_point_bits = scale_bits
        return self.codes.numel() * self.qtype.bits + self.scale.numel() * (scale_bits + zero_point_bits)


def choose_qparams(
    x_min: Tensor, x_max: Tensor, qtype: QType, scale_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor | None]:
    """Fit the grid of `qtype` to the real interval [x_min, x_max].

    Symmetric: scale = max(|x_min|, |x_max|) / (2^(bits-1) - 1), no zero point. Asymmetric: the interval is widened
    to hold 0.0, so that zero stays exact; scale = (x_max - x_min) / qmax, zero_point = round(-x_min / scale).
    The scale is rounded to `scale_dtype` before anything is derived from it. One that would round to 0 becomes the
    smallest number of the dtype above 0; that of an interval which is 0 itself becomes 1.

    Args:
        x_min, x_max: range of each group, any one shape, in the units of the tensor.
        scale_dtype: dtype in which the scale will be stored.

    Returns:
        scale, float32 and positive; zero_point, int32 and within the grid, or None. Shapes of x_min.

    Error bound: |x - dequantize(quantize(x))| <= scale / 2 for x in the interval, when scale_dtype is float32;
    a scale rounded to u relative adds at most u * qmax steps where it was rounded down. A subnormal scale (float16:
    below 2^-14) is rounded by up to half the smallest number (2^-25), which adds at most qmax times that.

    Raises:
        SchemeError: the scale of a finite interval overflows `scale_dtype`.
    """
    if qtype.symmetric:
        spread, steps = torch.maximum(-x_min, x_max), qtype.qmax
    else:
        x_min, x_max = x_min.clamp(max=0.0), x_max.clamp(min=0.0)
        spread, steps = x_max - x_min, qtype.qmax
    scale = _stored_scale(spread, steps, scale_dtype)
    if qtype.symmetric:
        return scale, None
    return scale, torch.round(-x_min.float() / scale).clamp(qtype.qmin, qtype.qmax).to(torch.int32)


def choose_real_qparams(
    x_min: Tensor, x_max: Tensor, qtype: QType, scale_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Fit a grid with a real zero point to [x_min, x_max] as it is, whether it holds 0 or not: code 0 stands for x_min.

    scale = (x_max - x_min) / qmax as `choose_qparams` stores it, zero_point = -x_min / scale, rounded to `scale_dtype`
    and not to a code. It may lie outside the grid, and 0 between two codes or beyond them.

    Returns:
        scale, float32 and positive; zero_point, float32, infinite where `scale_dtype` cannot hold it. Shapes of x_min.

    Raises:
        SchemeError: as `choose_qparams`.
    """
    assert not qtype.symmetric, "a symmetric grid has no zero point"
    scale = _stored_scale(x_max - x_min, qtype.qmax, scale_dtype)
    return scale, (-x_min.float() / scale).to(scale_dtype).float()


def _stored_scale(spread: Tensor, steps: int, scale_dtype: torch.dtype) -> Tensor:
    """spread / steps as its dtype holds it, never 0."""
    exact = spread.float() / steps
    scale = exact.to(scale_dtype).float()
    if scale_dtype != torch.float32 and bool((scale.isinf() & exact.isfinite()).any()):
        raise SchemeError(f"scales must fit {scale_dtype}: found {exact.max():.3g}. Use a wider scale dtype.")
    limits = torch.finfo(scale_dtype)
    instead = torch.where(spread == 0, 1.0, limits.smallest_normal * limits.eps)
    return torch.where(scale == 0, instead, scale)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, qtype: QType) -> Tensor:
    """Codes of x, `qtype.dtype`, same shape; values outside the range saturate."""
    return _round_to_codes(x, scale, zero_point, qtype).to(qtype.dtype)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Real values of codes, float32, same shape: (codes - zero_point) * scale, exact but for the one product."""
    centred = codes.float() if zero_point is None else codes.float() - zero_point
    return centred * scale


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, qtype: QType) -> Tensor:
    """dequantize(quantize(x)) without leaving float32; same bits, and NaN stays NaN."""
    codes = _round_to_codes(x, scale, zero_point, qtype)
    return codes.mul_(scale) if zero_point is None else codes.sub_(zero_point).mul_(scale)


def fake_quantize_from(x: Tensor, x_min: Tensor, x_max: Tensor, bits: int) -> Tensor:
    """x on 2^bits codes from the real x_min to x_max: code * scale + x_min, float32; codes of values outside saturate.

    As caches store it, with a scale and a minimum a group; the range need not hold 0.
    Error bound: half of scale = (x_max - x_min) / (2^bits - 1) in the range, plus the rounding of the last sum.
    """
    x_min, top = x_min.float(), (1 << bits) - 1
    scale = (x_max.float() - x_min) / top
    scale = torch.where(scale == 0, 1.0, scale)
    codes = torch.sub(x.float(), x_min).div_(scale).round_().clamp_(0, top)
    return codes.mul_(scale).add_(x_min)


def _round_to_codes(x: Tensor, scale: Tensor, zero_point: Tensor | None, qtype: QType) -> Tensor:
    """Codes of x as float32, in memory of their own."""
    codes = torch.div(x.float(), scale)
    if zero_point is not None and zero_point.is_floating_point():
        return codes.add_(zero_point).round_().clamp_(qtype.qmin, qtype.qmax)
    codes.round_()
    if zero_point is not None:
        codes.add_(zero_point)
    return codes.clamp_(qtype.qmin, qtype.qmax)
