"""Survival function of |x|: the share of values at least as large as m, on two logarithmic axes.

A straight fall is a power law; a shelf far to the right is a few values that stand alone, the outliers that set an
absmax scale. From exact counts in buckets less than 1% wide, so every point is exact at its bucket's lower edge.
"""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports.outliers import TENSORS
from reports.style import DASHES, MUTED, colours, in_figure, legend, logarithmic, new_figure, theme, tidy

SMALLEST_SHOWN = 1e-5
"""Share of the largest magnitude below which nothing is drawn: tails are about the other end."""


def activation_tails(tails: pd.DataFrame) -> Figure | None:
    """A panel per tensor, a line per checkpoint; None without histograms."""
    tensors = [tensor for tensor in TENSORS if (tails["tensor"] == tensor).any()]
    if not tensors:
        return None
    with theme():
        figure, grid = new_figure(1.0 + 4.3 * len(tensors), 3.7, 1, len(tensors))
        for axes, tensor in zip(grid[0], tensors, strict=True):
            _panel(axes, tails[tails["tensor"] == tensor], list(dict.fromkeys(tails["checkpoint"])))
            axes.set_title(TENSORS[tensor].capitalize())
        grid[0, 0].set_ylabel("share of values ≥ magnitude")
        legend(figure, grid[0, 0])
    return figure


def _panel(axes: Axes, rows: pd.DataFrame, names: list[str]) -> None:
    palette = colours(names)
    for place, name in enumerate(names):
        own = rows[(rows["checkpoint"] == name) & (rows["magnitude"] > 0)]
        own = own[own["magnitude"] >= SMALLEST_SHOWN * own["magnitude"].max()]
        dash = DASHES[place % len(DASHES)]
        axes.plot(own["magnitude"], own["share"], dash, color=palette[name], label=in_figure(name),
                  drawstyle="steps-post")  # fmt: skip
        if not own.empty:
            axes.plot(
                own["magnitude"].iloc[-1:], own["share"].iloc[-1:], "o", color=palette[name], markersize=4
            )
    logarithmic(axes, "x")
    logarithmic(axes, "y")
    axes.set_xlabel("magnitude")
    axes.tick_params(which="minor", color=MUTED)
    tidy(axes, grid="both")
