"""AWQ's scaling: input channels that carry much are scaled up before rounding, and what makes them down.

Which scales: `quantlab.methods.awq.search_scales`. Where they may go: the declared edges of the architecture. Channels
that read one channel of a source share a scale, the geometric mean of those that were found.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from quantlab.calibration.statistics import LinearStats
from quantlab.layers.linear import weight_of
from quantlab.methods.awq import search_scales
from quantlab.methods.config import MethodConfig
from quantlab.schemes import TensorSpec
from quantlab.transforms.edges import find_edges
from quantlab.transforms.edit import Undo
from quantlab.transforms.scaling import scale_, tied

__all__ = ["ScaledStats", "scale_inputs_"]


class ScaledStats(Mapping[str, LinearStats]):
    """Statistics of inputs over scales; each is read and divided when it is asked for."""

    def __init__(self, stats: Mapping[str, LinearStats]) -> None:
        self.stats, self.scales = stats, dict[str, Tensor]()

    def __getitem__(self, name: str) -> LinearStats:
        found = self.stats[name]
        return found.divided(self.scales[name].to(found.gram_II.device)) if name in self.scales else found

    def __iter__(self) -> Iterator[str]:
        return iter(self.stats)

    def __len__(self) -> int:
        return len(self.stats)


def scale_inputs_(
    model: nn.Module,
    specs: Mapping[str, TensorSpec],
    stats: Mapping[str, LinearStats],
    undo: Undo,
    *,
    scale_dtype: torch.dtype,
    config: MethodConfig,
) -> ScaledStats:
    """Scale every declared edge for the grids of its readers; returns the statistics of the scaled inputs.

    A reader that rotates its inputs mixes their channels, so its edge stays as it is.

    Args:
        specs: by the name of a linear, those that are quantized; an edge takes the grid of its first reader.
        stats: of the inputs of the linears as the model is.

    Raises:
        SchemeError: the architecture is not declared, or statistics are missing.
    """
    scaled = ScaledStats(stats)
    for edge in find_edges(model, ("norm", "link", "values")):
        linears = {name: model.get_submodule(name) for name in edge.readers if name in specs}
        if not linears or any(hasattr(linear, "before") for linear in linears.values()):
            continue
        first = next(iter(linears))
        weights, seen = [weight_of(linear) for linear in linears.values()], scaled.get(first)
        found_I = search_scales(
            weights,
            specs[first],
            None if seen is None else seen.to(weights[0].device),
            scale_dtype=scale_dtype,
            config=config,
        )
        scales_I = tied(edge, found_I)[list(edge.source_of)]
        scale_(model, edge, scales_I, undo)
        scaled.scales |= dict.fromkeys(edge.readers, scales_I.float())
    return scaled
