"""Tables of the frame that `reports.scores.scores` makes: the headline, and accuracy with its tests."""

import math
from collections.abc import Iterator
from typing import Any

import pandas as pd

from reports.entries import Entry, change, number, probability, text, with_interval
from reports.load import BASELINE
from reports.scores import ENDS
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
            "Size (MB)",
            "Δ margin (nats/document)",
            "Δ nats per token",
            "Perplexity [95%]",
            "acc_norm % [95%]",
            "Documents",
            "Documents of text",
        ),
        grouped(pairs),
        "± is half a 95% interval, paired over the same documents. Margin: log-likelihood of the "
        "gold ending minus that of the best wrong one; less is worse. More nats per token is worse. "
        "Coloured changes have an interval that leaves zero out; each is of one comparison, not adjusted for their "
        "number. Stored bits: average per decoder weight, scales included. Size: of the whole model, with unquantized "
        "tensors at 16 bits. Documents, of HellaSwag and of the text: n of the intervals.",
    )


def accuracy(scores: pd.DataFrame) -> Table:
    """Per scheme: acc, acc_norm, margin; the paired change, flipped documents, exact McNemar p and what n resolves."""
    pairs = [(row["checkpoint"], _accuracy_row(row)) for row in _rows(scores) if pd.notna(row["acc_norm"])]
    return Table(
        "accuracy",
        "HellaSwag accuracy, and what it can resolve",
        (
            "Scheme",
            "acc % (s.e.)",
            "acc_norm % (s.e.) [95%]",
            "Margin (s.e.)",
            "Δ acc_norm (points) [95%]",
            "Right → wrong",
            "Wrong → right",
            "McNemar p",
            "Holm p",
            "Smallest detectable (points)",
        ),
        grouped(pairs),
        "s.e.: standard error. Margin: mean, in nats per document. "
        "acc_norm divides log-likelihoods by the characters of the ending. Intervals: Wilson's; of changes, "
        "Bonett and Price's. p: exact McNemar test of acc_norm; Holm: adjusted for the checkpoint's schemes. Smallest "
        "detectable: the true difference that this test finds with 80% power, at 5% divided by the number of schemes "
        f"(Holm's first step), if as many documents flip as did here; “{UNRESOLVED}”: none, even if all of them flip "
        "one way.",
    )


def perplexity(scores: pd.DataFrame) -> Table:
    """Per scheme: nats per token and perplexity with standard errors and intervals, and the text they are of."""
    pairs = [(row["checkpoint"], _text_row(row)) for row in _rows(scores) if pd.notna(row["nats_per_token"])]
    return Table(
        "perplexity",
        "Text: nats per token and perplexity",
        (
            "Scheme",
            "Nats per token (s.e.) [95%]",
            "Perplexity (s.e.) [95%]",
            "Δ nats per token [95%]",
            "Documents",
            "Blocks",
            "Tokens",
            "Text read as",
        ),
        grouped(pairs),
        "s.e.: standard error. A document of the text is the unit that errors and intervals count, for its blocks are "
        "alike; those of the change are paired. Below 12 effective documents the interval comes of runs of blocks and "
        "speaks of these documents. Perplexities compare only where the text is read alike.",
    )


def _text_row(row: dict[str, Any]) -> tuple[Entry, ...]:
    source = row["ref"]
    return (
        scheme_entry(row),
        _scored(row, "nats_per_token", source, digits=4, shows=("stderr", "interval")),
        _scored(row, "perplexity", source, shows=("stderr", "interval")),
        _scored(row, "nats_change", paired_source(row), digits=4),
        number(row["num_documents"], 0, source),
        number(row["num_blocks"], 0, source),
        number(row["num_tokens"], 0, source),
        text(row["text_read_as"]),
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
        return (text(row["scheme"]), Entry("no record", number=True, tone="worse"), *[Entry(number=True)] * 7)
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
        number(row["num_documents"], 0, source),
    )


def _accuracy_row(row: dict[str, Any]) -> tuple[Entry, ...]:
    source, pair = row["ref"], paired_source(row)
    return (
        scheme_entry(row),
        _scored(row, "acc", source, factor=100, digits=1, shows=("stderr",)),
        _scored(row, "acc_norm", source, factor=100, digits=1, shows=("stderr", "interval")),
        _scored(row, "margin", source, digits=3, shows=("stderr",)),
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


def _scored(
    row: dict[str, Any],
    name: str,
    source: str,
    factor: float = 1,
    digits: int = 2,
    shows: tuple[str, ...] = ("interval",),
) -> Entry:
    """A score with its standard error, its interval, or both."""
    value, low, high = (factor * row[f"{name}{end}"] for end in ENDS)
    stderr = factor * row[f"{name}_stderr"] if "stderr" in shows else math.nan
    if "interval" not in shows:
        low = high = math.nan
    return with_interval(value, low, high, digits, source, stderr=stderr)
