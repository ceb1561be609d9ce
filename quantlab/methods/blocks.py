"""Blocks: what a format asks of a matrix before it cuts it into groups. O outputs, I inputs, G blocks of g inputs."""

from math import gcd

import torch
from torch import Tensor

from quantlab.errors import CheckpointError, SchemeError

__all__ = ["blocks_of", "fitted_scale"]


def blocks_of(weight_OI: Tensor, size: int | None, name: str, format_name: str) -> Tensor:
    """The matrix as [O, G, g] float32; size None is one block per output.

    Raises:
        SchemeError: `size` does not divide I.
        CheckpointError: a weight is NaN or infinite.
    """
    weight_OI = weight_OI.detach().float()
    num_inputs = weight_OI.shape[-1]
    size = size or num_inputs
    if num_inputs % size:
        raise SchemeError(
            f"{format_name} needs in_features in whole blocks of {size}: {name} has in_features={num_inputs}. "
            f'Use groups of {gcd(num_inputs, size)}, or add "*.{name.rpartition(".")[2]}" to skip.'
        )
    if not torch.isfinite(weight_OI).all():
        bad = (~torch.isfinite(weight_OI)).nonzero()
        raise CheckpointError(
            f"weights must be finite: {name} holds {len(bad)} NaN or Inf, the first at {bad[0].tolist()}. "
            f'Repair the checkpoint, or add "*.{name.rpartition(".")[2]}" to skip.'
        )
    return weight_OI.reshape(len(weight_OI), -1, size)


def fitted_scale(absmax: Tensor, largest: float, scale_dtype: torch.dtype, name: str) -> Tensor:
    """absmax / largest, rounded to `scale_dtype`; float32 and positive, same shape.

    A scale that would round to 0 becomes the smallest number of the dtype above 0; that of zeros alone becomes 1.

    Raises:
        SchemeError: the scale overflows `scale_dtype`.
    """
    exact = absmax / largest
    scale = exact.to(scale_dtype).float()
    if scale.isinf().any():
        raise SchemeError(
            f"scales must fit {scale_dtype}: {name} needs {exact.max():.3g}. Use a wider scale dtype."
        )
    limits = torch.finfo(scale_dtype)
    smallest = limits.smallest_normal * limits.eps
    return torch.where(absmax == 0, 1.0, torch.where(scale == 0, smallest, scale))
