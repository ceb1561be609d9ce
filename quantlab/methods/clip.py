"""Clip search: RTN on a range that is smaller than the group where that costs less. O outputs, I inputs.

Each group's range [low, high] is multiplied by one of 64 factors c from 1 down to 0.2, and the best is kept:

    clip     min over c of sum_i (w_i - Q_c(w_i))^2
    wclip    min over c of sum_i h_i (w_i - Q_c(w_i))^2,   h = diag(X^T X) / n

wclip is the output error where inputs are uncorrelated: E[(sum_i d_i x_i)^2] = sum_i d_i^2 E[x_i^2]. The full range is
the first candidate and ties keep the wider, so neither is ever worse than RTN by its own measure.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantlab.calibration.statistics import LinearStats
from quantlab.methods.config import MethodConfig
from quantlab.methods.grouped import grouped
from quantlab.methods.needs import second_moments
from quantlab.methods.solved import Solved
from quantlab.numerics.affine import QuantizedTensor, choose_qparams
from quantlab.numerics.ranges import mse_clip
from quantlab.schemes import TensorSpec

__all__ = ["clip_weight", "quantize_weights", "quantize_weights_by_inputs"]


def quantize_weights(
    weight_OI: Tensor,
    specs: Sequence[TensorSpec],
    stats: LinearStats | None = None,
    *,
    scale_dtype: torch.dtype = torch.float32,
    config: MethodConfig = MethodConfig(),
) -> list[Solved]:
    """`clip`: least squared error of weights; needs neither statistics nor settings. Raises as `clip_weight`."""
    return [Solved(clip_weight(weight_OI, spec, scale_dtype=scale_dtype)) for spec in specs]


def quantize_weights_by_inputs(
    weight_OI: Tensor,
    specs: Sequence[TensorSpec],
    stats: LinearStats | None,
    *,
    scale_dtype: torch.dtype = torch.float32,
    config: MethodConfig = MethodConfig(),
) -> list[Solved]:
    """`wclip`: the same, each input channel's error weighted by its second moment.

    Raises:
        SchemeError: as `clip_weight`; no statistics, of another width, or not finite.
    """
    moments_I, note = second_moments("wclip", weight_OI, stats)
    return [Solved(clip_weight(weight_OI, spec, moments_I, scale_dtype=scale_dtype), note) for spec in specs]


def clip_weight(
    weight_OI: Tensor,
    spec: TensorSpec,
    importance_I: Tensor | None = None,
    *,
    scale_dtype: torch.dtype = torch.float32,
) -> QuantizedTensor:
    """Round a matrix to the nearest codes of each group's best range.

    Args:
        importance_I: weight of each input channel's squared error, not negative; none counts all alike.

    Raises:
        SchemeError: as `grouped`; a scale overflows `scale_dtype`.
    """
    groups = grouped(weight_OI, spec)
    importance = None if importance_I is None else groups.of_inputs(importance_I)
    low, high = mse_clip(
        groups.view, groups.dims, groups.qtype, importance=importance, scale_dtype=scale_dtype
    )
    return groups.quantize(*choose_qparams(low, high, groups.qtype, scale_dtype))
