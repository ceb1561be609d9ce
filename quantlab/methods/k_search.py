"""The scale, or scale and minimum, that suit a sub-block best: a small grid, and least squares at each of its points.

    round the weights to codes with a trial scale;  fit scale and minimum to those codes;  keep the least error

The trial scales stretch and shrink the range that just spans the sub-block by up to two codes: what is cut off at an
end is few weights, what is gained are finer steps for all others. The idea is llama.cpp's (`make_qx_quants` and
`make_qkx2_quants` of ggml-quants.c), which weights errors by the size of the weights; here all errors count alike.
g weights of a sub-block, N superblocks, K sub-blocks of each: g comes first, so that sums over it add whole rows.
"""

import torch
from torch import Tensor

__all__ = ["fit_range", "fit_scale", "inverse", "rounded"]

_STRETCHES = [step / 10 for step in range(-9, 10)]
"""Codes by which the end of a mirrored grid is moved."""
_SPANS = [0.0, *(step * 0.15 for step in range(-14, 8) if step)]
"""Codes by which the length of a grid with a minimum is changed. The one that just spans comes first, while the offset
is still its own: so nothing that is kept is worse."""


def inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 where scale is 0 or its inverse beyond float32."""
    one = 1 / scale
    return torch.where(one.isfinite(), one, 0.0)


def rounded(x_gNK: Tensor, inverse_NK: Tensor, low: int, high: int) -> Tensor:
    """x / scale rounded to an integer from low to high; float32, in memory of its own."""
    return (x_gNK * inverse_NK).round_().clamp_(low, high)


def fit_scale(x_gNK: Tensor, half: int) -> Tensor:
    """The scale [N, K] of codes from -half to half - 1; its sign lets the largest weight have the code -half.

    With codes l the best scale is s = sum(x l) / sum(l l), and the error it leaves sum(x x) - s sum(x l).
    """
    low, high = x_gNK.amin(0), x_gNK.amax(0)
    towards_end = -inverse(torch.where(high > -low, high, low))
    best, best_gain = torch.zeros_like(low), torch.full_like(low, -1.0)
    for stretch in _STRETCHES:
        codes = rounded(x_gNK, towards_end * (half + stretch), -half, half - 1)
        along = (x_gNK * codes).sum(0)
        scale = along * inverse(codes.square().sum(0))
        gain = scale * along
        best = torch.where(gain > best_gain, scale, best)
        best_gain = torch.where(gain > best_gain, gain, best_gain)
    return best


def fit_range(x_gNK: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The scale and the minimum's magnitude, both [N, K] and at least 0, of x = scale * code - magnitude.

    Codes go from 0 to `steps`. A positive minimum is held at 0, which the type cannot store.
    """
    lowest = x_gNK.amin(0).clamp(max=0)
    # From here on in distances from the lowest weight, so that no sum cancels.
    x_gNK = x_gNK - lowest
    span = x_gNK.amax(0)
    sums = x_gNK.sum(0), x_gNK.square().sum(0)
    scale, offset, least = span / steps, torch.zeros_like(span), torch.full_like(span, torch.inf)
    for change in _SPANS:
        codes = rounded(x_gNK - offset, inverse(span) * (steps + change), 0, steps)
        trial, moved, error = _fitted(x_gNK, codes, sums, -lowest)
        # False for NaN too: codes that are all alike have no scale.
        better = error < least
        scale, offset = torch.where(better, trial, scale), torch.where(better, moved, offset)
        least = torch.where(better, error, least)
    return scale, 0.0 - (offset + lowest)


def _fitted(
    x_gNK: Tensor, codes_gNK: Tensor, sums: tuple[Tensor, Tensor], most: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and offset with the least sum of (scale * code + offset - x)^2, and that sum; offset is `most` at most."""
    count, (x, xx) = len(x_gNK), sums
    code, square, along = codes_gNK.sum(0), codes_gNK.square().sum(0), (x_gNK * codes_gNK).sum(0)
    determinant = count * square - code * code
    scale = (count * along - x * code) / determinant
    offset = (square * x - code * along) / determinant
    held = offset > most
    offset = torch.where(held, most, offset)
    scale = torch.where(held, (along - most * code) / square, scale)
    error = xx + scale * (scale * square - 2 * along) + offset * (count * offset - 2 * x + 2 * scale * code)
    return scale, offset, error
