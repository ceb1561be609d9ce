"""What a reader must keep in mind, computed from the records: samples, baselines, kernels, holes and damage."""

from collections.abc import Iterator

import pandas as pd

from reports.findings import amount, blocks, count
from reports.load import BASELINE, Run
from reports.names import visible
from reports.outliers import TENSORS, unprofiled

_PLAIN_PRECISIONS = ("float32", "bfloat16", "float16", "F32", "BF16", "F16", "")

KERNELS = {
    "int8_mm": "Real integer products",
    "weight_only": "Weights dequantized from their codes, products in floating point",
    "simulated": "Simulated: values rounded to their grid, computed in floating point",
}
"""Kernel in a record -> what it means for a reader."""


def cautions(run: Run, scores: pd.DataFrame, outliers: pd.DataFrame) -> list[str]:
    """Sentences, the gravest first."""
    return [
        *_damage(run),
        *_baselines(scores),
        *_kernels(scores),
        *_samples(scores),
        *_texts(scores),
        *_profiles(run, outliers),
    ]


def _damage(run: Run) -> Iterator[str]:
    if run.problems:
        files = ", ".join(visible(problem.file) for problem in run.problems)
        yield f"Damaged files were left out: {files}. Run the sweep again to replace them."
    if run.holes:
        missing: dict[str, list[str]] = {}
        named = [hole for hole in run.holes if hole.kind != "unknown"]
        for hole in named:
            what = "profile" if hole.kind == "profile" else visible(hole.scheme)
            missing.setdefault(visible(hole.checkpoint), []).append(what)
        listed = [f"{name}: {', '.join(what)}" for name, what in missing.items()]
        if len(named) < len(run.holes):
            listed.append(
                f"{count(len(run.holes) - len(named), 'cell')} whose place in the plan is not known"
            )
        cells = "; ".join(listed)
        yield f"Planned but not recorded: {cells}. The run has not finished, or a cell failed."
    if run.num_unplanned:
        further = count(run.num_unplanned, "further record")
        yield f"Not used: {further} in the folder, of other settings or sources."


def _baselines(scores: pd.DataFrame) -> Iterator[str]:
    for checkpoint, rows in scores[scores["status"] == "recorded"].groupby("checkpoint", sort=False):
        name = visible(checkpoint)
        precision = str(rows["baseline_precision"].iloc[0])
        if precision not in _PLAIN_PRECISIONS:
            yield (
                f"{name} was quantized before: its baseline {BASELINE} is “{visible(precision)}”, and every change is "
                "measured from there, not from the weights that were trained."
            )
        for scheme, reason in rows.loc[rows["no_evidence"] != "", ["scheme", "no_evidence"]].itertuples(
            index=False
        ):
            yield f"† {name} {visible(scheme)}: {visible(reason, 200)}."
        alone = rows[rows["note"] != ""]
        for scheme, note in alone[["scheme", "note"]].itertuples(index=False):
            yield f"{name} {visible(scheme)}: {visible(note, 200)}."


def _kernels(scores: pd.DataFrame) -> Iterator[str]:
    rows = scores[(scores["scheme"] != BASELINE) & (scores["kernel"] != "")]
    for kernels, group in rows.groupby("kernel", sort=True):
        names = ", ".join(dict.fromkeys(visible(scheme) for scheme in group["scheme"]))
        meanings = [KERNELS.get(kernel, f"Kernel “{visible(kernel)}”") for kernel in str(kernels).split(", ")]
        yield f"{'; '.join(meanings)}: {names}."


def _samples(scores: pd.DataFrame) -> Iterator[str]:
    read = scores[["num_tokens", "num_blocks"]].dropna().to_dict("records")
    sizes = [amount(scores["n"].dropna(), "HellaSwag document")]
    sizes.append(amount(scores["num_tokens"].dropna(), "token", "of text") + blocks(read))
    if any(sizes):
        yield (
            f"Scores are of {' and '.join(filter(None, sizes))}; n of an interval is the number of documents, of "
            "HellaSwag or of the text. The 95% intervals speak of other documents and other text like these, not of "
            "other tasks or of a model trained again. Each is of one number by itself: none is adjusted for how many "
            "are shown."
        )


def _texts(scores: pd.DataFrame) -> Iterator[str]:
    """How the text was read, and where its documents are too few to tell a spread."""
    for read_as in dict.fromkeys(read_as for read_as in scores["text_read_as"] if read_as):
        yield f"Perplexity reads {visible(read_as)}; it compares with no figure of a text that was read otherwise."
    for note in dict.fromkeys(note for note in scores["text_note"] if note):
        yield f"Intervals of text, {visible(note)}."


def _profiles(run: Run, outliers: pd.DataFrame) -> Iterator[str]:
    for checkpoint, reason in unprofiled(run).items():
        yield f"Attention logits of {visible(checkpoint)} were not seen: {visible(reason, 300)}"
    for row in outliers.to_dict("records"):
        for name, what in (("nan", "NaN"), ("inf", "infinite")):
            if row[name] > 0:
                yield f"{visible(row['checkpoint'])}: {row[name]:,.0f} {what} values among {TENSORS[row['tensor']]}."
