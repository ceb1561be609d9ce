"""GPTQ: channels are rounded one after another, and each rounding error is made good by the channels still to come.

Least sum over calibration tokens of |W x - What x|^2, greedily: Frantar et al. 2022, arXiv:2210.17323. All schemes of
a sweep come from one factorization of X^T X and one pass over the channels. Where nothing correlates it is RTN.

O: outputs, I: inputs, S: schemes.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantlab.calibration.statistics import LinearStats
from quantlab.errors import ConfigError
from quantlab.methods.columns import LANES, BlockGrid, GridOf, fed_back, solve_columns
from quantlab.methods.config import GptqConfig, MethodConfig
from quantlab.methods.grids import Grid, fit_grid, stacked, without_dead
from quantlab.methods.grouped import check_weights
from quantlab.methods.hessian import Feedback, feedback_of
from quantlab.methods.needs import gram_of
from quantlab.methods.solved import Solved
from quantlab.numerics.affine import QuantizedTensor
from quantlab.numerics.granularity import group_view
from quantlab.schemes import TensorSpec

__all__ = ["quantize_weights"]

_DEFAULTS = MethodConfig()
_LARGE = 2.0**64


def quantize_weights(
    weight_OI: Tensor,
    specs: Sequence[TensorSpec],
    stats: LinearStats | None,
    *,
    scale_dtype: torch.dtype = torch.float32,
    config: MethodConfig = _DEFAULTS,
) -> list[Solved]:
    """Quantize one matrix to every spec, bit for bit as each would be alone.

    Ranges are of the weights as they are (static groups, channels, tensors), or of the weights as fed back when the
    group begins (`config.gptq.static_groups` off). Weights of dead channels widen no range, and take their nearest
    codes: that costs nothing on calibration tokens, and least on a token that does reach them.

    A range is the one of `config.gptq.clip_steps` shrunk ones with the least sum of d_k (w_k - Q(w_k))^2, d the pivots
    of the Hessian (`hessian`): the loss of GPTQ itself, if targets are spread as the weights are.

    Raises:
        SchemeError: as `rtn.quantize_weight`; no statistics, of another width, or not finite.
        ConfigError: act_order with groups but without static_groups.
    """
    _check(specs, config.gptq)
    gram_II, lack = gram_of("gptq", weight_OI, stats)
    check_weights(weight_OI)
    feedback = feedback_of(gram_II, damping=config.gptq.damping, act_order=config.gptq.act_order)
    note = "; ".join(filter(None, (lack, *feedback.notes)))
    weight_OI = weight_OI.detach().float()
    static = [spec for spec in specs if config.gptq.static_groups or spec.group_size is None]
    together = iter(_solve_static(weight_OI, static, feedback, scale_dtype, config.gptq))
    return [
        Solved(
            next(together)
            if spec in static
            else _solve_dynamic(weight_OI, spec, feedback, scale_dtype, config.gptq),
            note,
        )
        for spec in specs
    ]


def _check(specs: Sequence[TensorSpec], config: GptqConfig) -> None:
    """Refuse settings that no stored form can hold."""
    grouped = any(spec.group_size is not None for spec in specs)
    if grouped and config.act_order and not config.static_groups:
        raise ConfigError(
            "act_order needs static_groups where weights have groups: groups along the reordered channels have no "
            "place in the stored form. Set quantize.methods.gptq.static_groups=true, or act_order=false beside it."
        )


def _solve_static(
    weight_OI: Tensor,
    specs: list[TensorSpec],
    feedback: Feedback,
    scale_dtype: torch.dtype,
    config: GptqConfig,
) -> list[QuantizedTensor]:
    """Every spec in one pass: all ranges are known before it begins."""
    if not specs:
        return []
    padded_OI = _padded(weight_OI)
    live = (without_dead(padded_OI, feedback.dead_I, spec) for spec in specs)
    grids = [
        fit_grid(live_OI, spec, scale_dtype, feedback.pivots_I, config.clip_steps)
        for live_OI, spec in zip(live, specs, strict=True)
    ]
    weight_IO = _laid_out(padded_OI, feedback)

    def grid_of(channels: slice, outputs: slice, target_SBO: Tensor) -> BlockGrid:
        here = [grid.of_outputs(outputs) for grid in grids]
        return stacked(here, feedback.order_I[channels], weight_IO.dtype)

    codes_SIO = _solve(weight_IO, feedback, grid_of, len(specs), config.block_size)
    return [grid.quantized(codes_IO, len(weight_OI)) for grid, codes_IO in zip(grids, codes_SIO, strict=True)]


def _solve_dynamic(
    weight_OI: Tensor, spec: TensorSpec, feedback: Feedback, scale_dtype: torch.dtype, config: GptqConfig
) -> QuantizedTensor:
    """One spec whose groups find their scales when their turn comes: a block is a group."""
    size = spec.group_size
    assert size is not None
    alone = replace(spec, granularity="channel", group_size=None)
    weight_IO = _laid_out(_padded(weight_OI), feedback)
    upper_II = feedback.upper_II.to(weight_IO.dtype)
    num_groups = len(group_view(feedback.dead_I, spec))
    scale_GO, zero_point_GO = torch.empty(
        2, num_groups, weight_IO.shape[1], dtype=torch.float32, device=weight_IO.device
    )

    def grid_of(channels: slice, outputs: slice, target_SBO: Tensor) -> BlockGrid:
        seen_BO = fed_back(weight_IO[channels, outputs], target_SBO[0], upper_II[channels, channels])
        live_OB = without_dead(seen_BO.t(), feedback.dead_I[channels], alone)
        grid = fit_grid(live_OB, alone, scale_dtype, feedback.pivots_I[channels], config.clip_steps)
        group = channels.start // size
        scale_GO[group, outputs], zero_point_GO[group, outputs] = grid.scale_GO[0], grid.zero_point_GO[0]
        return stacked([grid], feedback.order_I[channels], weight_IO.dtype)

    (codes_IO,) = _solve(weight_IO, feedback, grid_of, 1, size)
    return Grid(spec, scale_GO, zero_point_GO).quantized(codes_IO, len(weight_OI))


def _solve(weight_IO: Tensor, feedback: Feedback, grid_of: GridOf, num_grids: int, block_size: int) -> Tensor:
    """Centred codes [S, I, O] of channels in their own order."""
    upper_II = feedback.upper_II.to(weight_IO.dtype)
    codes_SIO = solve_columns(weight_IO, upper_II, grid_of, num_grids, block_size)
    return codes_SIO[:, feedback.order_I.argsort()]


def _padded(weight_OI: Tensor) -> Tensor:
    """Outputs filled up with zeros to whole vectors; they take code 0 and change no range."""
    return pad(weight_OI, (0, 0, 0, -len(weight_OI) % LANES))


def _laid_out(padded_OI: Tensor, feedback: Feedback) -> Tensor:
    """The working copy [I, O] in the order of solving; float64 where feedback could overflow float32."""
    wide = padded_OI.double() if padded_OI.abs().max() > _LARGE else padded_OI
    return wide.t()[feedback.order_I].contiguous()
