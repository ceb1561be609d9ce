"""One linear: its codes under each of several schemes of one method.

Letters: O outputs, I inputs of a linear.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from quantlab.calibration.statistics import LinearStats
from quantlab.errors import SchemeError
from quantlab.layers.linear import weight_of
from quantlab.methods import awq, clip, gptq, hqq, rtn
from quantlab.methods.config import MethodConfig
from quantlab.methods.formats import quantize_format
from quantlab.methods.solved import Solved
from quantlab.schemes import TensorSpec
from quantlab.solving.asked import Asked

__all__ = ["QUANTIZERS", "Quantizer", "Stats", "solve_linear"]

Stats = Mapping[str, LinearStats]
"""Statistics by the linear's dotted name; empty where the method reads none."""


class Quantizer(Protocol):
    """The signature that methods of single matrices share."""

    def __call__(
        self,
        weight_OI: Tensor,
        specs: Sequence[TensorSpec],
        stats: LinearStats | None,
        *,
        scale_dtype: torch.dtype,
        config: MethodConfig,
    ) -> list[Solved]:
        """One result for each spec."""


QUANTIZERS: dict[str, Quantizer] = {
    "rtn": rtn.quantize_weights,
    "clip": clip.quantize_weights,
    "wclip": clip.quantize_weights_by_inputs,
    "gptq": gptq.quantize_weights,
    "awq": awq.quantize_weights,
    "hqq": hqq.quantize_weights,
}
"""Method -> what quantizes one matrix; autoround works on whole layers."""


def solve_linear(linear: nn.Module, name: str, asked: Sequence[Asked], stats: Stats) -> list[Solved | None]:
    """One linear under each scheme; those on uniform grids go to the method in one call."""
    grids = [each.weights_of(name) for each in asked]
    weight_OI = weight_of(linear).detach()
    first = asked[0]
    specs = [grid for grid in grids if isinstance(grid, TensorSpec)]
    quantizer, dtype = QUANTIZERS[first.scheme.method], first.scale_dtype
    seen = stats.get(name)
    known = None if seen is None else seen.to(weight_OI.device)
    try:
        on_grids = (
            quantizer(weight_OI, specs, known, scale_dtype=dtype, config=first.config.methods)
            if specs
            else []
        )
        rest = iter(on_grids)
        return [
            next(rest)
            if isinstance(grid, TensorSpec)
            else None
            if grid is None
            else quantize_format(weight_OI, grid, scale_dtype=dtype, name=name)
            for grid in grids
        ]
    except SchemeError as error:
        if name not in str(error):
            error.add_note(f"in {name}")
        raise
