"""How much more a scheme costs one checkpoint than its matched baseline: differences in differences, paired by item.

    loss      what a scheme takes from a checkpoint's own w16: nats per token gained; margin or accuracy lost
    effect    the variant's loss minus the baseline's over the same items; below zero, the variant loses less

Nats per token of two checkpoints compare only over the same tokens, so their records must carry one digest of them.
Margins and accuracy are of documents, whatever the tokenizer. Intervals are 95%, each of one comparison by itself;
p-values are of the same tests, and Holm's are adjusted for all schemes of one variant and measure.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from quantlab.records import COMPUTATION, fingerprint, what_was_computed
from quantlab.statistics import Estimate, difference_of_changes, holm, p_of_zero, paired_text_difference
from reports.changes import baseline_of, documents_of
from reports.load import BASELINE, Cell, Run, scheme_order
from reports.scheme_names import read_scheme


@dataclass(frozen=True)
class Measure:
    """A score whose loss is compared."""

    name: str
    """What a sentence says the effect is on."""
    unit: str
    task: str
    column: str
    """Of the per-item results."""
    factor: float = 1.0
    """What a number is multiplied with to be shown."""


MEASURES = {
    "nats": Measure("the text", "nats per token", "perplexity", "nats"),
    "margin": Measure("the margin of whole endings", "nats per document", "hellaswag", "margin"),
    "margin_norm": Measure(
        "the normalised margin", "nats per 100 characters", "hellaswag", "margin_norm", 100
    ),
    "acc_norm": Measure("acc_norm", "points", "hellaswag", "correct_norm", 100),
}
"""Measures in the order of tables; an effect has the columns NAME, NAME_low, NAME_high, NAME_p and NAME_holm."""
OTHER_TOKENS = "not compared: other tokens (another tokenizer or another text)"
OTHER_ITEMS = "not compared: other items"
TEXTS = ("variant", "baseline", "scheme", "kinds", "source", "refs", "note", "nats_note")


def effects(run: Run) -> pd.DataFrame:
    """One row per variant and scheme of a declared comparison; no rows where the run declares none."""
    rows: list[dict[str, Any]] = []
    for variant in run.pairing.variants if run.pairing else ():
        assert run.pairing
        rows += _rows(run.of_kind("evaluation"), variant, run.pairing.baseline)
    numbers = [f"{name}{end}" for name in MEASURES for end in ("", "_low", "_high", "_p", "_holm")]
    numbers += ["n", "num_documents"]
    frame = pd.DataFrame(rows, columns=[*TEXTS, *numbers]).astype(dict.fromkeys(numbers, float))
    return _with_holm(frame)


def _rows(cells: tuple[Cell, ...], variant: str, baseline: str) -> list[dict[str, Any]]:
    ours = [cell for cell in cells if cell.checkpoint == variant and cell.scheme != BASELINE]
    theirs = [cell for cell in cells if cell.checkpoint == baseline]
    rows = []
    for cell in sorted(ours, key=lambda cell: scheme_order(cell.scheme)):
        row = {"variant": variant, "baseline": baseline, "scheme": cell.scheme, "source": "", "refs": (),
               "kinds": read_scheme(cell.scheme).kinds, "note": "", "nats_note": ""}  # fmt: skip
        rows.append(row | _effect(cell, theirs, cells))
    return rows


def _effect(cell: Cell, theirs: list[Cell], cells: tuple[Cell, ...]) -> dict[str, Any]:
    """The row's numbers, or a note that says why there are none."""
    named = [other for other in theirs if other.scheme == cell.scheme]
    if not named:
        return {"note": "not compared: the baseline has no record under this scheme"}
    alike = [other for other in named if _setting(other) == _setting(cell)]
    if not alike:
        return {"note": "not compared: scored on other data or with other settings"}
    how = cell.record.made_by.get(COMPUTATION)
    quad = _Quad.of(cell, min(alike, key=lambda other: other.record.made_by.get(COMPUTATION) != how), cells)
    if quad is None:
        return {"note": "not compared: no 16-bit record on the same data"}
    found: dict[str, Any] = {"source": quad.source, "refs": quad.refs}
    for task, compare in (("perplexity", _text), ("hellaswag", _documents)):
        found |= compare(quad) if quad.scored(task) else {}
    return found


def _setting(cell: Cell) -> str:
    """Fingerprint of what was computed but the checkpoint's content: records of two checkpoints compare in it."""
    made_by = what_was_computed(cell.record.made_by)
    checkpoint = made_by.pop("checkpoint", None) or {}
    return fingerprint(made_by | {"dtype": checkpoint.get("dtype"), "device": checkpoint.get("device")})


@dataclass(frozen=True)
class _Quad:
    """The four records of an effect."""

    after: Cell
    before: Cell
    base_after: Cell
    base_before: Cell

    @classmethod
    def of(cls, cell: Cell, other: Cell, cells: tuple[Cell, ...]) -> "_Quad | None":
        before, base_before = baseline_of(cell, cells), baseline_of(other, cells)
        return cls(cell, before, other, base_before) if before and base_before else None

    @property
    def cells(self) -> tuple[Cell, ...]:
        return (self.after, self.before, self.base_after, self.base_before)

    @property
    def refs(self) -> tuple[str, ...]:
        return tuple(cell.ref for cell in self.cells)

    @property
    def source(self) -> str:
        return "({} − {}) − ({} − {})".format(*self.refs)

    def scored(self, task: str) -> bool:
        return all(not cell.of_task(task).empty for cell in self.cells)

    def columns(self, task: str, column: str) -> list[np.ndarray[Any, np.dtype[np.float64]]] | None:
        """The column of each record; none where one lacks it, or the items differ."""
        tables = [cell.of_task(task) for cell in self.cells]
        if any(column not in table or not table.index.equals(tables[0].index) for table in tables):
            return None
        return [table[column].to_numpy(float) for table in tables]


def _text(quad: _Quad) -> dict[str, Any]:
    digests = {(cell.record.result.get("perplexity") or {}).get("tokens_sha256") for cell in quad.cells}
    if len(digests) > 1 or None in digests:
        return {"nats_note": OTHER_TOKENS}
    nats, tokens = quad.columns("perplexity", "nats"), quad.columns("perplexity", "num_tokens")
    if nats is None or tokens is None or any((each != tokens[0]).any() for each in tokens):
        return {"nats_note": OTHER_ITEMS}
    after, before, base_after, base_before = nats
    documents = documents_of(quad.after.of_task("perplexity"))
    estimate = paired_text_difference(after - before, base_after - base_before, tokens[0], documents)
    return _flat("nats", estimate) | {"num_documents": estimate.n}


def text_at_16_bits(run: Run) -> list[tuple[str, Estimate, tuple[str, ...]]]:
    """(variant, its nats per token minus the baseline's, refs) at 16 bits, where both scored the same tokens."""
    found: list[tuple[str, Estimate, tuple[str, ...]]] = []
    cells = [cell for cell in run.of_kind("evaluation") if cell.scheme == BASELINE]
    for variant in run.pairing.variants if run.pairing else ():
        assert run.pairing
        for ours in (cell for cell in cells if cell.checkpoint == variant):
            theirs = [
                c for c in cells if c.checkpoint == run.pairing.baseline and _setting(c) == _setting(ours)
            ]
            if theirs and (estimate := _text_difference(ours, theirs[0])) is not None:
                found.append((variant, estimate, (ours.ref, theirs[0].ref)))
    return found


def _text_difference(ours: Cell, theirs: Cell) -> Estimate | None:
    digests = [(cell.record.result.get("perplexity") or {}).get("tokens_sha256") for cell in (ours, theirs)]
    own, other = ours.of_task("perplexity"), theirs.of_task("perplexity")
    if None in digests or digests[0] != digests[1] or not own.index.equals(other.index):
        return None
    first, second = (table["nats"].to_numpy(float) for table in (own, other))
    return paired_text_difference(first, second, own["num_tokens"].to_numpy(float), documents_of(own))


def _documents(quad: _Quad) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, measure in MEASURES.items():
        values = quad.columns(measure.task, measure.column) if measure.task == "hellaswag" else None
        if values is None:
            continue
        after, before, base_after, base_before = values
        # What is lost is before minus after.
        estimate = difference_of_changes(before, after, base_before, base_after)
        found |= _flat(name, estimate) | {"n": estimate.n}
    return found or {"note": OTHER_ITEMS}


def _flat(name: str, estimate: Estimate) -> dict[str, float]:
    numbers = {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    numbers[f"{name}_p"] = p_of_zero(estimate)
    return {key: number if np.isfinite(number) else np.nan for key, number in numbers.items()}


def _with_holm(frame: pd.DataFrame) -> pd.DataFrame:
    for name in MEASURES:
        for _, group in frame.dropna(subset=[f"{name}_p"]).groupby("variant", sort=False):
            frame.loc[group.index, f"{name}_holm"] = holm(group[f"{name}_p"].to_numpy())
    return frame


def compared(run: Run, frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of a frame of scores or outliers that are of matched checkpoints, the baseline's first."""
    labels = run.pairing.labels if run.pairing else ()
    column = "label" if "label" in frame else "checkpoint"
    rows = frame[frame[column].isin(labels)]
    order = rows[column].map({label: place for place, label in enumerate(labels)})
    return rows.loc[order.sort_values(kind="stable").index]
