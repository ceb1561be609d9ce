"""SmoothQuant: outliers of activations move into the weights, half of the way.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)

over all calibration tokens and over all linears that read one norm's output; activations are divided by s, columns
multiplied. Channels that are dead on either side keep scale 1.

Source: Xiao et al. 2022, arXiv:2211.10438, equation 4, whose code has the same floor of 1e-5.

Letters: I input channels.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from quantlab.calibration.statistics import LinearStats
from quantlab.errors import SchemeError
from quantlab.transforms.edges import Edge, find_edges
from quantlab.transforms.edit import Undo, locate, matrix_of
from quantlab.transforms.scaling import scale_

__all__ = ["smooth_", "smoothing_scales"]

FLOOR = 1e-5
"""Smallest magnitude that counts, and smallest scale."""


def smooth_(model: nn.Module, stats: Mapping[str, LinearStats], undo: Undo, alpha: float = 0.5) -> list[str]:
    """Smooth the inputs of every linear that reads a declared norm.

    Args:
        stats: by the name of a linear; one reader of each norm is enough.
        alpha: 0 leaves all to the weights' own sizes, 1 makes every channel of the activations equally large.

    Raises:
        SchemeError: the architecture is not declared, alpha is outside [0, 1], or statistics are missing or not finite.
    """
    if not 0 <= alpha <= 1:
        raise SchemeError(f"alpha of smooth must lie between 0 and 1: found {alpha}.")
    for edge in find_edges(model, ("norm",)):
        scale_(model, edge, smoothing_scales(model, edge, stats, alpha), undo)
    return []


def smoothing_scales(model: nn.Module, edge: Edge, stats: Mapping[str, LinearStats], alpha: float) -> Tensor:
    """The scales of one norm's channels, [I], float64."""
    inputs_I, weights_I = _inputs(edge, stats), _weights(model, edge)
    inputs_I = inputs_I.to(weights_I.device)
    scales = inputs_I.clamp(min=FLOOR) ** alpha / weights_I.clamp(min=FLOOR) ** (1 - alpha)
    return torch.where((inputs_I > 0) & (weights_I > 0), scales.clamp(min=FLOOR), 1.0)


def _inputs(edge: Edge, stats: Mapping[str, LinearStats]) -> Tensor:
    """Largest magnitude of each channel, as any reader saw it."""
    seen = [(name, stats[name].absmax_I.double()) for name in edge.readers if name in stats]
    if not seen:
        raise SchemeError(
            f"smooth needs calibration statistics of a linear that reads {edge.source}: there are none of "
            f"{', '.join(edge.readers)}. Calibrate this model first."
        )
    for name, absmax_I in seen:
        if not bool(torch.isfinite(absmax_I).all()):
            raise SchemeError(
                f"calibration statistics must be finite: inputs of {name} are not. Calibrate anew."
            )
    return torch.stack([absmax_I for _, absmax_I in seen]).amax(0)


def _weights(model: nn.Module, edge: Edge) -> Tensor:
    """Largest magnitude of each column, over all readers."""
    return torch.stack([matrix_of(*locate(model, name)).abs().amax(0) for name in edge.readers]).amax(0)
