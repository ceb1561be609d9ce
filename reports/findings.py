"""What the records say, in sentences. Each is computed from frames and names the records it rests on.

A scheme loses measurably when a paired 95% interval lies wholly on the losing side of zero: the margin's below it or
that of nats per token above it. Otherwise no loss is measured, and the sentence says how large a loss could hide.
"""

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from reports.entries import signed
from reports.load import BASELINE, Run
from reports.names import visible
from reports.scores import CHANCE, ENDS, NO_EVIDENCE, SIGNIFICANT

TOLERANCE = 0.01
"""Growth of perplexity that counts as close to the baseline."""
MOST_NATS = 700.0
"""exp of more is beyond the range of floats."""


@dataclass(frozen=True)
class Finding:
    """Sentences about one subject, and the references of the records behind them."""

    subject: str
    points: tuple[str, ...]
    refs: tuple[str, ...]


def summary(run: Run) -> str:
    """What was measured: schemes, checkpoints, documents and tokens."""
    scored = run.of_kind("evaluation")
    results = [cell.record.result for cell in scored]
    num_schemes = len({cell.scheme for cell in scored} - {BASELINE})
    sizes = [
        _amount([(result.get("hellaswag") or {}).get("n") for result in results], "HellaSwag documents"),
        _amount([(result.get("perplexity") or {}).get("num_tokens") for result in results], "tokens of text"),
    ]
    names = ", ".join(map(visible, run.checkpoints))
    sentences = [f"{count(len(run.checkpoints), 'checkpoint')}: {names}."]
    if scored:
        where = " and ".join(filter(None, sizes))
        sentences.append(
            f"The baseline and {count(num_schemes, 'low-bit scheme')}, scored on {where or 'no task'}."
        )
    profiles = [cell.record.result for cell in run.of_kind("profile")]
    read = [int(p.get("num_sequences") or 0) * int(p.get("sequence_length") or 0) for p in profiles]
    if profiles:
        sentences.append(f"Outliers of every layer, from {_amount(read, 'tokens of text') or 'a text'}.")
    return " ".join(sentences)


def cost_findings(scores: pd.DataFrame) -> list[Finding]:
    """Per checkpoint: schemes without measurable loss, losses from small to large, what stays close, guessing.

    Schemes on the source's own grid are left out: they show nothing about their bits.
    """
    measured = scores["margin_change"].notna() | scores["nats_change"].notna()
    compared = scores[measured & ~scores["no_evidence"].str.startswith(NO_EVIDENCE)]
    found: list[Finding] = []
    for checkpoint, rows in compared.groupby("checkpoint", sort=False):
        lost = (rows["margin_change_high"] < 0) | (rows["nats_change_low"] > 0)
        scored = scores[scores["checkpoint"] == checkpoint]
        points = (_without_loss(rows[~lost]), _losses(rows[lost]), _close(rows), _guessing(scored))
        refs = tuple(dict.fromkeys([*rows["baseline_ref"], *rows["ref"]]))
        found.append(Finding(f"{visible(checkpoint)}: what low bits cost", tuple(filter(None, points)), refs))
    return found


def accuracy_finding(scores: pd.DataFrame) -> Finding | None:
    """What accuracy can tell with this many documents, per checkpoint."""
    tested = scores[scores["mcnemar_p"].notna()]
    if tested.empty:
        return None
    points = []
    for checkpoint, rows in tested.groupby("checkpoint", sort=False):
        told = rows[rows["holm_p"] < SIGNIFICANT]
        points.append(
            f"{visible(checkpoint)}: {_span(rows['n'], '{:,.0f}')} documents tell {len(told)} of "
            f"{count(len(rows), 'scheme')} from the baseline{_listed(told['scheme'])} (exact McNemar test of "
            f"acc_norm, Holm-adjusted p below {SIGNIFICANT})."
        )
    points.extend(_resolution(100 * tested["smallest_detectable"].dropna()))
    return Finding("What accuracy can tell", tuple(points), tuple(tested["ref"]))


def _resolution(detectable: "pd.Series[float]") -> Iterator[str]:
    """What the test could find, in points, with as many documents flipping as did."""
    resolved = detectable[detectable < math.inf]
    num_unresolved = len(detectable) - len(resolved)
    if len(resolved):
        yield (
            "For this test to find it with 80% power, a true difference must reach "
            f"{_span(resolved, '{:.1f}')} points, by how many documents flip."
        )
    if num_unresolved:
        yield (
            f"Under {num_unresolved} of {count(len(detectable), 'scheme')} so few documents flip that a difference "
            "cannot be resolved at this n, even if all flips went one way."
        )
    if len(detectable):
        yield "What accuracy does not resolve, the paired margin and nats per token may: read those."


def _without_loss(rows: pd.DataFrame) -> str:
    if rows.empty:
        return "Every scheme loses measurably."
    hidden = []
    if rows["nats_change_high"].notna().any():
        hidden.append(f"{rows['nats_change_high'].max():.2g} nats per token")
    if rows["margin_change_low"].notna().any():
        hidden.append(f"{-rows['margin_change_low'].min():.2g} nats of margin per document")
    could = f" Losses up to {' or '.join(hidden)} lie within their intervals." if hidden else ""
    return f"No measurable loss: {_names(rows['scheme'])}.{could}"


def _losses(rows: pd.DataFrame) -> str:
    if rows.empty:
        return ""
    if rows["nats_change"].notna().all():
        ordered = rows.sort_values("nats_change", kind="stable")
        listed = [f"{visible(row['scheme'])} {_perplexity_change(row)}" for row in ordered.to_dict("records")]
        return f"Measurable losses, in perplexity of the text, smallest first: {', '.join(listed)}."
    ordered = rows.sort_values("margin_change", ascending=False, kind="stable")
    listed = [
        f"{visible(row['scheme'])} {signed(*(row[f'margin_change{end}'] for end in ENDS))}"
        for row in ordered.to_dict("records")
    ]
    return f"Measurable losses, in nats of margin per document, smallest first: {', '.join(listed)}."


def _perplexity_change(row: Mapping[Hashable, Any]) -> str:
    """The ratio of perplexities, exp of the change in nats per token, as a percentage or, from twofold, a factor."""
    value = float(row["nats_change"])
    if value >= MOST_NATS:
        shown = "beyond measure"
    else:
        shown = f"{100 * math.expm1(value):+.2g}%" if value < math.log(2) else f"×{math.exp(value):.3g}"
    alone = "" if row["nats_change_low"] > 0 else " (seen in the margin alone)"
    return shown.replace("-", "−") + alone


def _close(rows: pd.DataFrame) -> str:
    """The fewest bits whose perplexity is shown, not merely not refuted, to stay within the tolerance."""
    if rows["nats_change_high"].isna().all():
        return ""
    close = rows[rows["nats_change_high"] <= math.log1p(TOLERANCE)]
    if close.empty:
        return f"No scheme is shown to keep perplexity within {TOLERANCE:.0%} of the baseline's."
    fewest = close.groupby("series", sort=False)["bits"].min()
    listed = "; ".join(f"{visible(series)}: {bits:g}" for series, bits in fewest.items())
    within = f"Fewest bits that keep perplexity within {TOLERANCE:.0%}, the whole interval counted."
    return f"{within} {listed[:1].upper()}{listed[1:]}."


def _guessing(rows: pd.DataFrame) -> str:
    guessed = rows[(rows["acc_norm_low"] <= CHANCE) & (rows["acc_norm_high"] >= CHANCE)]
    if guessed.empty:
        return ""
    if BASELINE in set(guessed["scheme"]):
        return "Not even the baseline's accuracy can be told from guessing (25%)."
    return f"Accuracy cannot be told from guessing (25%) under {_names(guessed['scheme'])}."


def _amount(numbers: Iterable[int | None], what: str) -> str:
    found = pd.Series([number for number in numbers if number], dtype=float)
    return f"{_span(found, '{:,.0f}')} {what}" if len(found) else ""


def _names(schemes: Iterable[object]) -> str:
    return ", ".join(visible(scheme) for scheme in schemes)


def _listed(schemes: Iterable[object]) -> str:
    names = _names(schemes)
    return f": {names}" if names else ""


def count(n: int, what: str) -> str:
    """`1 scheme`, `3 schemes`."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _span(values: "pd.Series[float]", form: str) -> str:
    low, high = form.format(values.min()), form.format(values.max())
    return low if low == high else f"{low} to {high}"
