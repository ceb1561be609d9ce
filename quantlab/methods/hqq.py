"""HQQ: data-free half-quadratic fit of a grid under a norm that forgives outliers. O outputs, I inputs.

    minimize over the grid   sum_i |w_i - Q(w_i)|^p,   p = 0.7

by splitting the residual r = w - Q(w) into a sparse part e and the rest, and alternating

    e  <-  sign(r) relu(|r| - |r|^(p-1) / beta)          shrinkage, beta = 10, times 1.01 every step
    the grid that fits w - e best for the codes q as they are, least squares:
        z  <-  mean(q - (w - e) / s)                      the zero point, rounded to the grid
        s  <-  sum (w - e)(q - z) / sum (q - z)^2         the scale

Where this differs from the source, on purpose: HQQ's zero point is a real number and its scale stays as it was. Our
formats store zero points as codes, and symmetric grids have none, so the scale is fitted too. Residuals are counted in
steps of the group's first scale, so that the result does not depend on the unit of the weights; counted in the units
of usual weights, as in the source, beta = 10 leaves e at 0. Every group keeps the best grid that it met, by the true
norm, with scales and zero points as they are stored; the first is RTN's, so the result is never worse.
Source: Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models",
mobiusml.github.io/hqq_blog.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantlab.calibration.statistics import LinearStats
from quantlab.methods.config import HqqConfig, MethodConfig
from quantlab.methods.grouped import Grouped, grouped
from quantlab.methods.solved import Solved
from quantlab.numerics.affine import QuantizedTensor, choose_qparams, dequantize, quantize
from quantlab.schemes import TensorSpec

__all__ = ["fit_weight", "quantize_weights", "shrink"]

_BETA, _KAPPA = 10.0, 1.01
"""First weight of the quadratic term, and its growth a step, as in the source."""
_Grid = tuple[Tensor, Tensor | None]
"""Scale and zero point, as `choose_qparams` gives them."""


def quantize_weights(
    weight_OI: Tensor,
    specs: Sequence[TensorSpec],
    stats: LinearStats | None = None,
    *,
    scale_dtype: torch.dtype = torch.float32,
    config: MethodConfig = MethodConfig(),
) -> list[Solved]:
    """Fit the grid of each spec; needs no statistics. Raises as `fit_weight`."""
    return [Solved(fit_weight(weight_OI, spec, config.hqq, scale_dtype=scale_dtype)) for spec in specs]


def fit_weight(
    weight_OI: Tensor, spec: TensorSpec, config: HqqConfig, *, scale_dtype: torch.dtype = torch.float32
) -> QuantizedTensor:
    """Round a matrix to the nearest codes of the grids that the alternation finds.

    Raises:
        SchemeError: group_size does not divide I, a weight is not finite, or a scale overflows `scale_dtype`.
    """
    groups = grouped(weight_OI, spec)
    best = grid = choose_qparams(groups.low, groups.high, groups.qtype, scale_dtype)
    unit = best[0]
    codes, residual, least = _measure(groups, grid, unit, config.norm)
    # Each group ends for itself: what stands beside it cannot change it.
    falls = torch.ones_like(least, dtype=torch.bool)
    for step in range(config.num_steps):
        sparse = shrink(residual, _BETA * _KAPPA**step, config.norm)
        grid = _refit(groups, codes, (groups.view / unit).sub_(sparse), grid, unit, scale_dtype)
        codes, residual, error = _measure(groups, grid, unit, config.norm)
        falls &= error < least
        if not bool(falls.any()):
            break
        best, least = _choose(falls, grid, best), torch.where(falls, error, least)
    return groups.quantize(*best)


def shrink(x: Tensor, beta: float, norm: float) -> Tensor:
    """sign(x) relu(|x| - |x|^(norm-1) / beta): nearly the minimizer of |e|^norm + beta/2 (e - x)^2; 0 stays 0."""
    size = x.abs()
    return torch.where(size > 0, size - size.pow(norm - 1) / beta, 0.0).clamp_(min=0).mul_(x.sign())


def _measure(groups: Grouped, grid: _Grid, unit: Tensor, norm: float) -> tuple[Tensor, Tensor, Tensor]:
    """Codes on a grid (float32), the residuals that they leave in units of `unit`, and each group's norm of those."""
    codes = quantize(groups.view, *grid, groups.qtype)
    residual = (groups.view - dequantize(codes, *grid)).div_(unit)
    return codes.float(), residual, residual.abs().pow(norm).sum(groups.dims, keepdim=True)


def _refit(
    groups: Grouped, codes: Tensor, target: Tensor, grid: _Grid, unit: Tensor, scale_dtype: torch.dtype
) -> _Grid:
    """The zero point, then the scale, that bring these codes nearest to `target`, which is in units of `unit`."""
    scale, zero_point = grid
    if zero_point is not None:
        real = (codes - target * (unit / scale)).mean(groups.dims, keepdim=True)
        zero_point = real.round().clamp(groups.qtype.qmin, groups.qtype.qmax).to(torch.int32)
        codes = codes - zero_point
    products, squares = (codes * other for other in (target, codes))
    fitted = products.sum(groups.dims, keepdim=True) / squares.sum(groups.dims, keepdim=True) * unit
    fitted = fitted.to(scale_dtype).float()
    # A group of zeros, or one whose codes are all the zero point, has no scale of its own to fit.
    return torch.where((fitted > 0) & fitted.isfinite(), fitted, scale), zero_point


def _choose(falls: Tensor, grid: _Grid, best: _Grid) -> _Grid:
    """The new grid of groups whose error fell, the best one of the others."""
    scale = torch.where(falls, grid[0], best[0])
    return scale, None if grid[1] is None or best[1] is None else torch.where(falls, grid[1], best[1])
