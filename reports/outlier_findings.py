"""What the profiles say, in sentences: the largest values, where they are, and the measures by their papers."""

import math
from collections.abc import Iterator
from typing import Any

import pandas as pd

from reports.entries import magnitude
from reports.findings import Finding, count
from reports.names import token, visible
from reports.outliers import TENSORS


def outlier_findings(outliers: pd.DataFrame, largest: pd.DataFrame, measures: pd.DataFrame) -> list[Finding]:
    """Per checkpoint: the largest attention logit and hidden state, where they are, and what the measures say."""
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
            texts.append(f"Largest {name}: {magnitude(row['top1']).text}{times}{place}.")
            if row["tensor"] == "hidden_states":
                texts.append(_concentration(own))
        texts.append(_measured(measures[measures["checkpoint"] == checkpoint]))
        subject, refs = f"{visible(checkpoint)}: outliers", tuple(dict.fromkeys(rows["ref"]))
        found.append(Finding(subject, tuple(filter(None, texts)), refs))
    return [*found, *_compared(outliers)]


def _place(row: "pd.Series[Any]") -> str:
    """Layer, head or channel, and the tokens there, of one of the largest values."""
    parts = [f"layer {row['layer']:.0f}"]
    for name in ("head", "map", "channel"):
        if pd.notna(row[name]) and not (name == "map" and row[name] == 0):
            parts.append(f"{name} {row[name]:.0f}")
    for name, at in (("query", "query"), ("key", "key_position"), ("", "position")):
        text = row[f"{name}_token" if name else "token"]
        if pd.notna(row[at]):
            quoted = f" “{token(text)}”" if isinstance(text, str) else ""
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
        f"The {len(rows)} largest lie in {count(len(channels), 'channel')}{named}, "
        f"{share:.0%} of them at a sequence's first token."
    )


def _measured(measures: pd.DataFrame) -> str:
    """The measures that a reader asks for first, by their papers' definitions."""
    value = dict(zip(measures["measure"], measures["value"], strict=True))
    parts = []
    if (num := value.get("massive_activations / num_activations")) is not None:
        where = f" in {count(int(value['massive_activations / num_layers']), 'layer')}" if num else ""
        parts.append(f"{count(int(num), 'massive activation')}{where} (Sun et al. 2024)")
    if (num := value.get("llm_int8_outlier_features / num_features")) is not None:
        parts.append(f"{count(int(num), 'outlier feature')} by LLM.int8() (Dettmers et al. 2022)")
    if (rate := value.get("attention_sink_rate / all_maps")) is not None:
        parts.append(f"attention sink rate {rate:.0f}% (Gu et al. 2025)")
    return f"{'; '.join(parts)}." if parts else ""


def _compared(outliers: pd.DataFrame) -> Iterator[Finding]:
    """Where top-1 over median is smallest and largest among several checkpoints."""
    known = outliers[outliers["top1_over_median"].notna()].sort_values("top1_over_median", kind="stable")
    points, refs = [], []
    for tensor, rows in known.groupby("tensor", sort=False):
        if rows["checkpoint"].nunique() > 1:
            ends = [rows.iloc[0], rows.iloc[-1]]
            low, high = (f"{visible(row['checkpoint'])} ({row['top1_over_median']:,.1f})" for row in ends)
            points.append(f"{TENSORS[str(tensor)].capitalize()}: smallest in {low}, largest in {high}.")
            refs += [str(row["ref"]) for row in ends]
    if points:
        points.append("Checkpoints that differ in more than one thing show no cause.")
        yield Finding(
            "Largest value over the median, between checkpoints", tuple(points), tuple(dict.fromkeys(refs))
        )
