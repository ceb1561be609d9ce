"""Dynamic quantization: scales from the values themselves, at the moment they appear."""

import torch
from torch import Tensor

from quantlab.numerics.affine import choose_qparams, fake_quantize, fake_quantize_from
from quantlab.numerics.granularity import NEVER_NEGATIVE, Kind, group_view, spanned_dims
from quantlab.numerics.qtype import QType
from quantlab.numerics.ranges import absmax, min_max
from quantlab.schemes import TensorSpec

__all__ = ["dynamic_qparams", "dynamic_range", "fake_quantize_in_range"]


def dynamic_range(
    x: Tensor, kind: Kind, spec: TensorSpec, visible: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(x_min, x_max) of everything that shares a scale, float32, the spanned dimensions of the group view kept.

    Args:
        visible: bool, broadcastable to x; where False, a value has no say. A range without any value is (0, 0).

    What is never negative has the range (0, max).
    """
    if visible is not None:
        # Zero is in every range, so it may stand for what must not count.
        x = x.masked_fill(~visible, 0.0)
    dims = spanned_dims(kind, spec)
    if kind in NEVER_NEGATIVE:
        largest = group_view(x, spec).amax(dims, keepdim=True).float()
        return torch.zeros_like(largest), largest
    return (absmax if spec.symmetric else min_max)(group_view(x, spec), dims)


def dynamic_qparams(
    x: Tensor, spec: TensorSpec, fixed: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of inputs of a linear [.., T, C]; shapes as in `granularity`. `fixed` is a static range."""
    return choose_qparams(*(fixed or dynamic_range(x, "inputs", spec)), QType.of_activations(spec))


def fake_quantize_in_range(
    x: Tensor, x_min: Tensor, x_max: Tensor, spec: TensorSpec, kind: Kind = "inputs"
) -> Tensor:
    """x rounded to the grid of its kind that covers [x_min, x_max]: same shape and dtype, computed in float32.

    Error bound: half a step for x in the range, plus the rounding of the result to x's dtype.
    """
    if kind == "cache" and not spec.symmetric:
        return fake_quantize_from(group_view(x, spec), x_min, x_max, spec.bits).reshape(x.shape).to(x.dtype)
    # Codes from 0 are those of a zero point at 0.
    qtype = QType(spec.bits, symmetric=False) if kind in NEVER_NEGATIVE else QType.of_activations(spec)
    scale, zero_point = choose_qparams(x_min, x_max, qtype)
    return fake_quantize(group_view(x, spec), scale, zero_point, qtype).reshape(x.shape).to(x.dtype)
