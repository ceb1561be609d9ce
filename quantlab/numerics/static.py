"""Static quantization: ranges from calibration, the same for every sequence; what lies beyond them saturates.

Letters: I inputs of a linear, H heads, C channels of a head.
"""

import torch
from torch import Tensor

from quantlab.errors import CalibrationError
from quantlab.numerics.granularity import Kind, spanned_dims
from quantlab.schemes import TensorSpec

__all__ = ["Fixed", "static_range"]

Fixed = tuple[Tensor, Tensor]
"""(low, high): what a static range is, float32, as `static_range` gives it."""


def static_range(spec: TensorSpec, minimum: Tensor, maximum: Tensor) -> Fixed:
    """(low, high) of everything that shares a scale, from the extremes of each channel over calibration.

    Args:
        minimum, maximum: [I] for inputs of a linear, or [H, C] for queries, keys or values.

    Returns:
        low, high: float32, [1, 1] or [1, I] for inputs; [1, 1, 1], [H, 1, 1] or [H, 1, C] for heads. They broadcast
        against the tensors [.., T, I] and [B, H, T, C].

    Raises:
        CalibrationError: a range that is not finite, where calibration saw nothing or saw values that are no numbers.
    """
    kind: Kind = "inputs" if minimum.ndim == 1 else "heads"
    dims = spanned_dims(kind, spec)
    assert -2 in dims, "a static scale is shared by all tokens"
    if not bool((minimum.isfinite() & maximum.isfinite() & (minimum <= maximum)).all()):
        raise CalibrationError(
            f"a static range must be finite: calibration found {float(minimum.min()):.3g} to "
            f"{float(maximum.max()):.3g}. Calibrate on text that reaches this layer, or leave the 's' out."
        )
    low, high = minimum.float().unsqueeze(-2).amin(dims, True), maximum.float().unsqueeze(-2).amax(dims, True)
    if not spec.symmetric:
        return low, high
    largest = torch.maximum(-low, high)
    return -largest, largest
