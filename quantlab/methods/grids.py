"""Grids of a weight matrix, laid out for a loop over its input channels.

Codes are counted from the zero point here: centred code c = code - zero_point, real value = c * scale, and c is within
[qmin - zero_point, qmax - zero_point]. Rounding is the same, since the zero point is whole.

O: outputs, I: inputs, G: groups.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantlab.methods.grouped import grouped
from quantlab.numerics.affine import QuantizedTensor, choose_qparams
from quantlab.numerics.granularity import group_view
from quantlab.numerics.qtype import QType
from quantlab.numerics.ranges import mse_clip
from quantlab.schemes import TensorSpec

__all__ = ["Grid", "fit_grid", "stacked", "without_dead"]


@dataclass(frozen=True)
class Grid:
    """Scale and ends of every group, one row a group."""

    spec: TensorSpec
    """What shares a scale, and the codes."""
    scale_GO: Tensor
    """float32, positive; G is 1 for granularities without groups. Per tensor, all O are one value."""
    zero_point_GO: Tensor
    """float32, whole; 0 on a symmetric grid."""

    def rows(self, channels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scale, smallest and largest centred code of these input channels, each [len(channels), O]."""
        qtype, size = QType.of_weights(self.spec), self.spec.group_size
        group = torch.zeros_like(channels) if size is None else channels // size
        zero_point = self.zero_point_GO[group]
        return self.scale_GO[group], qtype.qmin - zero_point, qtype.qmax - zero_point

    def of_outputs(self, outputs: slice) -> "Grid":
        """The grid of some of the outputs."""
        return replace(self, scale_GO=self.scale_GO[:, outputs], zero_point_GO=self.zero_point_GO[:, outputs])

    def quantized(self, centred_IO: Tensor, num_outputs: int) -> QuantizedTensor:
        """The matrix of the first `num_outputs` outputs, the others being padding, that has these centred codes."""
        qtype, size = QType.of_weights(self.spec), self.spec.group_size or len(centred_IO)
        codes_IO = centred_IO
        if not qtype.symmetric:
            zero_point_GO = self.zero_point_GO.to(centred_IO.dtype)
            codes_IO = (centred_IO.unflatten(0, (-1, size)) + zero_point_GO[:, None]).flatten(0, 1)
        kept = 1 if self.spec.granularity == "tensor" else num_outputs
        scale, zero_point = (x.t()[:kept].contiguous() for x in (self.scale_GO, self.zero_point_GO))
        return QuantizedTensor(
            codes_IO.to(qtype.dtype).t()[:num_outputs].contiguous(),
            scale,
            None if qtype.symmetric else zero_point.to(torch.int32),
            qtype,
        )


def fit_grid(
    weight_OI: Tensor,
    spec: TensorSpec,
    scale_dtype: torch.dtype,
    importance_I: Tensor | None = None,
    clip_steps: int = 1,
) -> Grid:
    """The grid of every group's best range; scales already rounded to `scale_dtype`.

    Tried are `clip_steps` factors from 1, the range that just covers the group, down to 1 - 1.4 / bits: few codes gain
    from saturating many weights, many codes from saturating few. The least sum of squared errors wins, each weighted
    by the importance of its channel. One step is the full range.

    Raises:
        SchemeError: as `grouped`; a scale overflows `scale_dtype`.
    """
    groups = grouped(weight_OI, spec)
    low, high = groups.low, groups.high
    if clip_steps > 1:
        low, high = mse_clip(
            groups.view,
            groups.dims,
            groups.qtype,
            importance=None if importance_I is None else groups.of_inputs(importance_I),
            num_steps=clip_steps,
            smallest=1 - 1.4 / spec.bits,
            scale_dtype=scale_dtype,
        )
    scale, zero_point = choose_qparams(low, high, groups.qtype, scale_dtype)
    zero_point = torch.zeros_like(scale) if zero_point is None else zero_point.float()
    num_outputs = len(weight_OI)
    scale_GO, zero_point_GO = (
        x.reshape(x.shape[0], -1).t().expand(-1, num_outputs) for x in (scale, zero_point)
    )
    return Grid(spec, scale_GO.contiguous(), zero_point_GO.contiguous())


def without_dead(weight_OI: Tensor, dead_I: Tensor, spec: TensorSpec) -> Tensor:
    """The weights that may widen a range: those of dead channels are 0, but where all that share a scale are dead."""
    if not dead_I.any():
        return weight_OI
    alone = dead_I.all() if spec.group_size is None else group_view(dead_I, spec).all(-1)
    silent_I = dead_I & ~alone.repeat_interleave(len(dead_I) // alone.numel())
    return weight_OI.masked_fill(silent_I, 0.0)


def stacked(grids: list[Grid], channels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """`Grid.rows` of several grids, [S, len(channels), O] each."""
    rows = zip(*(grid.rows(channels) for grid in grids), strict=True)
    scale, low, high = (torch.stack(part).to(dtype) for part in rows)
    return scale, low, high
