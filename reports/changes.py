"""Paired changes of a scheme against its checkpoint's own baseline, from the per-item results of both records."""

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from quantlab.records import COMPUTATION, fingerprint, measured_on
from quantlab.statistics import (
    Estimate,
    mcnemar_exact,
    paired_difference,
    paired_text_difference,
)
from reports.load import BASELINE, Cell


def baseline_of(cell: Cell, cells: tuple[Cell, ...]) -> Cell | None:
    """The w16 cell of the same checkpoint on the same data and settings; computed alike, where there is a choice."""
    if cell.scheme == BASELINE:
        return None
    alike = [c for c in cells if c.scheme == BASELINE and setting(c) == setting(cell)]
    how = cell.record.made_by.get(COMPUTATION)
    return min(alike, key=lambda c: c.record.made_by.get(COMPUTATION) != how, default=None)


def setting(cell: Cell) -> str:
    """Fingerprint of what was measured, but for what quantized it: only records of one setting compare."""
    return fingerprint(measured_on(cell.record.made_by))


def changes(cell: Cell, baseline: Cell) -> dict[str, Any]:
    """Paired changes on the tasks that both cells scored; a task whose items differ is noted, not compared."""
    found: dict[str, Any] = {}
    for task, compare in (("hellaswag", _documents), ("perplexity", _blocks)):
        ours, theirs = cell.of_task(task), baseline.of_task(task)
        if ours.empty or theirs.empty:
            continue
        if not ours.index.equals(theirs.index):
            found["note"] = f"{task}: items differ from the baseline's, not compared"
        else:
            found |= compare(ours, theirs)
    return found


def _documents(ours: pd.DataFrame, theirs: pd.DataFrame) -> dict[str, Any]:
    right, was_right = ours["correct_norm"].to_numpy(float), theirs["correct_norm"].to_numpy(float)
    return {
        **_flat("margin_change", paired_difference(ours["margin"], theirs["margin"])),
        **_flat("acc_norm_change", paired_difference(right, was_right)),
        "won": int((right > was_right).sum()),
        "lost": int((right < was_right).sum()),
        "mcnemar_p": mcnemar_exact(right, was_right),
    }


def _blocks(ours: pd.DataFrame, theirs: pd.DataFrame) -> dict[str, Any]:
    estimate = paired_text_difference(ours["nats"], theirs["nats"], ours["num_tokens"], documents_of(ours))
    return _flat("nats_change", estimate)


def documents_of(blocks: pd.DataFrame) -> NDArray[np.int64]:
    """Number of the document of each block; a record that does not tell says no more than one document does."""
    if "document" not in blocks:
        return np.zeros(len(blocks), dtype=np.int64)
    return blocks["document"].to_numpy(np.int64)


def _flat(name: str, estimate: Estimate) -> dict[str, float]:
    """Value and interval; an endless interval (one item) is NaN, for nothing is known of it."""
    found = {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return {key: number if np.isfinite(number) else np.nan for key, number in found.items()}
