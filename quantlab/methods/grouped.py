"""A weight matrix cut into what shares a scale: where every method on an integer grid begins and ends.

O outputs, I inputs; the view is [O, I], or [O, G, g] where the spec has G = I / g groups of g.
"""

from dataclasses import dataclass

from torch import Tensor

from quantlab.errors import SchemeError
from quantlab.numerics.affine import QuantizedTensor, quantize
from quantlab.numerics.granularity import group_view, spanned_dims
from quantlab.numerics.qtype import QType
from quantlab.numerics.ranges import Dims, absmax, min_max
from quantlab.schemes import TensorSpec

__all__ = ["Grouped", "check_weights", "grouped"]


@dataclass(frozen=True)
class Grouped:
    """A matrix as `group_view` shows it, its grid, and the range that just covers each group."""

    view: Tensor
    """float32, [O, I] or [O, G, g]."""
    spec: TensorSpec
    """What shares a scale."""
    low: Tensor
    """Lower end of each group's full range, the spanned dimensions kept at length 1."""
    high: Tensor
    """Upper end."""

    @property
    def dims(self) -> Dims:
        """Dimensions of the view that one scale spans."""
        return spanned_dims("weight", self.spec)

    @property
    def qtype(self) -> QType:
        """The grid of the codes."""
        return QType.of_weights(self.spec)

    def of_inputs(self, values_I: Tensor) -> Tensor:
        """One value for each input channel, as a view that broadcasts against the weights'."""
        return group_view(values_I, self.spec)

    def quantize(self, scale: Tensor, zero_point: Tensor | None) -> QuantizedTensor:
        """The nearest codes on grids of these scales and zero points, shapes of `low`."""
        return self.of_codes(quantize(self.view, scale, zero_point, self.qtype), scale, zero_point)

    def of_codes(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> QuantizedTensor:
        """The matrix with these codes, shape of the view, on grids of these scales and zero points, shapes of `low`."""
        if self.spec.group_size is not None:
            scale = scale.squeeze(-1)
            zero_point = None if zero_point is None else zero_point.squeeze(-1)
        return QuantizedTensor(codes.reshape(len(codes), -1), scale, zero_point, self.qtype)


def grouped(weight_OI: Tensor, spec: TensorSpec) -> Grouped:
    """Cut a matrix of any float dtype into groups.

    Raises:
        SchemeError: group_size does not divide I; a weight is NaN or infinite; a group's range overflows float32.
    """
    view = group_view(weight_OI.detach().float(), spec)
    low, high = (absmax if spec.symmetric else min_max)(view, spanned_dims("weight", spec))
    # A range is finite only if every weight in it is, so that weights need no pass of their own.
    spread = high if spec.symmetric else high - low
    if not bool(spread.isfinite().all()):
        raise SchemeError(_what_is_not_finite(weight_OI))
    return Grouped(view, spec, low, high)


def check_weights(weight_OI: Tensor) -> None:
    """Refuse a matrix that holds NaN or infinity; raises as `grouped`."""
    if not bool(weight_OI.isfinite().all()):
        raise SchemeError(_what_is_not_finite(weight_OI))


def _what_is_not_finite(weight_OI: Tensor) -> str:
    shape = f"a matrix of shape {tuple(weight_OI.shape)}"
    bad = (~weight_OI.isfinite()).nonzero()
    if len(bad) == 0:
        return (
            f"ranges of weights must fit float32: found magnitudes up to {weight_OI.abs().max():.3g} in {shape}. "
            "Leave this layer out with skip."
        )
    place = bad[0].tolist()
    return (
        f"weights must be finite: found {float(weight_OI[tuple(place)])} at {place} and {len(bad) - 1} more in "
        f"{shape}. Repair the checkpoint, or leave this layer out with skip."
    )
