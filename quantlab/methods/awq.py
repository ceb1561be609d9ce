"""AWQ: input channels that carry much are scaled up before rounding, then ranges are clipped. O outputs, I inputs.

Linears with one input x compute W x = (W s)(x / s). The scales s are folded into what makes x (see `transforms`), and

    s = rms(x)^alpha                            alpha = 0, 1/n, ..., (n-1)/n
    s = rms(x)^alpha / mean|w|^(1-alpha)        the same alphas; |w| of a group over its largest, mean over outputs
    each over sqrt(max * min of it), and of these 2 n the least of
    sum over linears of tr(D G D^T),            D = Q(W s) / s - W,   G = X^T X

tr(D G D^T) is the squared error of the outputs on the calibration text, so no grid point runs the layer: it costs
O I^2 operations and not 2 tokens O I. Ranges of the scaled weights are then shrunk, group by group, where that
lowers d G_gg d^T, the output error of that group alone. Paper and AutoAWQ take the mean of |x| for rms(x), and one of
the two families: the first is the paper's, the second AutoAWQ's `duo_scaling`.
Source: Lin et al. 2023, arXiv:2306.00978, section 3.2; AutoAWQ for the grid and the second family.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quantlab.calibration.statistics import LinearStats
from quantlab.methods.config import MethodConfig
from quantlab.methods.grouped import Grouped, grouped
from quantlab.methods.needs import unit_gram
from quantlab.methods.rtn import quantize_weight
from quantlab.methods.solved import Solved
from quantlab.numerics.affine import QuantizedTensor, choose_qparams, fake_quantize
from quantlab.numerics.granularity import group_view
from quantlab.numerics.ranges import search_clip
from quantlab.schemes import TensorSpec

__all__ = ["candidate_scales", "clip_weight", "output_errors", "quantize_weights", "search_scales"]

_SMALLEST = 1e-4
"""Least rms of a channel over the largest one's: a dead channel's scale stays positive, and scales stay near 1."""
_BLOCK = 256
"""Columns of X^T X that are multiplied at a time."""


def quantize_weights(
    weight_OI: Tensor,
    specs: Sequence[TensorSpec],
    stats: LinearStats | None,
    *,
    scale_dtype: torch.dtype = torch.float32,
    config: MethodConfig = MethodConfig(),
) -> list[Solved]:
    """Clip search alone: scales need a producer of x to fold into, which one matrix does not know.

    Args:
        weight_OI: already multiplied by the scales of `search_scales`, where there are any.
        stats: of the inputs divided by those scales, `LinearStats.divided`.

    Raises:
        SchemeError: as `rtn.quantize_weight`; no statistics, of another width, or not finite.
    """
    gram_II, note = unit_gram("awq", weight_OI, stats)
    if not config.awq.clip:
        return [Solved(quantize_weight(weight_OI, spec, scale_dtype=scale_dtype), note) for spec in specs]
    return [Solved(clip_weight(weight_OI, spec, gram_II, scale_dtype=scale_dtype), note) for spec in specs]


def search_scales(
    weights: Sequence[Tensor],
    spec: TensorSpec,
    stats: LinearStats | None,
    *,
    scale_dtype: torch.dtype = torch.float32,
    config: MethodConfig = MethodConfig(),
) -> Tensor:
    """The scales of input channels, [I] float32 and positive, that cost the linears' outputs least.

    Ones (alpha 0) are the first candidate and ties keep the smaller alpha, so that by the error above scales are
    never worse than none, to the rounding of float32 sums. Ones too where no token was seen.

    Args:
        weights: [O_k, I] of the linears that read one tensor.

    Raises:
        SchemeError: as `rtn.quantize_weight`; no statistics, of another width, or not finite.
    """
    gram_II, _ = unit_gram("awq", weights[0], stats)
    candidates_AI = candidate_scales(weights, spec, gram_II, config.awq.num_steps)
    errors = output_errors(weights, spec, gram_II, candidates_AI, scale_dtype=scale_dtype)
    return candidates_AI[min(range(len(errors)), key=errors.__getitem__)]


def candidate_scales(weights: Sequence[Tensor], spec: TensorSpec, gram_II: Tensor, num_steps: int) -> Tensor:
    """Both families of scales on the grid of alphas, [2 num_steps, I] float32; the first are ones.

    Where no input was seen, ones are all.
    """
    rms_I = gram_II.diagonal().double().sqrt()
    largest = rms_I.max()
    if largest <= 0:
        return torch.ones(1, len(gram_II), device=gram_II.device)
    rms_I = (rms_I / largest).clamp(min=_SMALLEST)
    alphas = torch.arange(num_steps, dtype=torch.float64, device=gram_II.device).unsqueeze(-1) / num_steps
    plain_AI = rms_I**alphas
    scales_AI = torch.cat([plain_AI, plain_AI / _relative_weights(weights, spec).double() ** (1 - alphas)])
    low, high = scales_AI.aminmax(dim=-1, keepdim=True)
    return (scales_AI / (low * high).sqrt()).float()


def _relative_weights(weights: Sequence[Tensor], spec: TensorSpec) -> Tensor:
    """Mean over the outputs of all linears of |w| over the largest of its group, or of its row; at least 1e-4, [I]."""
    sizes = torch.cat([weight.detach().float() for weight in weights]).abs()
    groups = group_view(sizes, spec)
    # A group of zeros is 0 / 1.
    largest = groups.amax(-1, keepdim=True)
    relative = groups / torch.where(largest > 0, largest, 1.0)
    return relative.reshape(sizes.shape).mean(0).clamp(min=_SMALLEST)


def output_errors(
    weights: Sequence[Tensor],
    spec: TensorSpec,
    gram_II: Tensor,
    candidates_AI: Tensor,
    *,
    scale_dtype: torch.dtype = torch.float32,
) -> list[float]:
    """tr(D G D^T), summed over the linears, at each candidate; in units of `gram_II`.

    The products are float32 (float64 where gram_II is), their sum float64.
    """
    # G is symmetric: its upper half, what lies off the diagonal twice, gives the same sum for half the products.
    half_II = gram_II.triu() + gram_II.triu(1)
    return [
        sum(_quadratic_sum(_residual(weight, spec, scales_I, scale_dtype), half_II) for weight in weights)
        for scales_I in candidates_AI
    ]


def _residual(weight_OI: Tensor, spec: TensorSpec, scales_I: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """Q(W s) / s - W, float32."""
    weight_OI = weight_OI.detach().float()
    groups = grouped(weight_OI * scales_I, spec)
    scale, zero_point = choose_qparams(groups.low, groups.high, groups.qtype, scale_dtype)
    rounded = fake_quantize(groups.view, scale, zero_point, groups.qtype).reshape(weight_OI.shape)
    return rounded.div_(scales_I).sub_(weight_OI)


def _quadratic_sum(residual_OI: Tensor, half_II: Tensor) -> float:
    """Sum over outputs of d H d^T for an upper triangular H; its lower half is not multiplied, block by block."""
    residual_OI = residual_OI.to(half_II.dtype)
    total = 0.0
    for start in range(0, len(half_II), _BLOCK):
        end = start + _BLOCK
        products = residual_OI[:, :end] @ half_II[:end, start:end]
        total += float(products.mul_(residual_OI[:, start:end]).sum(dtype=torch.float64))
    return total


def clip_weight(
    weight_OI: Tensor, spec: TensorSpec, gram_II: Tensor, *, scale_dtype: torch.dtype = torch.float32
) -> QuantizedTensor:
    """Round a matrix to the nearest codes of the range, full or shrunk, that costs each group's output least.

    The error of a group is d G_gg d^T, d its residual and G_gg its block of `gram_II`: what the output would lose if
    the other groups were exact. It costs 64 * 2 O I g operations. Never worse than RTN by it, to float32 rounding.

    Raises:
        SchemeError: as `rtn.quantize_weight`.
    """
    groups = grouped(weight_OI, spec)
    error_of = _group_error(groups, gram_II)
    low, high = search_clip(groups.view, groups.dims, groups.qtype, error_of, scale_dtype=scale_dtype)
    return groups.quantize(*choose_qparams(low, high, groups.qtype, scale_dtype))


def _group_error(groups: Grouped, gram_II: Tensor) -> Callable[[Tensor], Tensor]:
    """The function residual -> error of each group, shapes as in `search_clip`."""
    size = groups.view.shape[-1]
    blocks = gram_II.unflatten(0, (-1, size)).unflatten(-1, (-1, size)).diagonal(dim1=0, dim2=2)
    blocks_Ggg = blocks.permute(2, 0, 1).contiguous()

    def error_of(residual: Tensor) -> Tensor:
        residual_GOg = residual.reshape(len(residual), -1, size).transpose(0, 1)
        products = (residual_GOg @ blocks_Ggg).mul_(residual_GOg).transpose(0, 1)
        errors: Tensor = products.reshape(residual.shape).sum(groups.dims, keepdim=True)
        return errors

    return error_of
