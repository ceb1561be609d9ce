"""Figures draw what the frames hold, survive gaps and hostile names, and come out as the same bytes."""

from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from reports.figures.accuracy_bits import accuracy_bits
from reports.figures.accuracy_size import accuracy_size
from reports.figures.activation_tails import activation_tails
from reports.figures.degradation import degradation
from reports.figures.topk_layers import topk_layers
from reports.load import load_run
from reports.outliers import layers, outliers, tails
from reports.scores import scores
from reports.style import as_png, as_svg, colours, in_figure, markers
from tests.reports.synthetic import write_run

HOSTILE = "$\\frac{1}$ <svg onload=x> \u202e 模型 \n"


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pd.DataFrame]:
    folder: Path = tmp_path_factory.mktemp("run")
    write_run(folder, checkpoints=("A", HOSTILE), schemes=("w16", "w8", "w4", "l4t"), num_documents=40)
    run = load_run(folder)
    return {"scores": scores(run), "layers": layers(run), "tails": tails(run), "outliers": outliers(run)}


FIGURES: list[tuple[Callable[[pd.DataFrame], Figure | None], str]] = [
    (accuracy_bits, "scores"),
    (degradation, "scores"),
    (accuracy_size, "scores"),
    (topk_layers, "layers"),
    (activation_tails, "tails"),
]


@pytest.mark.parametrize(("draw", "frame"), FIGURES, ids=[draw.__name__ for draw, _ in FIGURES])
def test_the_same_frame_gives_the_same_bytes(
    frames: dict[str, pd.DataFrame], draw: Callable[[pd.DataFrame], Figure | None], frame: str
) -> None:
    figure, again = draw(frames[frame]), draw(frames[frame].copy())
    assert figure is not None and again is not None
    svg = as_svg(figure)
    assert svg == as_svg(again) and b"<dc:date>" not in svg and b"Matplotlib v" not in svg
    assert b"<script" not in svg and b"onload=x>" not in svg.replace(b"&lt;svg onload=x&gt;", b"")
    assert as_png(figure)[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(("draw", "frame"), FIGURES, ids=[draw.__name__ for draw, _ in FIGURES])
def test_nothing_to_draw_is_no_figure(
    frames: dict[str, pd.DataFrame], draw: Callable[[pd.DataFrame], Figure | None], frame: str
) -> None:
    assert draw(frames[frame].iloc[:0]) is None


def test_lines_are_at_the_scores(frames: dict[str, pd.DataFrame]) -> None:
    figure = accuracy_bits(frames["scores"])
    assert figure is not None
    panel = next(axes for axes in figure.axes if axes.get_title(loc="left") == "attention logits")
    own = frames["scores"].query("checkpoint == 'A' and scheme in ['w16', 'l4t']")
    assert np.allclose(panel.lines[0].get_ydata(), 100 * own["acc_norm"])
    assert [label.get_text() for label in panel.get_xticklabels()] == ["16", "8", "4"]


def test_a_marker_is_filled_where_the_interval_leaves_zero_out(frames: dict[str, pd.DataFrame]) -> None:
    frame = frames["scores"].query("checkpoint == 'A' and scheme in ['w8', 'w4']").copy()
    frame[["nats_change", "nats_change_low", "nats_change_high"]] = [[0.1, -0.1, 0.3], [0.5, 0.4, 0.6]]
    figure = degradation(frame.assign(margin_change=np.nan))
    assert figure is not None and len(figure.axes) == 1
    drawn = {tuple(line.get_xdata()): line.get_markerfacecolor() for line in figure.axes[0].lines}
    assert drawn[0.5,] != "#ffffff" and drawn[0.1,] == "#ffffff"


def test_the_tail_ends_at_the_largest_value(frames: dict[str, pd.DataFrame]) -> None:
    own = frames["tails"].query("checkpoint == 'A' and tensor == 'hidden_states'")
    assert (np.diff(own["share"]) <= 0).all() and own["share"].iloc[0] == 1.0
    top1 = frames["outliers"].query("checkpoint == 'A' and tensor == 'hidden_states'")["top1"].iloc[0]
    assert own["magnitude"].max() == pytest.approx(top1)


def test_one_document_has_no_interval_and_still_draws(tmp_path: Path) -> None:
    write_run(tmp_path, schemes=("w16", "w4"), num_documents=1, profile=False)
    frame = scores(load_run(tmp_path))
    assert frame["margin_change_low"].isna().all() and frame["margin_change"].notna().any()
    for draw in (accuracy_bits, degradation, accuracy_size):
        figure = draw(frame)
        assert figure is not None and as_svg(figure)


def test_a_name_that_starts_with_an_underscore_is_in_the_legend(frames: dict[str, pd.DataFrame]) -> None:
    renamed = frames["scores"].replace({"checkpoint": {"A": "_a"}})
    for draw in (accuracy_bits, accuracy_size, degradation):
        figure = draw(renamed)
        assert figure is not None
        shown = [label.get_text().strip() for legend in figure.legends for label in legend.get_texts()]
        assert "_a" in shown
    as_svg(figure)


def test_drawing_leaves_the_callers_settings_alone(frames: dict[str, pd.DataFrame]) -> None:
    before = dict(mpl.rcParams)
    assert degradation(frames["scores"]) is not None
    assert dict(mpl.rcParams) == before


def test_colours_and_markers_tell_many_names_apart() -> None:
    names = [f"checkpoint {i}" for i in range(24)]
    pairs = {(colours(names)[name], markers(names)[name]) for name in names}
    assert len(pairs) == 24
    assert in_figure("模型 α") == "□□ α"
