"""One cell of a table: how texts, numbers, intervals and changes are written."""

import math
from dataclasses import dataclass

from quantlab.statistics import TOO_FEW
from reports.names import visible

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


def with_interval(
    value: float, low: float, high: float, digits: int = 2, source: str = "", *, stderr: float = math.nan
) -> Entry:
    """`18.42 (0.70) [17.10, 19.87]`; without the standard error where it is unknown, `18.42 [too few]` where the
    interval is."""
    if not math.isfinite(value):
        return Entry(number=True)
    ends = f"{low:,.{digits}f}, {high:,.{digits}f}" if math.isfinite(high - low) else TOO_FEW
    error = f" ({stderr:,.{digits}f})" if math.isfinite(stderr) else ""
    return Entry(_minus(f"{value:,.{digits}f}{error}") + _minus(f" [{ends}]"), number=True, source=source)


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
        return f"{_with_sign(value, 3)} ({TOO_FEW})"
    digits = 3 if half == 0 else min(5, max(2, 1 - math.floor(math.log10(half))))
    return f"{_with_sign(value, digits)} ± {half:.{digits}f}"


def _with_sign(value: float, digits: int) -> str:
    """A signed number; no sign before a zero."""
    shown = f"{value:+.{digits}f}"
    return _minus(shown) if shown.strip("+-0.") else shown[1:]


def _minus(shown: str) -> str:
    return shown.replace("-", "−")
