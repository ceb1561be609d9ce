"""Evaluation records -> one row per checkpoint and scheme: scores as recorded, and changes against the baseline.

A change is paired: the same documents (or blocks of text) under the scheme and under the checkpoint's own w16, item by
item. Changes of the margin (nats per document; margin = log-likelihood of the gold ending minus that of the best wrong
one) and of nats per token resolve far less than accuracy can, whose smallest detectable difference stands beside it.

Columns ending in _low and _high are the ends of a 95% interval, each of one comparison by itself; those ending in
_stderr are standard errors. A number that was not measured is NaN. `smallest_detectable` is inf where no difference can
be resolved with so few flips. `label` is the checkpoint without the number of its setting.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from quantlab.statistics import holm, minimum_detectable_effect
from reports.changes import baseline_of, changes, setting
from reports.load import BASELINE, Cell, Run, scheme_order
from reports.planned import Hole
from reports.scheme_names import read_scheme

ESTIMATES = {
    "hellaswag": ("acc", "acc_norm", "margin", "margin_norm"),
    "perplexity": ("nats_per_token", "perplexity"),
}
"""Scores that a record carries with an interval, by task."""
CHANGES = ("margin_change", "nats_change", "acc_norm_change")
"""Paired changes: nats per document, nats per token, share of documents."""
NO_EVIDENCE = "no evidence about its bits"
"""How `no_evidence` starts for a scheme of the very bits and groups that the weights were rounded to before."""
ENDS = ("", "_low", "_high")
"""What a column of an estimate and those of its interval end in."""
TEXTS = ("ref", "key", "label", "checkpoint", "scheme", "status", "series", "detail", "baseline_ref",
         "baseline_precision", "no_evidence", "kernel", "note", "text_note", "text_read_as")  # fmt: skip
NUMBERS = ("bits", "n", "num_tokens", "num_blocks", "num_documents", "weights_bytes", "average_storage_bits",
           "won", "lost", "mcnemar_p", "holm_p", "smallest_detectable")  # fmt: skip
SIGNIFICANT = 0.05
"""Level of a checkpoint's family of McNemar tests: Holm-adjusted p below it counts as a change of accuracy."""
CHANCE = 0.25
"""HellaSwag accuracy of guessing: one ending in four."""


def scores(run: Run) -> pd.DataFrame:
    """A row for each evaluation cell, planned or recorded: by checkpoint, then from the baseline to the fewest bits."""
    cells = run.of_kind("evaluation")
    names = _named_settings(cells)
    rows = [_row(cell, baseline_of(cell, cells)) | {"checkpoint": names[cell.ref]} for cell in cells]
    rows += [_hole(hole) for hole in run.holes if hole.kind == "evaluation"]
    places = {name: place for place, name in enumerate(dict.fromkeys([*run.checkpoints, *names.values()]))}
    rows.sort(key=lambda row: (places[row["checkpoint"]], scheme_order(row["scheme"]), row["key"]))
    return _with_series(
        _with_holm(pd.DataFrame(rows, columns=_columns()).astype(dict.fromkeys(_numeric(), float)))
    )


def _named_settings(cells: Sequence[Cell]) -> dict[str, str]:
    """ref -> checkpoint, numbered where one checkpoint was scored under several settings, which do not compare."""
    settings: dict[str, list[str]] = {}
    for cell in cells:
        found = settings.setdefault(cell.checkpoint, [])
        if setting(cell) not in found:
            found.append(setting(cell))
    names = {}
    for cell in cells:
        found = settings[cell.checkpoint]
        number = f", setting {found.index(setting(cell)) + 1}" if len(found) > 1 else ""
        names[cell.ref] = cell.checkpoint + number
    return names


def _columns() -> list[str]:
    return [*TEXTS, *_numeric()]


def _numeric() -> list[str]:
    estimates = [name for names in ESTIMATES.values() for name in names] + list(CHANGES)
    errors = [f"{name}_stderr" for names in ESTIMATES.values() for name in names]
    return [*NUMBERS, *(f"{name}{end}" for name in estimates for end in ENDS), *errors]


def _hole(hole: Hole) -> dict[str, Any]:
    return (
        dict.fromkeys(TEXTS, "")
        | {
            "key": hole.key,
            "label": hole.checkpoint,
            "checkpoint": hole.checkpoint,
            "scheme": hole.scheme,
            "status": "missing",
        }
        | _read_name(hole.scheme)
    )


def _row(cell: Cell, baseline: Cell | None) -> dict[str, Any]:
    """One recorded cell: what it is, what it scored, what it changed."""
    row = dict.fromkeys(TEXTS, "") | {
        "ref": cell.ref,
        "key": cell.record.key,
        "label": cell.checkpoint,
        "checkpoint": cell.checkpoint,
        "scheme": cell.scheme,
        "status": "recorded",
        "no_evidence": _no_evidence(cell),
        "baseline_precision": str(_checkpoint(cell).get("source_precision") or ""),
    }
    row |= _read_name(cell.scheme) | _recorded_scores(cell.record.result) | _recorded_quantization(cell)
    if baseline is None:
        return row | {"note": "" if cell.scheme == BASELINE else "no baseline on the same data"}
    return row | {"baseline_ref": baseline.ref} | changes(cell, baseline)


def _read_name(scheme: str) -> dict[str, Any]:
    name = read_scheme(scheme)
    return {"bits": name.bits, "series": name.series, "detail": name.detail}


def _recorded_scores(result: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for task, names in ESTIMATES.items():
        summary = result.get(task) or {}
        for name in names:
            low, high = summary.get(f"{name}_interval") or (None, None)
            found |= {name: summary.get(name), f"{name}_low": low, f"{name}_high": high}
            found[f"{name}_stderr"] = summary.get(f"{name}_stderr")
    hellaswag, perplexity = result.get("hellaswag") or {}, result.get("perplexity") or {}
    return found | {
        "n": hellaswag.get("n"),
        "num_tokens": perplexity.get("num_tokens"),
        "num_blocks": perplexity.get("num_blocks"),
        "num_documents": perplexity.get("num_documents"),
        "text_note": str(perplexity.get("interval_note") or ""),
        "text_read_as": str(perplexity.get("text_read_as") or ""),
    }


def _recorded_quantization(cell: Cell) -> dict[str, Any]:
    quantization = cell.record.result.get("quantization") or {}
    return {
        "weights_bytes": quantization.get("weights_bytes"),
        "average_storage_bits": quantization.get("average_storage_bits"),
        "kernel": ", ".join(sorted(quantization.get("kernels") or {})),
    }


def _checkpoint(cell: Cell) -> Mapping[str, Any]:
    checkpoint: Mapping[str, Any] = cell.record.made_by.get("checkpoint") or {}
    return checkpoint


def _no_evidence(cell: Cell) -> str:
    """Why a scheme says nothing about its bits: the weights were rounded to as many, in such groups, before."""
    source, name = _checkpoint(cell).get("source_scheme"), read_scheme(cell.scheme)
    if not source or not name.weight_grid or read_scheme(str(source)).weight_grid != name.weight_grid:
        return ""
    if len(name.parts) > 1:
        return f"shows nothing about its weights, for the source has their bits and groups already ({source})"
    return f"{NO_EVIDENCE}, for the source has these bits and groups already ({source})"


def _with_holm(frame: pd.DataFrame) -> pd.DataFrame:
    """Adjust each checkpoint's McNemar p-values for the number of its schemes, and say what such a test resolves."""
    for _, group in frame.dropna(subset=["mcnemar_p"]).groupby("checkpoint", sort=False):
        frame.loc[group.index, "holm_p"] = holm(group["mcnemar_p"].to_numpy())
        for index, row in group.dropna(subset=["n"]).iterrows():
            flipped, level = int(row["won"] + row["lost"]), SIGNIFICANT / len(group)
            frame.loc[index, "smallest_detectable"] = minimum_detectable_effect(int(row["n"]), flipped, level)
    return frame


def _with_series(frame: pd.DataFrame) -> pd.DataFrame:
    """Split a series by granularity where one checkpoint has two of its schemes at the same bits."""
    twice = frame[frame.duplicated(["checkpoint", "series", "bits"], keep=False)]
    crowded = frame["series"].isin(set(twice["series"])) & (frame["detail"] != "")
    frame.loc[crowded, "series"] = frame["series"] + ", " + frame["detail"]
    # Where the figures cannot say more than a sign, a scheme on the source's own grid does not share a line.
    frame.loc[frame["no_evidence"] != "", "series"] = frame["series"] + " †"
    return frame
