"""Largest magnitudes of every layer: the Differential Transformer paper's Table 5 as a plot, layer by layer.

Columns are attention logits and hidden states, rows are checkpoints. The paper pools all layers; here one can see
where the outliers live. Source of the statistics: arXiv 2410.05258, Table 5.
"""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from reports.outliers import TENSORS
from reports.style import DASHES, in_figure, legend, logarithmic, new_figure, theme, tidy

LINES = {
    "top1": ("largest", "#08306b", "o"),
    "top10": ("10th largest", "#2171b5", "s"),
    "top100": ("100th largest", "#6baed6", "^"),
    "median": ("median", "#d55e00", "D"),
}
"""Statistic -> label, colour, marker: one hue from dark to light for the top, another for the median."""


def topk_layers(layers: pd.DataFrame) -> Figure | None:
    """Magnitudes against layer on a logarithmic scale; None without layers.

    Where an architecture has two softmax maps, the largest and the median of each, with a dash of its own.
    """
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
                if checkpoint == checkpoints[0]:
                    axes.set_title(TENSORS[tensor].capitalize())
            whose = f"{in_figure(checkpoint, 28)}\n" if len(checkpoints) > 1 else ""
            line[0].set_ylabel(f"{whose}magnitude")
        for axes in grid[-1]:
            axes.set_xlabel("layer")
        legend(figure, *grid.flat)
    return figure


def _panel(axes: Axes, rows: pd.DataFrame) -> None:
    maps = sorted({which for which in rows["map"] if which >= 0})
    if maps:
        for which, dash in zip(maps, DASHES, strict=False):
            _lines(axes, rows[rows["map"] == which], ("top1", "median"), dash, f", map {which:g}")
    else:
        _lines(axes, rows, tuple(LINES), "-", "")
    logarithmic(axes, "y")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    tidy(axes)


def _lines(axes: Axes, rows: pd.DataFrame, statistics: tuple[str, ...], dash: str, suffix: str) -> None:
    rows = rows.sort_values("layer")
    for statistic in statistics:
        label, colour, marker = LINES[statistic]
        shown = rows[rows[statistic] > 0]
        if not shown.empty:
            axes.plot(shown["layer"], shown[statistic], dash, color=colour, marker=marker, markersize=3.5,
                      linewidth=1.4, label=label + suffix)  # fmt: skip
