"""How numbers are written, and that nothing in a table can act."""

import math

import pytest

from reports.entries import Entry, change, magnitude, number, probability, signed, text, with_interval
from reports.outliers import paper_table5
from reports.tables import Heading, Table, anchor, grouped, to_html, to_markdown

HOSTILE = "</script><script>alert(1)</script> | `x` [a](http://e.vil) {{ 7*7 }} \n\u202e =cmd()"


@pytest.mark.parametrize(
    ("value", "low", "high", "shown"),
    [
        (0.01234, 0.00784, 0.01684, "+0.0123 ± 0.0045"),
        (-1.5, -1.9, -1.1, "−1.50 ± 0.40"),
        (0.0, 0.0, 0.0, "0.000 ± 0.000"),
        (-0.00001, -0.003, 0.003, "0.0000 ± 0.0030"),
        (2e-7, 1e-7, 3e-7, "0.00000 ± 0.00000"),
        (0.25, math.nan, math.nan, "+0.250 (too few)"),
    ],
)
def test_changes_show_two_figures_of_their_half_width(
    value: float, low: float, high: float, shown: str
) -> None:
    assert signed(value, low, high) == shown


def test_changes_are_toned_by_their_interval() -> None:
    assert change(0.2, 0.1, 0.3, more_is="worse").tone == "worse"
    assert change(0.2, 0.1, 0.3, more_is="better").tone == "better"
    assert change(-0.2, -0.3, -0.1, more_is="worse").tone == "better"
    assert change(0.2, -0.1, 0.5, more_is="worse").tone == "quiet"


def test_numbers() -> None:
    assert number(1234567.89, 1).text == "1,234,567.9" and number(-2, 0).text == "−2"
    assert [magnitude(v).text for v in (9797.84, 58.923, 0.0161)] == ["9,797.8", "58.92", "0.016"]
    assert with_interval(18.42, 17.1, 19.87).text == "18.42 [17.10, 19.87]"
    assert with_interval(18.42, math.nan, math.nan).text == "18.42 [too few]"
    assert [probability(p).text for p in (0.0004, 0.0312, 1.0)] == ["<0.001", "0.031", "1.000"]
    for unknown in (number(math.nan), magnitude(None), with_interval(math.nan, 0, 1), number(math.inf)):
        assert unknown.text == "–"


def test_html_escapes_every_text() -> None:
    table = Table("t", HOSTILE, (HOSTILE,), (Heading(HOSTILE), (text(HOSTILE, HOSTILE, HOSTILE),)), HOSTILE)
    html = str(to_html(table))
    assert "<script" not in html and "alert(1)" in html
    assert "\u202e" not in html and html.count("\n") == 5
    assert f'href="#{anchor(HOSTILE)}"' in html and anchor("R3") == "record-R3"


def test_markdown_cells_cannot_break_the_table() -> None:
    table = Table("t", "T", ("a", "b"), ((text(HOSTILE), number(1.0, source="R3 − R1")),))
    lines = to_markdown(table).splitlines()
    assert len(lines) == 3 and lines[1] == "| --- | ---: | --- |"
    assert lines[2].replace("\\|", "").count("|") == 4 and "<script" not in lines[2].replace("\\<", "")
    assert lines[2].endswith("| 1.0 | R3 − R1 |")


def test_groups_have_headings_where_there_is_more_than_one() -> None:
    row = (Entry("x"),)
    assert grouped([("A", row), ("A", row)]) == (row, row)
    assert grouped([("A", row), ("B", row)]) == (Heading("A"), row, Heading("B"), row)


def test_the_papers_table_is_as_published() -> None:
    paper = paper_table5()
    assert paper["top1"].tolist() == [318.0, 38.8, 3608.6, 1688.2]
    assert paper["median"].tolist() == [5.4, 3.3, 0.6, 1.2]
    assert paper["top1_over_median"].round(1).tolist() == [58.9, 11.8, 6014.3, 1406.8]
