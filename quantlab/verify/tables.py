"""A certificate for people at a terminal."""

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from quantlab.verify.certificate import FLIP_COLUMNS, SPEEDS, STATES, Certificate, Row

__all__ = ["certificate_table"]


def certificate_table(certificate: Certificate) -> Group:
    """What was checked, then one line per engine, then answers that differ, then the verdict."""
    facts = Table(box=None, pad_edge=False, show_header=False)
    for name, value in certificate.facts():
        facts.add_row(name, escape(value))
    columns = (
        "engine",
        "result",
        "low bits there",
        "computes in",
        "largest logit gap",
        "allowed",
        "KL [nats]",
    )
    engines = Table(*columns, "answers", "seconds", "MB", box=None, pad_edge=False)
    for row in certificate.rows:
        engines.add_row(row.engine.name, STATES[row.state], SPEEDS[row.engine.speed], *_measured(row))
    reasons = [f"{row.engine.name}: {escape(row.reason)}" for row in certificate.rows if row.reason]
    return Group(facts, engines, *reasons, *_flips(certificate), escape(certificate.verdict))


def _measured(row: Row) -> tuple[str, ...]:
    found = row.agreement
    if found is None:
        return ()
    gap, allowed = found.gaps["logits"].largest, found.allowed["logits"].largest
    return (
        found.arithmetic,
        f"{gap:.3g}",
        f"{allowed:.3g}",
        f"{found.divergence:.3g}",
        f"{found.num_same} of {found.num_documents} the same",
        f"{row.seconds:.1f}",
        f"{row.peak_bytes / 1e6:,.0f}",
    )


def _flips(certificate: Certificate) -> list[Table]:
    table = Table(*FLIP_COLUMNS, box=None, pad_edge=False)
    for cells in certificate.flips():
        table.add_row(*cells)
    return [table] if table.row_count else []
