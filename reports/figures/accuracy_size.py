"""Score against the size of the weights: what a megabyte buys.

Only schemes that make weights smaller, and the baseline; a scheme on attention logits or inputs alone has the
baseline's size. Size is what decoder weights occupy, scales and zero points included.
"""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports.load import BASELINE
from reports.names import read_scheme
from reports.style import INK, colours, in_figure, markers, new_figure, theme, tidy

PANELS = {
    "acc_norm": ("HellaSwag accuracy", "acc_norm (%)", 100.0),
    "nats_per_token": ("Text", "nats per token", 1.0),
}
"""Column -> title, axis label and factor."""


def accuracy_size(scores: pd.DataFrame) -> Figure | None:
    """Scores with 95% intervals against megabytes of weights, a point per scheme; None without two sizes."""
    smaller = [scheme == BASELINE or bool(read_scheme(scheme).weight_grid) for scheme in scores["scheme"]]
    rows = scores[pd.Series(smaller, index=scores.index, dtype=bool) & scores["weights_bytes"].notna()]
    panels = [column for column in PANELS if rows[column].notna().any()]
    if not panels or rows["weights_bytes"].nunique() < 2:
        return None
    with theme():
        figure, grid = new_figure(1.0 + 4.3 * len(panels), 3.9, 1, len(panels))
        for axes, column in zip(grid[0], panels, strict=True):
            _panel(axes, rows[rows[column].notna()], column)
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3))
    return figure


def _panel(axes: Axes, rows: pd.DataFrame, column: str) -> None:
    names = list(dict.fromkeys(rows["checkpoint"]))
    palette, shapes = colours(names), markers(names)
    title, label, factor = PANELS[column]
    for name in names:
        own = rows[rows["checkpoint"] == name].sort_values("weights_bytes")
        size = own["weights_bytes"].to_numpy(float) / 1e6
        y, low, high = (factor * own[f"{column}{end}"].to_numpy(float) for end in ("", "_low", "_high"))
        axes.errorbar(size, y, [y - low, high - y], fmt=shapes[name], color=palette[name], capsize=2.5,
                      elinewidth=1.1, label=in_figure(name))  # fmt: skip
        for at, height, scheme in zip(size, y, own["scheme"], strict=True):
            axes.annotate(in_figure(scheme, 20), (at, height), xytext=(6, 4), textcoords="offset points", fontsize=8,
                          color=INK)  # fmt: skip
    axes.set_title(title)
    axes.set_xlabel("decoder weights (MB)")
    axes.set_ylabel(label)
    axes.margins(x=0.12)
    tidy(axes, grid="both")
