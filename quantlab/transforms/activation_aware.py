"""AWQ's scaling: input channels that carry much are scaled up before rounding, and what makes them down.

Which scales: `quantlab.methods.awq.search_scales`. Where they may go: the declared edges of the architecture. Channels
that read one channel of a source share a scale, the geometric mean of those that were found.
"""

from collections.abc import Mapping

import torch
from torch import nn

from quantlab.calibration.statistics import LinearStats
from quantlab.layers.linear import weight_of
from quantlab.methods.awq import search_scales
from quantlab.methods.config import MethodConfig
from quantlab.schemes import TensorSpec
from quantlab.transforms.edges import find_edges
from quantlab.transforms.edit import Undo
from quantlab.transforms.scaling import scale_, tied

__all__ = ["scale_inputs_"]


def scale_inputs_(
    model: nn.Module,
    specs: Mapping[str, TensorSpec],
    stats: Mapping[str, LinearStats],
    undo: Undo,
    *,
    scale_dtype: torch.dtype,
    config: MethodConfig,
) -> dict[str, LinearStats]:
    """Scale every declared edge for the grids of its readers; returns the statistics of the scaled inputs.

    Args:
        specs: by the name of a linear, those that are quantized; an edge takes the grid of its first reader.
        stats: of the inputs of the linears as the model is.

    Raises:
        SchemeError: the architecture is not declared, or statistics are missing.
    """
    scaled = dict(stats)
    for edge in find_edges(model, ("norm", "link", "values")):
        readers = [name for name in edge.readers if name in specs]
        if not readers:
            continue
        found_I = search_scales(
            [weight_of(model.get_submodule(name)) for name in readers],
            specs[readers[0]],
            scaled.get(readers[0]),
            scale_dtype=scale_dtype,
            config=config,
        )
        scales_I = tied(edge, found_I)[list(edge.source_of)]
        scale_(model, edge, scales_I, undo)
        divided = {id(scaled[name]): scaled[name].divided(scales_I.float()) for name in readers[:1]}
        for name in readers:
            known = divided.get(id(scaled[name]))
            scaled[name] = known or scaled[name].divided(scales_I.float())
    return scaled
