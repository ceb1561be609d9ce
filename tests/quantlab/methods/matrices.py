"""Matrices, inputs and grids that tests of weight methods share. O outputs, I inputs, T tokens."""

import torch
from torch import Tensor

from quantlab.calibration.statistics import LinearStats
from quantlab.numerics.granularity import group_view, spanned_dims
from quantlab.schemes import TensorSpec

GRIDS = [
    TensorSpec(bits, granularity, 16 if granularity == "group" else None, symmetric)
    for bits in (2, 3, 4, 8)
    for granularity in ("tensor", "channel", "group")
    for symmetric in (True, False)
]


def name_of(spec: TensorSpec) -> str:
    """How a test's case is called."""
    return f"w{spec.bits}{spec.granularity}{'' if spec.symmetric else 'z'}"


def heavy_tailed(outputs: int = 24, inputs: int = 64, seed: int = 0) -> Tensor:
    """Weights with outliers, and with columns of unlike sizes, off zero."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(outputs, inputs, generator=generator)
    return (normal + 0.1 * normal**3 + 0.2) * torch.rand(inputs, generator=generator)


def inputs_of(tokens: int = 200, inputs: int = 64, seed: int = 1) -> Tensor:
    """Correlated inputs [T, I], some channels much larger than others, one always zero."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, inputs, generator=generator) @ torch.randn(
        inputs, inputs, generator=generator
    )
    mixed = mixed * torch.exp(torch.randn(inputs, generator=generator)) + 0.3
    mixed[:, 5] = 0.0
    return mixed


def stats_of(x_TI: Tensor) -> LinearStats:
    """What calibration would have collected of these inputs, in float64."""
    x = x_TI.double()
    return LinearStats(x.T @ x, x_TI.amin(0), x_TI.amax(0), x.mean(0).float(), len(x_TI))


def sums(values_OI: Tensor, spec: TensorSpec) -> Tensor:
    """Sum over everything that shares a scale, the spanned dimensions kept."""
    return group_view(values_OI, spec).sum(spanned_dims("weight", spec), keepdim=True)
