"""Tables of matched checkpoints, side by side: outliers, lambda, scores against bits, effects, the paper's Figure 8."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from reports.effects import MEASURES
from reports.entries import Entry, change, magnitude, number, probability, text, with_interval
from reports.load import BASELINE
from reports.names import visible
from reports.outliers import TENSORS, paper_figure8, paper_table5
from reports.planned import Pairing
from reports.scheme_names import read_scheme
from reports.scores import ENDS
from reports.tables import Table, grouped

FIGURE8 = "Differential Transformer, arXiv 2410.05258, Figure 8"
BITS_SCORES = {
    "nats_per_token": ("nats per token of text", 1, 4),
    "margin": ("HellaSwag margin, nats per document", 1, 3),
    "margin_norm": ("HellaSwag margin, nats per 100 characters", 100, 3),
    "acc_norm": ("HellaSwag acc_norm (%)", 100, 1),
}
"""Score -> its name, the factor it is shown with, and decimals."""
_STATISTICS = {
    "top1": "Top 1", "top10": "Top 10", "top100": "Top 100", "median": "Median", "top1_over_median": "Top 1 / median",
}  # fmt: skip
_EFFECT_HEADS = {
    "nats": "Δ loss on text (nats per token)",
    "margin": "Δ loss of margin (nats per document)",
    "margin_norm": "Δ loss of margin (nats per 100 characters)",
    "acc_norm": "Δ loss of acc_norm (points)",
}
_SINKS = {"all_maps": "all maps", "map_0": "map 0", "map_1": "map 1", "difference": "the difference"}


def side_by_side(outliers: pd.DataFrame, measures: pd.DataFrame, pairing: Pairing) -> Table:
    """Magnitudes of each tensor and sink rates, a column per checkpoint, and baseline / variant beside each variant."""
    pairs = [
        (TENSORS[tensor].capitalize(), _statistic_row(outliers[outliers["tensor"] == tensor], name, pairing))
        for tensor in TENSORS
        if (outliers["tensor"] == tensor).any()
        for name in (*_STATISTICS, "n")
    ]
    sinks = measures[measures["measure"].str.startswith("attention_sink_rate / ")]
    for kind, label in _SINKS.items():
        rows = sinks[sinks["measure"] == f"attention_sink_rate / {kind}"]
        if not rows.empty:
            pairs.append(("Attention sink rate (%)", _sink_row(rows, label, pairing)))
    columns = ["Magnitude", visible(pairing.baseline)]
    for variant in pairing.variants:
        columns += [visible(variant), "Ratio"]
    return Table(
        "pair-outliers",
        "Outliers side by side",
        (*columns, "Paper: Transformer / DIFF"),
        grouped(pairs),
        "Ratio: the baseline's number over the variant's; above 1, the variant's is smaller. All layers, heads, "
        "maps, tokens and channels pooled; the largest of more values is larger. Each is one number of one trained "
        "model, without an interval. Last column: 3B models of arXiv 2410.05258, Table 5. Sink rate (Gu et al. 2025): "
        "share of heads whose first key draws more than 0.3 of the attention; of the difference, of its share of "
        "magnitudes.",
    )


def _statistic_row(rows: pd.DataFrame, name: str, pairing: Pairing) -> tuple[Entry, ...]:
    found = {row["checkpoint"]: row for row in rows.to_dict("records")}
    if name == "n":
        return _counts_row(found, pairing)
    base = found.get(pairing.baseline)
    entries = [_magnitude(base, name)]
    for variant in pairing.variants:
        own = found.get(variant)
        entries += [_magnitude(own, name), _ratio(base, own, name)]
    return (Entry(_STATISTICS[name]), *entries, _paper_ratio(rows["tensor"].iloc[0], name))


def _magnitude(row: dict[Any, Any] | None, name: str) -> Entry:
    return Entry(number=True) if row is None else magnitude(row[name], row["ref"])


def _ratio(base: dict[Any, Any] | None, own: dict[Any, Any] | None, name: str) -> Entry:
    if base is None or own is None or not own[name] > 0:
        return Entry(number=True)
    return number(base[name] / own[name], 2, f"{base['ref']} / {own['ref']}", unit="×")


def _paper_ratio(tensor: str, name: str) -> Entry:
    rows = paper_table5().query("tensor == @tensor")
    return Entry(f"{rows[name].iloc[0] / rows[name].iloc[1]:.2f}×", number=True, tone="quiet")


def _counts_row(found: dict[str, dict[Any, Any]], pairing: Pairing) -> tuple[Entry, ...]:
    counts = [number(found[name]["n"], 0, found[name]["ref"]) if name in found else Entry(number=True)
              for name in pairing.labels]  # fmt: skip
    return (Entry("Values"), *_spaced(counts))


def _spaced(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """Entries of the checkpoints, with nothing where the ratios and the paper's stand."""
    nothing = Entry("", number=True)
    return (entries[0], *(entry for own in entries[1:] for entry in (own, nothing)), nothing)


def _sink_row(rows: pd.DataFrame, label: str, pairing: Pairing) -> tuple[Entry, ...]:
    found = {row["checkpoint"]: row for row in rows.to_dict("records")}
    entries = [
        number(float(found[name]["value"]), 1, found[name]["ref"]) if name in found else Entry(number=True)
        for name in pairing.labels
    ]
    return (Entry(label), *_spaced(entries))


def lambda_table(lambdas: pd.DataFrame, pairing: Pairing) -> Table:
    """Lambda of each layer of the variants: its mean, and its range where it varies over heads and tokens."""
    names = [name for name in pairing.labels if (lambdas["checkpoint"] == name).any()]
    rows = []
    for layer in sorted(set(lambdas["layer"])):
        entries = [number(layer, 0)]
        for name in names:
            own = lambdas[(lambdas["checkpoint"] == name) & (lambdas["layer"] == layer)].to_dict("records")
            entries.append(_lambda(own[0]) if own else Entry(number=True))
        rows.append(tuple(entries))
    return Table(
        "pair-lambda",
        "Lambda by layer",
        ("Layer", *map(visible, names)),
        tuple(rows),
        "How much of the second map each layer subtracts: the mean, and in brackets the smallest and the largest where "
        "it is of each token and head.",
    )


def _lambda(row: dict[Any, Any]) -> Entry:
    if row["min"] == row["max"]:
        return number(row["mean"], 3, row["ref"])
    return with_interval(row["mean"], row["min"], row["max"], 3, row["ref"])


def bits_table(scores: pd.DataFrame, pairing: Pairing, kinds: Sequence[str]) -> Table:
    """Scores with 95% intervals, a column per checkpoint, a group per kind of quantized tensor and score."""
    rows = scores.drop_duplicates(["label", "scheme"])
    baselines = rows[rows["scheme"] == BASELINE]
    pairs = []
    for series in series_of(rows, kinds):
        own = pd.concat([baselines, rows[rows["series"] == series]])
        for column, (what, factor, digits) in BITS_SCORES.items():
            if own[column].notna().any():
                group = f"{series[:1].upper()}{series[1:]}: {what}"
                pairs += [(group, row) for row in _bits_rows(own, column, factor, digits, pairing)]
    return Table(
        "pair-bits",
        "Scores against bits",
        ("Scheme", "Bits", *map(visible, pairing.labels)),
        grouped(pairs),
        "[ ]: 95% intervals, each of one number by itself; how much one checkpoint lost more than another is told far "
        "better by the paired effects below. Margin: gold ending minus the best wrong one; by 100 characters it is of "
        "the log-likelihoods that acc_norm compares. Guessing gives 25% and a negative margin.",
    )


def series_of(scores: pd.DataFrame, kinds: Sequence[str]) -> list[str]:
    """The series of schemes of these kinds, in the order of kinds."""
    found = {row["series"]: read_scheme(row["scheme"]).kinds for row in scores.to_dict("records")}
    return sorted((series for series in found if found[series] in kinds), key=lambda s: kinds.index(found[s]))


def _bits_rows(
    rows: pd.DataFrame, column: str, factor: float, digits: int, pairing: Pairing
) -> list[tuple[Entry, ...]]:
    found = []
    for scheme, group in rows.groupby("scheme", sort=False):
        own = {row["label"]: row for row in group.to_dict("records")}
        entries = [_score(own.get(name), column, factor, digits) for name in pairing.labels]
        found.append((text(scheme), number(group["bits"].iloc[0], 0), *entries))
    return found


def _score(row: dict[Any, Any] | None, column: str, factor: float, digits: int) -> Entry:
    if row is None:
        return Entry(number=True)
    value, low, high = (factor * row[f"{column}{end}"] for end in ENDS)
    return with_interval(value, low, high, digits, row["ref"])


def effects_table(effects: pd.DataFrame) -> Table:
    """How much more each scheme costs a variant than the baseline, by measure, with Holm's p beside each."""
    pairs = [
        (f"{row['variant']} against {row['baseline']}", _effect_row(row))
        for row in effects.to_dict("records")
    ]
    columns = ["Scheme"]
    for name in MEASURES:
        columns += [_EFFECT_HEADS[name], "Holm p"]
    return Table(
        "pair-effects",
        "Effects: what each scheme costs the variant more than the baseline",
        (*columns, "Documents of text", "HellaSwag documents"),
        grouped(pairs, always=True),
        "The variant's loss from its own 16 bits minus the baseline's from its own, paired over the same blocks of "
        "text, with their documents as units, and over the same documents of HellaSwag. Below zero (green), the "
        "variant loses less. ± is half a 95% interval, of one comparison by itself; Holm p is adjusted for the "
        "variant's schemes. Coloured effects have an interval that leaves zero out. They speak of these trained "
        "models on other items, not of models trained again.",
    )


def _effect_row(row: dict[Any, Any]) -> tuple[Entry, ...]:
    entries: list[Entry] = []
    for name, measure in MEASURES.items():
        value, low, high = (measure.factor * row[f"{name}{end}"] for end in ENDS)
        entries += [change(value, low, high, row["source"], more_is="worse")]
        entries += [probability(row[f"{name}_holm"], row["source"])]
    if row["note"]:
        entries[0 if pd.isna(row["nats"]) else 2] = Entry(row["note"], tone="quiet")
    if row["nats_note"]:
        entries[0] = Entry(row["nats_note"], tone="quiet")
    counts = (number(row["num_documents"], 0, row["source"]), number(row["n"], 0, row["source"]))
    return (text(row["scheme"]), *entries, *counts)


def figure8_table(scores: pd.DataFrame, pairing: Pairing) -> Table:
    """acc_norm against bits of attention logits, by checkpoint and granularity, then the paper's numbers, marked."""
    bits = sorted({16.0, 8.0, 6.0, 4.0, *scores["bits"]}, reverse=True)
    pairs = []
    for series in dict.fromkeys(scores.loc[scores["scheme"] != BASELINE, "series"]):
        for name in pairing.labels:
            own = scores[
                (scores["label"] == name) & ((scores["series"] == series) | (scores["scheme"] == BASELINE))
            ]
            at = {row["bits"]: row for row in own.to_dict("records")}
            entries = [_score(at.get(width), "acc_norm", 100, 1) for width in bits]
            pairs.append((series, (text(name), *entries)))
    for row in paper_figure8().to_dict("records"):
        entries = [number(row[width], 1, FIGURE8) if width in row else Entry(number=True) for width in bits]
        pairs.append(
            ("Granularity not stated", (Entry(f"paper: {row['checkpoint']}", tone="quiet"), *entries))
        )
    return Table(
        "figure8",
        "HellaSwag accuracy (%) against bits of attention logits, as in the paper's Figure 8",
        ("Checkpoint", *(f"{width:g} bits" for width in bits)),
        grouped(pairs, always=True),
        f"Rows marked “paper” are not of this run: {FIGURE8}, zero-shot, read off the drawing (good to about 0.1). The "
        "paper does not say over what a scale is shared. Its models are 3B on 350B tokens: compare the fall along a "
        "row, not its height.",
    )
