"""Tables of the frame that `reports.scores.scores` makes: the headline, and accuracy with its tests."""

import math
from collections.abc import Iterator
from typing import Any

import pandas as pd

from reports.entries import Entry, change, number, probability, text, with_interval
from reports.load import BASELINE
from reports.tables import Table, grouped

UNRESOLVED = "not at this n"
"""Where no true difference can be found with the documents that flip."""


def headline(scores: pd.DataFrame) -> Table:
    """Per scheme: bits, size, paired changes with 95% intervals, perplexity and accuracy with theirs."""
    pairs = [(row["checkpoint"], _headline_row(row)) for row in _rows(scores)]
    return Table(
        "headline",
        "Every scheme against its checkpoint's own baseline",
        (
            "Scheme",
            "Stored bits",
            "Weights (MB)",
            "Δ margin (nats/document)",
            "Δ nats per token",
            "Perplexity [95%]",
            "acc_norm % [95%]",
            "n",
        ),
        grouped(pairs),
        "± is half a 95% interval, paired over the same documents and blocks of text. Margin: log-likelihood of the "
        "gold ending minus that of the best wrong one; less is worse. More nats per token is worse. "
        "Coloured changes have an interval that leaves zero out. Stored bits: average per decoder weight, "
        "scales included. MB: the whole model on disk. n: documents.",
    )


def accuracy(scores: pd.DataFrame) -> Table:
    """Per scheme: acc, acc_norm, its paired change, the documents that flipped, exact McNemar p and what n resolves."""
    pairs = [(row["checkpoint"], _accuracy_row(row)) for row in _rows(scores) if pd.notna(row["acc_norm"])]
    return Table(
        "accuracy",
        "HellaSwag accuracy, and what it can resolve",
        (
            "Scheme",
            "acc %",
            "acc_norm % [95%]",
            "Δ acc_norm (points) [95%]",
            "Right → wrong",
            "Wrong → right",
            "McNemar p",
            "Holm p",
            "Smallest detectable (points)",
        ),
        grouped(pairs),
        "acc_norm divides log-likelihoods by the characters of the ending. Intervals: Wilson's; of changes, "
        "Bonett and Price's. p: exact McNemar test of acc_norm; Holm: adjusted for the checkpoint's schemes. Smallest "
        "detectable: the true difference that this test finds with 80% power, at 5% divided by the number of schemes "
        f"(Holm's first step), if as many documents flip as did here; “{UNRESOLVED}”: none, even if all of them flip "
        "one way.",
    )


def _rows(scores: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for row in scores.to_dict("records"):
        yield {str(name): value for name, value in row.items()}


def scheme_entry(row: dict[str, Any]) -> Entry:
    """The scheme's name, linked to its record; the baseline says what it is."""
    label = row["scheme"]
    if label == BASELINE and row["baseline_precision"]:
        label = f"{label} ({row['baseline_precision']})"
    return text(label + (" †" if row["no_evidence"] else ""), source=row["ref"], link=row["ref"])


def paired_source(row: dict[str, Any]) -> str:
    """The two records of a paired change."""
    return f"{row['ref']} − {row['baseline_ref']}"


def _headline_row(row: dict[str, Any]) -> tuple[Entry, ...]:
    if row["status"] == "missing":
        return (text(row["scheme"]), Entry("no record", number=True, tone="worse"), *[Entry(number=True)] * 6)
    source, pair = row["ref"], paired_source(row)
    if row["scheme"] == BASELINE:
        changes = [Entry("baseline", number=True, tone="quiet")] * 2
    else:
        changes = [
            _change(row, "margin_change", pair, more_is="better"),
            _change(row, "nats_change", pair, more_is="worse"),
        ]
    return (
        scheme_entry(row),
        number(row["average_storage_bits"], 2, source),
        number(row["weights_bytes"] / 1e6, 1, source),
        *changes,
        _scored(row, "perplexity", source),
        _scored(row, "acc_norm", source, factor=100, digits=1),
        number(row["n"], 0, source),
    )


def _accuracy_row(row: dict[str, Any]) -> tuple[Entry, ...]:
    source, pair = row["ref"], paired_source(row)
    return (
        scheme_entry(row),
        number(100 * row["acc"], 1, source),
        _scored(row, "acc_norm", source, factor=100, digits=1),
        _scored(row, "acc_norm_change", pair, factor=100, digits=1),
        number(row["lost"], 0, pair),
        number(row["won"], 0, pair),
        probability(row["mcnemar_p"], pair),
        probability(row["holm_p"], pair),
        _detectable(row["smallest_detectable"], pair),
    )


def _detectable(share: float, source: str) -> Entry:
    return (
        Entry(UNRESOLVED, number=True, source=source) if share == math.inf else number(100 * share, 1, source)
    )


def _change(row: dict[str, Any], name: str, source: str, *, more_is: str) -> Entry:
    return change(row[name], row[f"{name}_low"], row[f"{name}_high"], source, more_is=more_is)


def _scored(row: dict[str, Any], name: str, source: str, factor: float = 1, digits: int = 2) -> Entry:
    value, low, high = (factor * row[f"{name}{end}"] for end in ("", "_low", "_high"))
    return with_interval(value, low, high, digits, source)
