"""A table as plain data, and as HTML and Markdown; how numbers with intervals are written.

Every number's cell carries the references of the records it comes from (`R3`, or `R3 − R1` for a paired change): as a
link into the provenance table where the row is named, and as the cell's tooltip.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from reports.names import markdown, visible

NOTHING = "–"
"""Shown where nothing was measured."""


@dataclass(frozen=True)
class Entry:
    """One cell of a table."""

    text: str = NOTHING
    number: bool = False
    """Set to the right, in figures of equal width."""
    code: bool = False
    """A name or text from outside: set in a fixed-width face, isolated from the direction of its neighbours."""
    source: str = ""
    """References of the records that the value comes from."""
    link: str = ""
    """A reference that the cell links to."""
    tone: str = ""
    """"worse", "better" or "quiet"."""


@dataclass(frozen=True)
class Heading:
    """A row that spans the table and names the rows below it."""

    text: str


Row = Heading | tuple[Entry, ...]


@dataclass(frozen=True)
class Table:
    """Columns, rows and a note below them."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""

    def _repr_html_(self) -> str:
        return str(to_html(self))

    def _repr_markdown_(self) -> str:
        return to_markdown(self)


def text(value: object, source: str = "", link: str = "", limit: int = 80) -> Entry:
    """A name or text from outside."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return Entry(source=source, link=link)
    return Entry(visible(value, limit), code=True, source=source, link=link)


def prose(value: object) -> Entry:
    """A sentence from a record, at most 400 characters; it may wrap."""
    return Entry(visible(value, 400)) if value else Entry()


def number(value: float | None, digits: int = 1, source: str = "", unit: str = "") -> Entry:
    """A plain number with thousands separated; nothing for NaN."""
    if value is None or not math.isfinite(value):
        return Entry(number=True)
    return Entry(f"{_minus(f'{value:,.{digits}f}')}{unit}", number=True, source=source)


def magnitude(value: float | None, source: str = "") -> Entry:
    """A magnitude with one decimal from 100, two from 1, three below."""
    if value is None or not math.isfinite(value):
        return Entry(number=True)
    digits = 1 if value >= 100 else 2 if value >= 1 else 3
    return number(value, digits, source)


def probability(value: float, source: str = "") -> Entry:
    """A p-value with three decimals; `<0.001` below that."""
    return Entry("<0.001", number=True, source=source) if value < 0.001 else number(value, 3, source)


def with_interval(value: float, low: float, high: float, digits: int = 2, source: str = "") -> Entry:
    """`18.42 [17.10, 19.87]`; the value alone where the interval is unknown."""
    if not math.isfinite(value):
        return Entry(number=True)
    ends = f" [{low:,.{digits}f}, {high:,.{digits}f}]" if math.isfinite(low) and math.isfinite(high) else ""
    return Entry(_minus(f"{value:,.{digits}f}{ends}"), number=True, source=source)


def change(value: float, low: float, high: float, source: str = "", *, more_is: str) -> Entry:
    """`+0.0123 ± 0.0045`, toned where the interval leaves zero out. `more_is` "better" or "worse"."""
    if not math.isfinite(value):
        return Entry(number=True)
    less_is = "better" if more_is == "worse" else "worse"
    tone = more_is if low > 0 else less_is if high < 0 else "quiet"
    return Entry(signed(value, low, high), number=True, source=source, tone=tone)


def signed(value: float, low: float, high: float) -> str:
    """`+0.0123 ± 0.0045` with the decimals that two figures of the half-width need, between two and five."""
    half = (high - low) / 2
    if not math.isfinite(half):
        return _with_sign(value, 3)
    digits = 3 if half == 0 else min(5, max(2, 1 - math.floor(math.log10(half))))
    return f"{_with_sign(value, digits)} ± {half:.{digits}f}"


def anchor(ref: str) -> str:
    """The id of a record's row in the provenance table."""
    return f"record-{re.sub(r'[^A-Za-z0-9]', '', ref)}"


def to_html(table: Table) -> Markup:
    """The table as HTML; every text in it is made visible and escaped."""
    head = Markup("").join(
        Markup('<th scope="col"{}>{}</th>').format(_numeric(table, place), _plain(name))
        for place, name in enumerate(table.columns)
    )
    body = Markup("\n").join(_html_row(row, len(table.columns)) for row in table.rows)
    note = Markup('<p class="note">{}</p>').format(_plain(table.note)) if table.note else Markup("")
    return Markup(
        '<div class="scroll" tabindex="0" role="region" aria-label="{title}"><table id="{name}">'
        "<caption>{title}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>{note}"
    ).format(title=_plain(table.title), name=table.name, head=head, body=body, note=note)


def to_markdown(table: Table) -> str:
    """The table in GitHub's Markdown; every text in it is escaped."""
    width = len(table.columns)
    sides = ["---:" if _numeric(table, place) else "---" for place in range(width)]
    lines = [[markdown(_plain(name)) for name in table.columns], sides]
    for row in table.rows:
        if isinstance(row, Heading):
            lines.append([f"**{markdown(_plain(row.text))}**", *[""] * (width - 1)])
        else:
            lines.append([markdown(_plain(entry.text)) for entry in row])
    grid = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{grid}\n\n{markdown(_plain(table.note))}\n" if table.note else f"{grid}\n"


def _numeric(table: Table, place: int) -> Markup:
    rows = [row for row in table.rows if not isinstance(row, Heading)]
    return Markup(' class="number"') if any(row[place].number for row in rows) else Markup("")


def _html_row(row: Row, width: int) -> Markup:
    if isinstance(row, Heading):
        return Markup('<tr class="group"><th colspan="{}" scope="rowgroup"><bdi>{}</bdi></th></tr>').format(
            width, _plain(row.text)
        )
    anchors = [entry.source for entry in row[:1] if entry.source.startswith("#")]
    mark = Markup(' id="{}"').format(anchor(anchors[0])) if anchors else Markup("")
    return Markup("<tr{}>{}</tr>").format(mark, Markup("").join(map(_html_entry, row)))


def _html_entry(entry: Entry) -> Markup:
    inner: Markup = escape(_plain(entry.text))
    if entry.code:
        inner = Markup("<bdi><code>{}</code></bdi>").format(inner)
    if entry.link:
        inner = Markup('<a href="#{}">{}</a>').format(anchor(entry.link), inner)
    classes = " ".join(filter(None, ["number" if entry.number else "", entry.tone]))
    attributes = Markup(' class="{}"').format(classes) if classes else Markup("")
    if entry.source and not entry.source.startswith("#"):
        attributes += Markup(' title="from {}"').format(_plain(entry.source))
    return Markup("<td{}>{}</td>").format(attributes, inner)


def _plain(shown: str) -> str:
    """The last gate: no unseen character leaves a table, whoever made it."""
    return visible(shown, 2000)


def _with_sign(value: float, digits: int) -> str:
    """A signed number; no sign before a zero."""
    shown = f"{value:+.{digits}f}"
    return _minus(shown) if shown.strip("+-0.") else shown[1:]


def _minus(shown: str) -> str:
    return shown.replace("-", "−")


def grouped(pairs: Sequence[tuple[str, tuple[Entry, ...]]]) -> tuple[Row, ...]:
    """Rows with a heading before each new group; no headings where there is one group only."""
    names = {name for name, _ in pairs}
    rows: list[Row] = []
    last = None
    for name, row in pairs:
        if name != last and len(names) > 1:
            rows.append(Heading(visible(name)))
        rows.append(row)
        last = name
    return tuple(rows)
