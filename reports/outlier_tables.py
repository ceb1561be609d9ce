"""Tables of the frames that `reports.outliers` makes: Table 5 beside the paper's, layers, largest values, measures."""

from typing import Any

import pandas as pd

from reports.entries import Entry, magnitude, number, text
from reports.names import token
from reports.outliers import STATISTICS, TENSORS, paper_table5
from reports.tables import Table, grouped

CITATION = "Differential Transformer, arXiv 2410.05258, Table 5"
_HEADS = ("Top 1", "Top 2", "Top 3", "Top 10", "Top 100", "Median")


def table5(outliers: pd.DataFrame) -> Table:
    """k-th largest magnitudes and the median by tensor: this run's checkpoints, then the published numbers, marked."""
    pairs = []
    for tensor, name in TENSORS.items():
        ours, paper = outliers[outliers["tensor"] == tensor], paper_table5()
        pairs += [(name, _statistics_row(row)) for row in ours.to_dict("records")]
        paper_rows = paper[paper["tensor"] == tensor].to_dict("records") if len(ours) else []
        pairs += [(name, _statistics_row(row, quiet=True)) for row in paper_rows]
    return Table(
        "table5",
        "Largest magnitudes, as in the paper's Table 5",
        ("Checkpoint", *_HEADS, "Top 1 / median", "Values"),
        grouped([(name.capitalize(), row) for name, row in pairs]),
        f"Rows marked “paper” are not of this run: {CITATION} (3B models, 0.4M tokens; its text is not known). "
        "Attention logits: scaled, before the softmax, masked positions left out. Hidden states: output of each layer. "
        "All layers, heads, tokens and channels pooled. The largest of more values is larger: compare checkpoints of "
        "one run rather than with the paper.",
    )


def _statistics_row(row: dict[Any, Any], *, quiet: bool = False) -> tuple[Entry, ...]:
    if quiet:
        name = Entry(f"paper: {row['checkpoint']}", tone="quiet")
        source = CITATION
    else:
        source = str(row["ref"])
        name = text(row["checkpoint"], source=source, link=source)
    write = number if quiet else magnitude  # the paper's numbers with the paper's one decimal
    values = [write(row[statistic], source=source) for statistic in STATISTICS]
    ratio, n = row["top1_over_median"], row.get("n")
    return (name, *values, number(ratio, 1, source), number(n, 0, source))


def per_layer(layers: pd.DataFrame) -> Table:
    """Table-5 statistics of every layer (and softmax map, where an architecture has two)."""
    maps = bool((layers["map"] >= 0).any())
    pairs = []
    for row in layers.to_dict("records"):
        source = row["ref"]
        which = (
            [number(row["map"], 0, source) if row["map"] >= 0 else Entry("all", number=True)] if maps else []
        )
        values = [magnitude(row[statistic], source) for statistic in STATISTICS]
        entries = (number(row["layer"], 0, source), *which, *values, number(row["n"], 0, source))
        pairs.append((f"{row['checkpoint']}: {TENSORS[row['tensor']]}", entries))
    columns = ("Layer", *(["Map"] if maps else []), *_HEADS, "Values")
    return Table("layers", "Magnitudes by layer", columns, grouped(pairs))


def largest_logits(largest: pd.DataFrame, num: int = 10) -> Table:
    """The largest attention logits of each checkpoint, with the query and key that met."""
    rows = largest[(largest["tensor"] == "attention_logits") & (largest["rank"] <= num)]
    maps = bool((rows["map"] > 0).any())
    pairs = []
    for row in rows.to_dict("records"):
        source = row["ref"]
        place = [number(row[name], 0, source) for name in ("layer", "head", *(["map"] if maps else []))]
        tokens = [entry for side, at in (("query_token", "query"), ("key_token", "key_position"))
                  for entry in (_token(row[side], source), number(row[at], 0, source))]  # fmt: skip
        sequence = number(row["sequence"], 0, source)
        pairs.append((row["checkpoint"], (magnitude(row["value"], source), *place, *tokens, sequence)))
    columns = (
        "Magnitude",
        "Layer",
        "Head",
        *(["Map"] if maps else []),
        "Query token",
        "at",
        "Key token",
        "at",
    )
    return Table("largest-logits", "Largest attention logits", (*columns, "Sequence"), grouped(pairs))


def largest_states(largest: pd.DataFrame, num: int = 10) -> Table:
    """The largest hidden states of each checkpoint, with channel and token."""
    rows = largest[(largest["tensor"] == "hidden_states") & (largest["rank"] <= num)]
    pairs = []
    for row in rows.to_dict("records"):
        source = row["ref"]
        numbers = [number(row[name], 0, source) for name in ("layer", "channel")]
        place = [number(row[name], 0, source) for name in ("position", "sequence")]
        entries = (magnitude(row["value"], source), *numbers, _token(row["token"], source), *place)
        pairs.append((row["checkpoint"], entries))
    columns = ("Magnitude", "Layer", "Channel", "Token", "Position", "Sequence")
    return Table("largest-states", "Largest hidden states", columns, grouped(pairs))


def measure_table(measures: pd.DataFrame) -> Table:
    """Every scalar outlier measure of the profiles, one column per checkpoint."""
    checkpoints = list(dict.fromkeys(measures["checkpoint"]))
    rows = []
    for name, group in measures.groupby("measure", sort=False):
        found = {row["checkpoint"]: row for row in group.to_dict("records")}
        entries = [
            _measure(found[c]["value"], found[c]["ref"]) if c in found else Entry() for c in checkpoints
        ]
        rows.append((text(str(name).replace("_", " ")), *entries))
    return Table("measures", "Other outlier measures", ("Measure", *checkpoints), tuple(rows))


def _measure(value: object, source: str) -> Entry:
    if isinstance(value, float):
        return Entry(f"{value:,.4g}".replace("-", "−"), number=True, source=source)
    return text(value, source=source)


def _token(value: object, source: str) -> Entry:
    return text(token(value), source=source) if isinstance(value, str) else Entry()
