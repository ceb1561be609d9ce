"""Ranges: which interval of real values a grid should cover.

Every function takes x and the dimensions that one scale spans, and returns (x_min, x_max), float32, with those
dimensions kept at length 1. Values outside a range saturate when they are quantized. Schemes take `absmax` and
`min_max`, the methods clip, wclip and awq `search_clip`; `percentile` is for callers of the library.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from quantlab.numerics.affine import choose_qparams, fake_quantize
from quantlab.numerics.qtype import QType

__all__ = ["Dims", "absmax", "min_max", "mse_clip", "percentile", "search_clip"]

Dims = tuple[int, ...]
"""Dimensions that one scale spans, as `granularity.spanned_dims` gives them."""


def absmax(x: Tensor, dims: Dims) -> tuple[Tensor, Tensor]:
    """The interval (-m, m), m the largest magnitude: nothing is clipped, zero is its centre."""
    largest = torch.maximum(-x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)).float()
    return -largest, largest


def min_max(x: Tensor, dims: Dims) -> tuple[Tensor, Tensor]:
    """The interval from the smallest to the largest value: nothing is clipped."""
    return x.amin(dims, keepdim=True).float(), x.amax(dims, keepdim=True).float()


_CACHED = 262_144
"""Values of a part of a matrix whose candidates are tried together."""


def percentile(x: Tensor, dims: Dims, percent: float) -> tuple[Tensor, Tensor]:
    """The interval that leaves floor((1 - percent/100) * n) of the n values out at either end.

    `percent` 100 is `min_max`; at 99 one value in a hundred saturates below and one above. Both ends are values of x.
    """
    assert 50 < percent <= 100, f"percent must be in (50, 100], found {percent}"
    order = _spanned_last(x.float(), dims).sort(-1).values
    # The small term keeps a product that is whole in decimals from falling below it in binary.
    out = math.floor(order.shape[-1] * (100 - percent) / 100 + 1e-9)
    shape = [1 if d - x.ndim in dims else size for d, size in enumerate(x.shape)]
    return order[..., out].reshape(shape), order[..., order.shape[-1] - 1 - out].reshape(shape)


def mse_clip(
    x: Tensor,
    dims: Dims,
    qtype: QType,
    *,
    importance: Tensor | None = None,
    num_steps: int = 64,
    smallest: float = 0.2,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The shrunk range with the least squared error of rounding and clipping together; see `search_clip`.

    Args:
        importance: weights of the squared errors, not negative, broadcastable to x.
    """

    def squared_error(residual: Tensor) -> Tensor:
        squares = residual.square_()
        if importance is not None:
            squares = squares.mul_(importance)
        return squares.sum(dims, keepdim=True)

    return search_clip(
        x, dims, qtype, squared_error, num_steps=num_steps, smallest=smallest, scale_dtype=scale_dtype
    )


def search_clip(
    x: Tensor,
    dims: Dims,
    qtype: QType,
    error_of: Callable[[Tensor], Tensor],
    *,
    num_steps: int = 64,
    smallest: float = 0.2,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The shrunk range with the least error of rounding and clipping together, by search.

    Both ends of the full range are multiplied by the same factor, one of `num_steps` from 1 down to `smallest`, and
    every group keeps its own best. The full range is the first candidate and ties keep the wider, so the result is
    never worse than rounding alone. Where every error overflows to infinity the full range stays.

    Args:
        error_of: takes the residual quantized - x of some rows of x, float32, which it may overwrite; returns the
            error of each group, with the spanned dimensions kept at length 1.
        scale_dtype: dtype in which scales will be stored, and to which those of candidates are rounded.
    """
    if -x.ndim in dims:
        return _search_rows(x.float(), dims, qtype, error_of, num_steps, smallest, scale_dtype)
    # Rows that stay in cache through all candidates.
    rows = max(1, _CACHED // max(1, x[:1].numel()))
    found = [
        _search_rows(part.float(), dims, qtype, error_of, num_steps, smallest, scale_dtype)
        for part in x.split(rows)
    ]
    low, high = zip(*found, strict=True)
    return torch.cat(low), torch.cat(high)


def _search_rows(
    x: Tensor,
    dims: Dims,
    qtype: QType,
    error_of: Callable[[Tensor], Tensor],
    num_steps: int,
    smallest: float,
    scale_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`search_clip` of some rows."""
    full = absmax(x, dims) if qtype.symmetric else min_max(x, dims)
    best = torch.ones_like(full[0])
    least = torch.full_like(best, torch.inf)
    for factor in torch.linspace(1.0, smallest, num_steps).tolist():
        scale, zero_point = choose_qparams(full[0] * factor, full[1] * factor, qtype, scale_dtype)
        error = error_of(fake_quantize(x, scale, zero_point, qtype).sub_(x))
        best = torch.where(error < least, factor, best)
        least = torch.minimum(least, error)
    return full[0] * best, full[1] * best


def _spanned_last(x: Tensor, dims: Dims) -> Tensor:
    """x with the spanned dimensions moved to the end and flattened into one."""
    kept = [d for d in range(-x.ndim, 0) if d not in dims]
    return x.permute(*kept, *dims).reshape(*(x.shape[d] for d in kept), -1)
