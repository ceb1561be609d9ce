"""A certificate as a section of a model card, between two markers, which a later one replaces."""

import html
import math
from collections.abc import Sequence

from quantlab.verify.certificate import FLIP_COLUMNS, SPEEDS, STATES, Certificate, Row

__all__ = ["into_card", "section"]

BEGIN, END = "<!-- certificate of quantlab -->", "<!-- end of certificate -->"
_COLUMNS = (
    "engine",
    "result",
    "low bits there",
    "computes in",
    "largest logit gap",
    "KL [nats]",
    "HellaSwag",
    "",
)


def section(certificate: Certificate) -> str:
    """Verdict, what was checked, the engine matrix, and answers that differ."""
    parts = [
        BEGIN,
        "## Certificate",
        _escaped(certificate.verdict),
        _table(("", ""), certificate.facts()),
        _table(_COLUMNS, [_cells(row) for row in certificate.rows]),
    ]
    if flips := certificate.flips():
        parts.append(_table(FLIP_COLUMNS, flips))
    return "\n\n".join([*parts, END])


def into_card(card: str, certificate: Certificate) -> str:
    """A card with this certificate, in the place of an earlier one or at the end."""
    before, begin, rest = card.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        return before + section(certificate) + after
    return card.rstrip("\n") + "\n\n" + section(certificate) + "\n"


def _cells(row: Row) -> tuple[str, ...]:
    found = row.agreement
    measured = ("", "", "", "")
    if found is not None:
        gap, allowed = found.gaps["logits"].largest, found.allowed["logits"].largest
        measured = (
            found.arithmetic,
            f"{_number(gap)} (at most {_number(allowed)})",
            _number(found.divergence),
            f"{found.num_same} of {found.num_documents} answers the same",
        )
    versions = ", ".join(f"{name} {version}" for name, version in (row.versions or {}).items())
    notes = " ".join(part for part in (row.reason, row.engine.note, versions) if part)
    return (row.engine.name, STATES[row.state], SPEEDS[row.engine.speed], *measured, _escaped(notes))


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "not finite"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(text: str) -> str:
    """Text of unknown origin on one line of a table, with nothing in it that renders or ends a comment."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|").replace("`", "'")
