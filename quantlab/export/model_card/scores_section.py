"""The card's section of scores: a table, and what they were measured on."""

from collections.abc import Mapping
from typing import Any

from quantlab.export.model_card.facts import CardFacts
from quantlab.export.model_card.markdown import table
from quantlab.export.model_card.scores import METRICS, SIZES, Scores

__all__ = ["scores_text"]

_KERNELS = {
    "weight_only": "in floats on dequantized weights",
    "simulated": "in floats on rounded inputs and dequantized weights",
    "int8_mm": "as integer products of codes",
}
"""A name of `quantlab.kernels` in words."""


def scores_text(scores: Scores, facts: CardFacts) -> str:
    """The section without its heading."""
    if not scores:
        return "not measured"
    rows = [
        (
            "HellaSwag, zero-shot" if task == "hellaswag" else _text(summary),
            metric,
            _number(summary[metric]),
            " to ".join(_number(end) for end in summary[f"{metric}_interval"]),
            f"{summary[SIZES[task]]:,} {'documents' if task == 'hellaswag' else 'tokens'}",
            f"`{record.key[:12]}`",
        )
        for task, (record, summary) in scores.items()
        for metric in METRICS[task]
    ]
    missing = [f"{task}: not measured" for task in SIZES if task not in scores]
    found = table(("task", "score", "value", "95% interval", "n", "record"), rows)
    return "\n\n".join([found, *missing, _how_measured(scores, facts)])


def _text(summary: Mapping[str, Any]) -> str:
    """Which text, and how it was read."""
    return ", ".join(filter(None, (summary.get("source", "text"), summary.get("text_read_as"))))


def _how_measured(scores: Scores, facts: CardFacts) -> str:
    """Of which codes the scores are, those in the folder or those from scales of another dtype, and what ran."""
    settings = [record.made_by.get("quantize", {}) for record, _ in scores.values()]
    measured = {setting.get("scale_dtype", "float32") for setting in settings}
    ran = _kernels_text(scores)
    if facts.scheme.weights is None:
        return f"Measured by quantlab on the weights of this folder.{ran}"
    if facts.fixed_scales or measured == {facts.rounded_to}:
        return f"Measured by quantlab on the codes and scales of this folder.{ran}"
    return (
        f"Measured by quantlab on the scheme with scales in {' and '.join(sorted(measured))}; the scales of this "
        f"folder are rounded to {facts.rounded_to} and its codes chosen after that, so they differ slightly.{ran}"
    )


def _kernels_text(scores: Scores) -> str:
    """How the linears were computed, as the records say; nothing where they do not."""
    recorded = (record.result.get("quantization", {}).get("kernels", {}) for record, _ in scores.values())
    names = sorted({name for kernels in recorded for name in kernels})
    return f" Its linears ran {' and '.join(_KERNELS.get(name, name) for name in names)}." if names else ""


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
