"""What the records say, in sentences. Each is computed from frames and names the records it rests on.

A scheme loses measurably when a paired 95% interval lies wholly on the losing side of zero: the margin's below it or
that of nats per token above it. Where an interval is known and does not, no loss is measured, and the sentence says
how large a loss could hide. Where none is known, as of one document, it cannot be told.
"""

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
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
    texts = [result.get("perplexity") or {} for result in results]
    sizes = [
        amount([(result.get("hellaswag") or {}).get("n") for result in results], "HellaSwag document"),
        amount([text.get("num_tokens") for text in texts], "token", "of text") + blocks(texts),
    ]
    names = ", ".join(map(visible, run.checkpoints))
    sentences = [f"{count(len(run.checkpoints), 'checkpoint')}: {names}."]
    if scored:
        where = " and ".join(filter(None, sizes))
        sentences.append(
            f"{_scored_schemes([cell.scheme for cell in scored])}, scored on {where or 'no task'}."
        )
    profiles = [cell.record.result for cell in run.of_kind("profile")]
    read = [int(p.get("num_sequences") or 0) * int(p.get("sequence_length") or 0) for p in profiles]
    if profiles:
        sentences.append(f"Outliers of every layer, from {amount(read, 'token', 'of text') or 'a text'}.")
    return " ".join(sentences)


def cost_findings(scores: pd.DataFrame) -> list[Finding]:
    """Per checkpoint: schemes without measurable loss, losses from small to large, the untold, the close, guessing.

    Schemes on the source's own grid are left out: they show nothing about their bits.
    """
    measured = scores["margin_change"].notna() | scores["nats_change"].notna()
    compared = scores[measured & ~scores["no_evidence"].str.startswith(NO_EVIDENCE)]
    found: list[Finding] = []
    for checkpoint, rows in compared.groupby("checkpoint", sort=False):
        lost = (rows["margin_change_high"] < 0) | (rows["nats_change_low"] > 0)
        known = rows["margin_change_high"].notna() | rows["nats_change_low"].notna()
        points = (
            _without_loss(rows[known & ~lost]),
            _losses(rows[lost]),
            "Every scheme loses measurably." if lost.all() else "",
            _unadjusted(rows),
            _untold(rows[~known]),
            _close(rows),
            _guessing(scores[scores["checkpoint"] == checkpoint]),
        )
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
        tell = "tells" if (rows["n"] == 1).all() else "tell"
        points.append(
            f"{visible(checkpoint)}: {amount(rows['n'], 'document')} {tell} {len(told)} of "
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
        return ""
    hidden = []
    if rows["nats_change_high"].max() > 0:
        hidden.append(f"{rows['nats_change_high'].max():.2g} nats per token")
    if rows["margin_change_low"].min() < 0:
        hidden.append(f"{-rows['margin_change_low'].min():.2g} nats of margin per document")
    could = f" Losses up to {' or '.join(hidden)} lie within their intervals." if hidden else ""
    return f"No measurable loss: {_names(rows['scheme'])}.{could}"


def _untold(rows: pd.DataFrame) -> str:
    return (
        f"Too few items for an interval, so a loss cannot be told: {_names(rows['scheme'])}."
        if len(rows)
        else ""
    )


def _unadjusted(rows: pd.DataFrame) -> str:
    """How many intervals were looked at: each by itself leaves its truth out one time in twenty."""
    num_intervals = int(rows[["margin_change_low", "nats_change_low"]].notna().to_numpy().sum())
    if num_intervals < 2:
        return ""
    return (
        f"Losses are read from {num_intervals} paired 95% intervals, each of one comparison and not adjusted for their "
        "number: one in twenty misses its true value."
    )


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
    fewest = close.loc[close.groupby("series", sort=False)["bits"].idxmin()]
    listed = "; ".join(
        f"{visible(row['series'])}: {row['bits']:g} ({visible(row['scheme'])})"
        for row in fewest.to_dict("records")
    )
    within = f"Fewest bits that keep perplexity within {TOLERANCE:.0%}, the whole interval counted."
    return f"{within} {listed[:1].upper()}{listed[1:]}."


def _guessing(rows: pd.DataFrame) -> str:
    guessed = rows[(rows["acc_norm_low"] <= CHANCE) & (rows["acc_norm_high"] >= CHANCE)]
    if guessed.empty:
        return ""
    if BASELINE in set(guessed["scheme"]):
        return "Not even the baseline's accuracy can be told from guessing (25%)."
    return f"Accuracy cannot be told from guessing (25%) under {_names(guessed['scheme'])}."


def _scored_schemes(schemes: Sequence[str]) -> str:
    num_schemes = len(set(schemes) - {BASELINE})
    named = ["the baseline"] if BASELINE in schemes else []
    named += [count(num_schemes, "low-bit scheme")] if num_schemes else []
    shown = " and ".join(named)
    return shown[:1].upper() + shown[1:]


def blocks(texts: Iterable[Mapping[Hashable, Any]]) -> str:
    """`, in 12 blocks of 255 tokens`: what the intervals of a text count, from num_tokens and num_blocks."""
    known = [text for text in texts if text.get("num_blocks") and text.get("num_tokens")]
    if not known:
        return ""
    num_blocks = pd.Series([float(text["num_blocks"]) for text in known])
    sizes = pd.Series([float(text["num_tokens"]) for text in known]) / num_blocks
    word = "block" if num_blocks.max() == 1 else "blocks"
    return f", in {_span(num_blocks, '{:,.0f}')} {word} of {_span(sizes, '{:,.0f}')} tokens"


def amount(numbers: Iterable[int | None], what: str, rest: str = "") -> str:
    """`1 document`, `48 to 64 documents`; empty where there is no number but zero."""
    found = pd.Series([number for number in numbers if number], dtype=float)
    if found.empty:
        return ""
    plural = what if found.max() == 1 else f"{what}s"
    return " ".join(filter(None, (_span(found, "{:,.0f}"), plural, rest)))


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
