"""What the records say, in sentences. Each is computed from frames and names the records it rests on.

A scheme loses measurably when a paired 95% interval lies wholly on the losing side of zero: the margin's below it or
that of nats per token above it. Otherwise no loss is measured, and the sentence says how large a loss could hide.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from reports.load import BASELINE, Run
from reports.names import visible
from reports.outliers import TENSORS
from reports.tables import signed

CHANCE = 0.25
"""HellaSwag accuracy of guessing: one ending in four."""


@dataclass(frozen=True)
class Finding:
    """One sentence or two about one subject, and the references of the records behind it."""

    subject: str
    text: str
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
    sentences = [f"{_count(len(run.checkpoints), 'checkpoint')}: {names}."]
    if scored:
        where = " and ".join(filter(None, sizes))
        sentences.append(
            f"The baseline and {_count(num_schemes, 'low-bit scheme')}, scored on {where or 'no task'}."
        )
    profiles = [cell.record.result for cell in run.of_kind("profile")]
    read = [int(p.get("num_sequences") or 0) * int(p.get("sequence_length") or 0) for p in profiles]
    if profiles:
        sentences.append(f"Outliers of every layer, from {_amount(read, 'tokens of text') or 'a text'}.")
    return " ".join(sentences)


def cost_findings(scores: pd.DataFrame) -> list[Finding]:
    """Per checkpoint: which schemes lose nothing measurable, the smallest and the largest loss, and guessing."""
    compared = scores[scores["margin_change"].notna() | scores["nats_change"].notna()]
    found: list[Finding] = []
    for checkpoint, rows in compared.groupby("checkpoint", sort=False):
        lost = (rows["margin_change_high"] < 0) | (rows["nats_change_low"] > 0)
        texts = [_without_loss(rows[~lost]), *_losses(rows[lost]), _fewest_bits(rows[~lost]), _guessing(rows)]
        refs = tuple(dict.fromkeys([*rows["baseline_ref"], *rows["ref"]]))
        found.append(Finding(visible(checkpoint), " ".join(filter(None, texts)), refs))
    return found


def outlier_findings(outliers: pd.DataFrame, largest: pd.DataFrame) -> list[Finding]:
    """Per checkpoint: the largest attention logit and hidden state, and where they are."""
    found: list[Finding] = []
    for checkpoint, rows in outliers.groupby("checkpoint", sort=False):
        tops = largest[largest["checkpoint"] == checkpoint]
        texts = []
        for row in rows.to_dict("records"):
            own = tops[tops["tensor"] == row["tensor"]].sort_values("rank")
            place = f": {_place(own.iloc[0])}" if len(own) else ""
            ratio = row["top1_over_median"]
            times = f", {ratio:,.0f} times the median" if math.isfinite(ratio) else ""
            name = TENSORS[row["tensor"]].removesuffix("s")
            texts.append(f"Largest {name}: {row['top1']:,.1f}{times}{place}.")
            if row["tensor"] == "hidden_states":
                texts.append(_concentration(own))
        found.append(
            Finding(visible(checkpoint), " ".join(filter(None, texts)), tuple(dict.fromkeys(rows["ref"])))
        )
    return [*found, *_compared(outliers)]


def accuracy_finding(scores: pd.DataFrame) -> Finding | None:
    """What accuracy can resolve with this many documents."""
    rows = scores[scores["mcnemar_p"].notna()]
    if rows.empty:
        return None
    n, detectable = _span(rows["n"], "{:,.0f}"), rows["smallest_detectable"].dropna() * 100
    told = rows[rows["holm_p"] < 0.05]
    lines = [
        f"Accuracy of {n} documents tells {_count(len(told), 'scheme')} of {len(rows)} from the baseline "
        f"(exact McNemar test, Holm-adjusted p below 0.05){_listed(told['scheme'])}."
    ]
    if len(detectable):
        lines.append(
            f"The smallest true difference that it would find with 80% power is {_span(detectable, '{:.1f}')} points, "
            "by scheme. Differences below that are not resolved here: the paired margin and nats per token are the "
            "numbers to read."
        )
    return Finding("What accuracy can tell", " ".join(lines), tuple(rows["ref"]))


def _without_loss(rows: pd.DataFrame) -> str:
    if rows.empty:
        return "Every scheme loses measurably."
    hidden = []
    if rows["nats_change_high"].notna().any():
        hidden.append(f"{max(rows['nats_change_high'].max(), 0):.2g} nats per token")
    if rows["margin_change_low"].notna().any():
        hidden.append(f"{max(-rows['margin_change_low'].min(), 0):.2g} nats of margin per document")
    could = f" A loss of up to {' or '.join(hidden)} could still hide in their intervals." if hidden else ""
    return f"No measurable loss: {_names(rows['scheme'])}.{could}"


def _losses(rows: pd.DataFrame) -> Iterator[str]:
    if rows.empty:
        return
    by = "nats_change" if rows["nats_change"].notna().all() else "margin_change"
    ordered = rows.sort_values(by, ascending=by == "nats_change", kind="stable")
    first, last = ordered.iloc[0], ordered.iloc[-1]
    if len(ordered) == 1:
        yield f"The one measurable loss: {_loss(first)}."
        return
    yield f"Smallest measurable loss: {_loss(first)}."
    yield f"Largest: {_loss(last)}."


def _loss(row: "pd.Series[Any]") -> str:
    parts = []
    for name, unit in (("nats_change", "nats per token"), ("margin_change", "nats of margin per document")):
        value, low, high = (float(row[f"{name}{end}"]) for end in ("", "_low", "_high"))
        if math.isfinite(value):
            parts.append(f"{signed(value, low, high)} {unit}")
            if name == "nats_change" and value < 700:
                parts[-1] += f", perplexity × {math.exp(value):.4g}"
    return f"{visible(row['scheme'])} ({'; '.join(parts)})"


def _fewest_bits(rows: pd.DataFrame) -> str:
    fewest = rows[rows["no_evidence"] == ""].groupby("series", sort=False)["bits"].min()
    listed = "; ".join(f"{visible(series)}: {bits:g}" for series, bits in fewest.items())
    return f"Fewest bits without measurable loss, by what is quantized: {listed}." if listed else ""


def _guessing(rows: pd.DataFrame) -> str:
    guessed = rows[(rows["acc_norm_low"] <= CHANCE) & (rows["acc_norm_high"] >= CHANCE)]
    if guessed.empty:
        return ""
    return f"Accuracy cannot be told from guessing (25%) under {_names(guessed['scheme'])}."


def _place(row: "pd.Series[Any]") -> str:
    """Layer, head or channel, and the tokens there, of one of the largest values."""
    parts = [f"layer {row['layer']:.0f}"]
    for name in ("head", "map", "channel"):
        if pd.notna(row[name]) and not (name == "map" and row[name] == 0):
            parts.append(f"{name} {row[name]:.0f}")
    for name, at in (("query", "query"), ("key", "key_position"), ("", "position")):
        token = row[f"{name}_token" if name else "token"]
        if pd.notna(row[at]):
            quoted = f" “{visible(token, 40)}”" if isinstance(token, str) else ""
            parts.append(f"{name or 'token'}{quoted} at position {row[at]:.0f}")
    return ", ".join(parts)


def _concentration(rows: pd.DataFrame) -> str:
    """In how many channels and positions the kept values lie."""
    if len(rows) < 2 or rows["channel"].isna().any():
        return ""
    channels = sorted(set(rows["channel"]))
    share = float((rows["position"] == 0).mean())
    named = f" ({', '.join(f'{channel:.0f}' for channel in channels)})" if len(channels) <= 5 else ""
    return (
        f"The {len(rows)} largest lie in {_count(len(channels), 'channel')}{named}, "
        f"{share:.0%} of them at a sequence's first token."
    )


def _compared(outliers: pd.DataFrame) -> Iterator[Finding]:
    """Spread of top-1 / median between checkpoints."""
    known = outliers[outliers["top1_over_median"].notna()].sort_values("top1_over_median", kind="stable")
    for tensor, rows in known.groupby("tensor", sort=False):
        if rows["checkpoint"].nunique() < 2:
            continue
        low, high = rows.iloc[0], rows.iloc[-1]
        yield Finding(
            f"Between checkpoints: {TENSORS[str(tensor)]}",
            f"The largest value over the median is smallest in {visible(low['checkpoint'])} "
            f"({low['top1_over_median']:,.1f}) and largest in {visible(high['checkpoint'])} "
            f"({high['top1_over_median']:,.1f}). Checkpoints that differ in more than one thing show no cause.",
            (str(low["ref"]), str(high["ref"])),
        )


def _amount(numbers: Iterable[int | None], what: str) -> str:
    found = pd.Series([number for number in numbers if number], dtype=float)
    return f"{_span(found, '{:,.0f}')} {what}" if len(found) else ""


def _names(schemes: Iterable[object]) -> str:
    return ", ".join(visible(scheme) for scheme in schemes)


def _listed(schemes: Iterable[object]) -> str:
    names = _names(schemes)
    return f": {names}" if names else ""


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _span(values: "pd.Series[float]", form: str) -> str:
    low, high = form.format(values.min()), form.format(values.max())
    return low if low == high else f"{low} to {high}"
