"""The card's front matter, which the Hugging Face hub reads."""

from collections.abc import Mapping
from typing import Any

from quantlab.export.model_card.facts import CardFacts
from quantlab.export.model_card.markdown import one_line
from quantlab.export.model_card.scores import METRICS, SIZES, Scores
from quantlab.records import Record

__all__ = ["front_matter"]


def front_matter(facts: CardFacts, scores: Scores) -> dict[str, Any]:
    """Its metadata; `model-index` where something was measured."""
    bits = 16 if facts.scheme.weights is None else facts.scheme.weights.bits
    front: dict[str, Any] = {
        "base_model": one_line(facts.base_model),
        "base_model_relation": "quantized",
        **({"library_name": "transformers"} if _in_transformers(facts) else {}),
        "pipeline_tag": "text-generation",
        "tags": ["quantlab", facts.format_name, facts.scheme.name, f"{bits}-bit"],
    }
    if scores:
        results = [_model_index_entry(task, record, summary) for task, (record, summary) in scores.items()]
        front["model-index"] = [
            {"name": f"{one_line(facts.base_model)}, {facts.scheme.name}", "results": results}
        ]
    return front


def _in_transformers(facts: CardFacts) -> bool:
    """Whether transformers loads the folder by itself."""
    return any(engine.name == "transformers" and engine.loads == "here" for engine in facts.engines)


def _model_index_entry(task: str, record: Record, summary: Mapping[str, Any]) -> dict[str, Any]:
    dataset = (
        {"name": "HellaSwag", "type": "hellaswag", "split": "validation"}
        if task == "hellaswag"
        else {"name": str(summary.get("source", "text")), "type": "text"}
    )
    return {
        "task": {"type": "text-generation", "name": "Text Generation"},
        "dataset": dataset,
        "metrics": [_metric(metric, task, record, summary) for metric in METRICS[task]],
    }


def _metric(metric: str, task: str, record: Record, summary: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": metric,
        "name": metric,
        "value": summary[metric],
        "args": {
            SIZES[task]: summary[SIZES[task]],
            "interval_95": list(summary[f"{metric}_interval"]),
            "record": record.key,
        },
    }
