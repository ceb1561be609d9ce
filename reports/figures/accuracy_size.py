"""Score against size: what a megabyte buys.

Only schemes that quantize weights and nothing else, and the baseline: what else is quantized does not change the size.
Size is that of the whole model: packed codes, scales and zero points, and unquantized tensors at 16 bits, whatever the
checkpoint or an export stores them in.
"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reports.load import BASELINE
from reports.scheme_names import read_scheme
from reports.style import INK, colours, in_figure, legend, markers, new_figure, theme, tidy

PANELS = {
    "acc_norm": ("HellaSwag accuracy", "acc_norm (%)", 100.0),
    "nats_per_token": ("Text", "nats per token", 1.0),
}
"""Column -> title, axis label and factor."""
SIDES = (("right", (-7, -3)), ("left", (7, -3)))
"""Alignment and offset in points of a label to the left and to the right of its point."""


def accuracy_size(scores: pd.DataFrame) -> Figure | None:
    """Scores with 95% intervals against size in megabytes, a point per scheme; None without two sizes."""
    alone = [scheme == BASELINE or list(read_scheme(scheme).parts) == ["w"] for scheme in scores["scheme"]]
    rows = scores[pd.Series(alone, index=scores.index, dtype=bool) & scores["weights_bytes"].notna()]
    panels = [column for column in PANELS if rows[column].notna().any()]
    if not panels or rows["weights_bytes"].nunique() < 2:
        return None
    with theme():
        figure, grid = new_figure(1.0 + 4.3 * len(panels), 3.9, 1, len(panels))
        for axes, column in zip(grid[0], panels, strict=True):
            _panel(axes, rows[rows[column].notna()], column)
        legend(figure, grid[0, 0])
    return figure


def _panel(axes: Axes, rows: pd.DataFrame, column: str) -> None:
    names = list(dict.fromkeys(rows["checkpoint"]))
    palette, shapes = colours(names), markers(names)
    title, label, factor = PANELS[column]
    for place, name in enumerate(names):
        own = rows[rows["checkpoint"] == name].sort_values("weights_bytes")
        size = own["weights_bytes"].to_numpy(float) / 1e6
        y, low, high = (factor * own[f"{column}{end}"].to_numpy(float) for end in ("", "_low", "_high"))
        axes.errorbar(size, y, [y - low, high - y], fmt=shapes[name], color=palette[name], capsize=2.5,
                      elinewidth=1.1, label=in_figure(name))  # fmt: skip
        # Above the interval; of several checkpoints beside the point, each on its own side.
        align, offset = ("center", (0, 4)) if len(names) == 1 else SIDES[place % 2]
        heights = np.fmax(y, high) if len(names) == 1 else y
        for at, height, scheme in zip(size, heights, own["scheme"], strict=True):
            axes.annotate(in_figure(scheme, 20), (at, height), xytext=offset, textcoords="offset points", ha=align,
                          fontsize=8, color=INK)  # fmt: skip
    axes.set_title(title)
    axes.set_xlabel("size, with unquantized tensors at 16 bits (MB)")
    axes.set_ylabel(label)
    axes.margins(x=0.12)
    tidy(axes, grid="both")
