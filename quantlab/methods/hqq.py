"""HQQ: data-free half-quadratic fit of a grid under a norm that forgives outliers. O outputs, I inputs.

    minimize over the grid   sum_i |w_i - Q(w_i)|^p,   p = 0.7

by splitting the residual r = w - Q(w) into a sparse part e and the rest, and alternating

    e  <-  sign(r) relu(|r| - |r|^(p-1) / beta)          shrinkage, beta = 10, times 1.01 every step
    z  <-  mean(q - (w - e) / s)                         the zero point that fits w - e best for the codes q as they are

The scale is that of the full range, and the zero point a real number, as in the source; so a grid without zero point
has nothing to fit. There are two starts: the source's, where code 0 is the smallest weight and the range need not hold
0, and RTN's, where it does and z is whole. Where all weights of a group have one sign the first has the finer scale;
where zero points are stored in few bits and lie far outside the grid, the second may be better. Residuals are counted
in the units of the weights, as in the source too, so e is 0 where they are below 10^(-1/1.3) = 0.17, as those of usual
weights are; then z is least squares. Every group keeps the best scale and zero point that it met, by the true norm, as
they are stored; RTN's are among them, so the result is never worse by it. The source takes the last that it fitted.

Tried and left: fitting the scale too, by least squares on the same codes. The norm fell further and SmolLM2 got worse
(`docs/architecture.md`): a norm that forgives outliers shrinks the range until it clips them. Counting residuals in
steps of the group, where e is not 0, cost SmolLM2 0.6% of perplexity at w4g64z (`python benchmarks/peers.py score`).
Source: Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models",
mobiusml.github.io/hqq_blog.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantlab.calibration.statistics import LinearStats
from quantlab.errors import SchemeError
from quantlab.methods.config import HqqConfig, MethodConfig
from quantlab.methods.grouped import Grouped, grouped
from quantlab.methods.solved import Solved
from quantlab.numerics.affine import (
    QuantizedTensor,
    choose_qparams,
    choose_real_qparams,
    dequantize,
    quantize,
)
from quantlab.schemes import TensorSpec

__all__ = ["fit_weight", "quantize_weights", "shrink"]

_BETA, _KAPPA = 10.0, 1.01
"""First weight of the quadratic term, and its growth a step, as in the source."""


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
    """Round a matrix to the nearest codes of the grids that the alternation finds; zero points are float32.

    Raises:
        SchemeError: a symmetric grid, group_size does not divide I, a weight is not finite, or a scale overflows
            `scale_dtype`.
    """
    if spec.symmetric:
        raise SchemeError(
            "hqq fits the zero point of each group: a symmetric grid has none. Add z, as in w4g64z-hqq."
        )
    groups = grouped(weight_OI, spec)
    scale, whole = choose_qparams(groups.low, groups.high, groups.qtype, scale_dtype)
    assert whole is not None
    zero_point, least = _alternate(groups, scale, whole.float(), config, scale_dtype)
    other_scale, first = choose_real_qparams(groups.low, groups.high, groups.qtype, scale_dtype)
    other_zero, error = _alternate(groups, other_scale, first, config, scale_dtype)
    # Norms are in steps of the scale. False for NaN: a zero point that its dtype cannot hold.
    better = error * (other_scale / scale) ** config.norm < least
    return groups.quantize(
        torch.where(better, other_scale, scale), torch.where(better, other_zero, zero_point)
    )


def _alternate(
    groups: Grouped, scale: Tensor, first: Tensor, config: HqqConfig, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The best zero points that the alternation meets from the first ones, and their norms in steps of the scale."""
    best = first
    codes, residual, least = _measure(groups, scale, best, config.norm)
    for step in range(config.num_steps):
        sparse = shrink(residual * scale, _BETA * _KAPPA**step, config.norm)
        target = (groups.view - sparse) / scale
        fitted = (codes - target).mean(groups.dims, keepdim=True).to(scale_dtype).float()
        codes, residual, error = _measure(groups, scale, fitted, config.norm)
        falls = error < least
        best, least = torch.where(falls, fitted, best), torch.where(falls, error, least)
    return best, least


def shrink(x: Tensor, beta: float, norm: float) -> Tensor:
    """sign(x) relu(|x| - |x|^(norm-1) / beta): nearly the minimizer of |e|^norm + beta/2 (e - x)^2; 0 stays 0."""
    size = x.abs()
    if float(size.max()) <= beta ** (-1 / (2 - norm)):
        return torch.zeros_like(x)
    return torch.where(size > 0, size - size.pow(norm - 1) / beta, 0.0).clamp_(min=0).mul_(x.sign())


def _measure(
    groups: Grouped, scale: Tensor, zero_point: Tensor, norm: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (float32), the residuals that they leave in steps of their group, and each group's norm of those."""
    codes = quantize(groups.view, scale, zero_point, groups.qtype)
    residual = (groups.view - dequantize(codes, scale, zero_point)).div_(scale)
    return codes.float(), residual, residual.abs().pow(norm).sum(groups.dims, keepdim=True)
