"""One visual language for every figure: theme, colours, and how a figure is written as the same bytes each time.

Colours are Okabe and Ito's, which stay apart for colour-blind readers (https://jfly.uni-koeln.de/color/); markers and
dashes repeat what colour says. Matplotlib's Agg canvas and no dates: the same frame gives the same file.
"""

import io
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import matplotlib as mpl
import seaborn as sns
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from reports.names import visible

INK, MUTED, GRID, PAPER = "#1b1f24", "#5b6470", "#e3e6ea", "#ffffff"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
MARKERS = ("o", "s", "D", "^", "v", "P")
DASHES = ("-", "--", "-.", ":")
PNG_DPI = 160
FONT = "DejaVu Sans"
"""Comes with matplotlib, so that figures look alike everywhere."""

_RC = {
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "font.family": [FONT],
    # Checkpoint names may hold "$": they are text, never formulas.
    "text.parse_math": False,
    "axes.formatter.use_mathtext": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "quantlab",
}


@contextmanager
def theme() -> Iterator[None]:
    """The look of every figure, for the span of the block; the caller's own settings come back after it."""
    style = sns.axes_style("whitegrid") | _RC
    with mpl.rc_context(style):
        yield


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **layout: Any
) -> tuple[Figure, Any]:
    """A figure of width x height inches with a grid of axes [rows, columns], without pyplot's global state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **layout)


def tidy(axes: Axes, grid: str = "y") -> None:
    """Keep the grid lines of one direction, and the spine across them."""
    sns.despine(ax=axes, left=grid != "both")
    axes.grid(False)
    axes.grid(True, axis=grid)  # type: ignore[arg-type]


def logarithmic(axes: Axes, which: Literal["x", "y"]) -> None:
    """A logarithmic axis whose ticks read 0.01, 1, 1,000, and powers of ten beyond that. Call it after drawing.

    Short axes have ticks at 1, 2 and 5 times a power of ten.
    """
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if high < 300 * low else (1,), numticks=7))
    axis.set_major_formatter(FuncFormatter(_power))
    axis.set_minor_formatter(NullFormatter())


def legend(figure: Figure, *panels: Axes) -> None:
    """One legend below all panels, each label once; none where there is nothing to tell apart."""
    found = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if len(found) > 1:
        figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=min(len(found), 4))


def in_figure(text: object, limit: int = 48) -> str:
    """`visible`, and with `□` for what the figures' font cannot draw."""
    shown = "".join(c if ord(c) in _drawable() else "□" for c in visible(text, limit))
    # Matplotlib leaves labels that start with "_" out of legends: a hair space goes before it.
    return f"\u200a{shown}" if shown.startswith("_") else shown


def colours(names: Iterable[str]) -> dict[str, str]:
    """name -> colour, in the order given; after six names the colours come again, with another marker or dash."""
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(dict.fromkeys(names))}


def markers(names: Iterable[str]) -> dict[str, str]:
    """name -> marker, shifted on each round of the palette so that no pair of colour and marker repeats early."""
    ordered = list(dict.fromkeys(names))
    return {name: MARKERS[(i + i // len(PALETTE)) % len(MARKERS)] for i, name in enumerate(ordered)}


def as_svg(figure: Figure) -> bytes:
    """The figure as SVG, the same bytes for the same figure: no date, no version, salted ids."""
    return _saved(figure, "svg", {"Date": None, "Creator": None})


def as_png(figure: Figure) -> bytes:
    """The figure as PNG at 160 dots per inch, without the writer's version in it."""
    return _saved(figure, "png", {"Software": None})


def _saved(figure: Figure, kind: str, metadata: dict[str, None]) -> bytes:
    buffer = io.BytesIO()
    with theme():
        figure.savefig(buffer, format=kind, dpi=PNG_DPI, metadata=metadata)
    # Laid out once: the next format takes the same places, and half the time.
    figure.set_layout_engine("none")
    return buffer.getvalue()


def _power(value: float, _: int = 0) -> str:
    if 1e-3 <= value < 1e5:
        return f"{value:,.10g}"
    return "10" + f"{math.log10(value):.0f}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


@cache
def _drawable() -> frozenset[int]:
    path = font_manager.findfont(FONT)
    return frozenset(font_manager.get_font(path).get_charmap())
