"""Largest magnitudes of every layer: the Differential Transformer paper's Table 5 as a plot, layer by layer.

Columns are attention logits and hidden states, rows are checkpoints. The paper pools all layers; here one can see
where the outliers live. Source of the statistics: arXiv 2410.05258, Table 5.
"""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from reports.outliers import TENSORS
from reports.style import DASHES, in_figure, new_figure, theme, tidy

LINES = {
    "top1": ("largest", "#08306b", "o"),
    "top10": ("10th largest", "#2171b5", "s"),
    "top100": ("100th largest", "#6baed6", "^"),
    "median": ("median", "#d55e00", "D"),
}
"""Statistic -> label, colour, marker: one hue from dark to light for the top, another for the median."""


def topk_layers(layers: pd.DataFrame) -> Figure | None:
    """Magnitudes against layer on a logarithmic scale; each softmax map has a dash of its own. None without layers."""
    tensors = [tensor for tensor in TENSORS if (layers["tensor"] == tensor).any()]
    checkpoints = list(dict.fromkeys(layers["checkpoint"]))
    if not tensors:
        return None
    with theme():
        size = (1.0 + 4.3 * len(tensors), 0.8 + 2.7 * len(checkpoints))
        figure, grid = new_figure(*size, len(checkpoints), len(tensors), sharex="col", sharey="col")
        for line, checkpoint in zip(grid, checkpoints, strict=True):
            for axes, tensor in zip(line, tensors, strict=True):
                chosen = layers[(layers["checkpoint"] == checkpoint) & (layers["tensor"] == tensor)]
                _panel(axes, chosen)
                axes.set_title(f"{TENSORS[tensor].capitalize()}: {in_figure(checkpoint, 32)}", fontsize=10)
        for axes in grid[-1]:
            axes.set_xlabel("layer")
        for axes in grid[:, 0]:
            axes.set_ylabel("magnitude")
        found = {
            label: handle
            for axes in grid.flat
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=4)
    return figure


def _panel(axes: Axes, rows: pd.DataFrame) -> None:
    maps = sorted(set(rows["map"]))
    for place, which in enumerate(maps):
        own = rows[rows["map"] == which].sort_values("layer")
        for statistic, (label, colour, marker) in LINES.items():
            shown = own[own[statistic] > 0]
            suffix = f", map {which:g}" if len(maps) > 1 and which >= 0 else ""
            if not shown.empty:
                axes.plot(shown["layer"], shown[statistic], DASHES[place % len(DASHES)], color=colour, marker=marker,
                          markersize=3.5, linewidth=1.4, label=label + suffix)  # fmt: skip
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    tidy(axes)
