"""RTN: every weight goes to the nearest point of a grid that just covers its group. O outputs, I inputs."""

import torch
from torch import Tensor

from quantlab.numerics.affine import QuantizedTensor, choose_qparams, quantize
from quantlab.numerics.granularity import group_view, spanned_dims
from quantlab.numerics.qtype import QType
from quantlab.numerics.ranges import absmax, min_max
from quantlab.schemes import TensorSpec

__all__ = ["quantize_weight"]


def quantize_weight(
    weight_OI: Tensor, spec: TensorSpec, *, scale_dtype: torch.dtype = torch.float32
) -> QuantizedTensor:
    """Round a matrix to the nearest codes.

    Args:
        weight_OI: any float dtype; computed in float32.
        scale_dtype: dtype in which scales will be stored; codes are computed from scales already rounded to it.

    Returns:
        codes [O, I] and scale [O, G], [O, 1] or [1, 1].

    Error bound: |w - dequantize| <= scale / 2, and with scale_dtype of unit roundoff u at most
    u * qmax * scale more (float16: u = 2^-11), where the scale was rounded down and the largest weight saturates;
    where the scale is subnormal in that dtype, qmax times half its smallest number more (float16: 2^-25).

    Raises:
        SchemeError: group_size does not divide I, or a scale overflows `scale_dtype`.
    """
    qtype = QType.of_weights(spec)
    view = group_view(weight_OI.detach().float(), spec)
    dims = spanned_dims("weight", spec)
    low, high = absmax(view, dims) if spec.symmetric else min_max(view, dims)
    scale, zero_point = choose_qparams(low, high, qtype, scale_dtype)
    codes = quantize(view, scale, zero_point, qtype).reshape(weight_OI.shape)
    if spec.group_size is not None:
        scale = scale.squeeze(-1)
        zero_point = None if zero_point is None else zero_point.squeeze(-1)
    return QuantizedTensor(codes, scale, zero_point, qtype)
