"""What the page says first of a run that declares matched checkpoints: sentences, tables and figures of the pair."""

from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from reports import pair_tables
from reports.effects import compared, effects
from reports.figures.effects import effects_figure
from reports.figures.figure8 import figure8
from reports.figures.pair_bits import pair_bits
from reports.findings import Finding
from reports.load import BASELINE, Run
from reports.outliers import lambdas
from reports.pair_findings import effect_findings, outlier_pair_finding, pair_lead, pair_notes
from reports.scheme_names import read_scheme
from reports.tables import Table

KINDS = ("attention logits", "weights + activations")
"""Kinds of quantized tensor whose scores are shown against bits."""
CAPTIONS = {
    "effects": (
        "What each scheme costs a variant more than its matched baseline: the variant's loss from its own 16 bits "
        "minus the baseline's from its own, paired, with 95% intervals. Filled: the interval leaves zero "
        "out. Hollow: no effect can be told."
    ),
    "pair_bits": (
        "Scores of the matched checkpoints against bits, with 95% intervals of each number by itself, a row for each "
        "kind of tensor. Where accuracy is shown, dotted: guessing among four endings."
    ),
    "figure8": (
        "HellaSwag accuracy against bits of attention logits, with 95% intervals, a panel per granularity of the "
        "scale. Grey and dashed, not of this run: Figure 8 of arXiv 2410.05258, 3B models, granularity not stated, "
        "read off the drawing."
    ),
}


@dataclass(frozen=True)
class PairContent:
    """The first section of the page."""

    lead: str
    notes: tuple[str, ...]
    findings: tuple[Finding, ...]
    tables: tuple[Table, ...]
    figures: dict[str, Figure | None]


def pair_content(
    run: Run, scores: pd.DataFrame, outliers: pd.DataFrame, measures: pd.DataFrame
) -> PairContent | None:
    """None where the run declares no matched checkpoints."""
    if run.pairing is None:
        return None
    found = _logits_first(effects(run))
    scored, profiled = compared(run, scores), compared(run, outliers)
    logits = [read_scheme(scheme).kinds == KINDS[0] or scheme == BASELINE for scheme in scored["scheme"]]
    published = scored[logits] if (scored["series"].str.startswith(KINDS[0])).any() else scored[:0]
    outlier_finding = outlier_pair_finding(profiled, run.pairing)
    tables = [
        pair_tables.side_by_side(profiled, compared(run, measures), run.pairing),
        pair_tables.lambda_table(compared(run, lambdas(run)), run.pairing),
        pair_tables.bits_table(scored, run.pairing, KINDS),
        pair_tables.effects_table(found),
    ]
    if published["acc_norm"].notna().any():
        tables.append(pair_tables.figure8_table(published, run.pairing))
    return PairContent(
        pair_lead(run),
        tuple(pair_notes(run, scores, found)),
        (*([outlier_finding] if outlier_finding else []), *effect_findings(found)),
        tuple(tables),
        {
            "effects": effects_figure(found, run.pairing),
            "pair_bits": pair_bits(scored, KINDS),
            "figure8": figure8(published),
        },
    )


def _logits_first(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of each variant in the order in which the page tells of them: by kind, those of KINDS first."""
    places = {kinds: place for place, kinds in enumerate(dict.fromkeys([*KINDS, *frame["kinds"]]))}
    variants = list(dict.fromkeys(frame["variant"]))
    order = [(variants.index(v), places[k]) for v, k in zip(frame["variant"], frame["kinds"], strict=True)]
    return frame.loc[pd.Series(order, index=frame.index, dtype=object).sort_values(kind="stable").index]


def shown_refs(run: Run, picture: str) -> list[str]:
    """The records that a picture of this section shows; none for a picture of another one."""
    if picture not in CAPTIONS or run.pairing is None:
        return []
    cells = [cell for cell in run.of_kind("evaluation") if cell.checkpoint in run.pairing.labels]
    of_logits = [
        cell for cell in cells if cell.scheme == BASELINE or read_scheme(cell.scheme).kinds == KINDS[0]
    ]
    return [cell.ref for cell in (of_logits if picture == "figure8" else cells)]
