"""Scaling: what a source gives is divided by a scale of each channel, and its readers' columns are multiplied by it.

    y = W x = (W diag(s)) (diag(1/s) x),    x / s = norm with gain g / s, or (W' / s) x' of the linear before

The function stays as it is, but for rounding; the readers' inputs have channels of other sizes, which is what makes
them easier to quantize. Sources: AWQ, arXiv:2306.00978; SmoothQuant, arXiv:2211.10438.

Letters: I input channels of the readers, S channels of the source, O outputs.
"""

import torch
from torch import Tensor, nn

from quantlab.errors import SchemeError
from quantlab.transforms.edges import Edge
from quantlab.transforms.edit import (
    Undo,
    check_scales,
    locate,
    matrix_of,
    set_matrix_,
    set_vector_,
)

__all__ = ["divide_shifts_", "divide_source_", "multiply_readers_", "scale_", "tied"]


def scale_(model: nn.Module, edge: Edge, scales_I: Tensor, undo: Undo) -> None:
    """Divide what the readers of an edge see by `scales_I` and multiply their columns by it.

    Raises:
        SchemeError: scales that are no positive numbers, or that differ between channels that read one source
            channel (`tied` makes them equal).
    """
    wide_I = check_scales(scales_I, len(edge.source_of), edge.source)
    scales_S = tied(edge, wide_I)
    if not torch.allclose(scales_S[list(edge.source_of)], wide_I, rtol=1e-6, atol=0.0):
        raise SchemeError(
            f"channels that read one channel of {edge.source} must have one scale, since heads share it: found "
            "different ones. Make them equal with tied()."
        )
    divide_source_(model, edge, scales_S, undo)
    multiply_readers_(model, edge, scales_S, undo)


def tied(edge: Edge, scales_I: Tensor) -> Tensor:
    """[S], float64: one scale for each channel of the source, the geometric mean over the channels that read it."""
    index = torch.tensor(edge.source_of, device=scales_I.device)
    logs = scales_I.double().log()
    total = logs.new_zeros(edge.num_sources).index_add_(0, index, logs)
    return (total / torch.bincount(index, minlength=edge.num_sources)).exp()


def divide_source_(model: nn.Module, edge: Edge, scales_S: Tensor, undo: Undo) -> None:
    """Channel s of the source, and what is added to it on the way, over scale s."""
    module, _ = locate(model, edge.source)
    if edge.rows:
        divisor_O = torch.ones(matrix_of(module).shape[0], dtype=torch.float64, device=scales_S.device)
        divisor_O[list(edge.rows)] = scales_S
        bias = getattr(module, "bias", None)
        others = {} if bias is None else {"bias": bias.detach().double() / divisor_O}
        set_matrix_(model, edge.source, matrix_of(module) / divisor_O[:, None], undo, **others)
    else:
        _divide_norm_(model, edge, module, scales_S, undo)
    divide_shifts_(model, edge, scales_S, undo)


def divide_shifts_(model: nn.Module, edge: Edge, scales_S: Tensor, undo: Undo) -> None:
    """What is added between a norm and its readers, over the scales; a scale of 0 is that of a folded gain."""
    for name in edge.shifts:
        owner, parameter = locate(model, name)
        shift = getattr(owner, parameter).detach().double()
        if bool(((scales_S == 0) & (shift != 0)).any()):
            raise SchemeError(
                f"a gain of 0 cannot be folded past what is added behind it: {edge.source} has one, and {name} adds "
                "to that channel. Leave fold out."
            )
        set_vector_(model, name, undo, **{parameter: shift / torch.where(scales_S == 0, 1.0, scales_S)})


def _divide_norm_(model: nn.Module, edge: Edge, norm: nn.Module, scales_S: Tensor, undo: Undo) -> None:
    gain = getattr(norm, "weight", None)
    if gain is None:
        raise SchemeError(f"a norm must have a gain to pass a scale: {edge.source} has none. Leave it out.")
    values = {"weight": (gain.detach().double() + edge.offset) / scales_S - edge.offset}
    if edge.offset:
        # 1 + w is far smaller than w where the scale is large, so w keeps the digits of float32.
        values["weight"] = values["weight"].to(torch.promote_types(gain.dtype, torch.float32))
    bias = getattr(norm, "bias", None)
    if bias is not None:
        values["bias"] = bias.detach().double() / scales_S
    set_vector_(model, edge.source, undo, **values)


def multiply_readers_(model: nn.Module, edge: Edge, scales_S: Tensor, undo: Undo) -> None:
    """Column i of every reader, times the scale of the source channel that it reads."""
    scales_I = scales_S[list(edge.source_of)]
    for name in edge.readers:
        set_matrix_(model, name, matrix_of(*locate(model, name)) * scales_I, undo)
