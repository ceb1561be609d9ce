"""RTN: every weight goes to the nearest point of a grid that just covers its group. O outputs, I inputs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantlab.calibration.statistics import LinearStats
from quantlab.methods.config import MethodConfig
from quantlab.methods.grouped import grouped
from quantlab.methods.solved import Solved
from quantlab.numerics.affine import QuantizedTensor, choose_qparams
from quantlab.schemes import TensorSpec

__all__ = ["quantize_weight", "quantize_weights"]


def quantize_weights(
    weight_OI: Tensor,
    specs: Sequence[TensorSpec],
    stats: LinearStats | None = None,
    *,
    scale_dtype: torch.dtype = torch.float32,
    config: MethodConfig = MethodConfig(),
) -> list[Solved]:
    """Round a matrix to the grid of each spec; needs neither statistics nor settings. Raises as `quantize_weight`."""
    return [Solved(quantize_weight(weight_OI, spec, scale_dtype=scale_dtype)) for spec in specs]


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
        SchemeError: group_size does not divide I, a weight is not finite, or a scale overflows `scale_dtype`.
    """
    groups = grouped(weight_OI, spec)
    return groups.quantize(*choose_qparams(groups.low, groups.high, groups.qtype, scale_dtype))
