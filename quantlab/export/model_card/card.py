"""The whole card, section by section."""

from collections.abc import Sequence

import yaml

import quantlab
from quantlab.export.engines import Engine
from quantlab.export.model_card.facts import CardFacts
from quantlab.export.model_card.facts_table import facts_rows
from quantlab.export.model_card.front_matter import front_matter
from quantlab.export.model_card.markdown import escaped, table
from quantlab.export.model_card.scores import Scores
from quantlab.export.model_card.scores_section import scores_text
from quantlab.export.usage import USAGE
from quantlab.schemes import Scheme

__all__ = ["model_card"]

_LOADS = {"here": "yes", "elsewhere": "should, by the format's documentation", "no": "no"}
_SPEED = {
    "faster": "faster where it has a kernel",
    "smaller": "smaller files only",
    "simulated": "simulated in floats",
}


def model_card(facts: CardFacts, scores: Scores) -> str:
    """README.md: YAML front matter and Markdown."""
    front = yaml.safe_dump(front_matter(facts, scores), sort_keys=False, allow_unicode=True, width=10_000)
    sections = [
        f"# {escaped(facts.base_model)}, {facts.scheme.name}",
        f"{_what(facts.scheme)} of {escaped(facts.base_model)}, made by quantlab {quantlab.__version__}.",
        "## What is quantized\n\n" + table(("", ""), facts_rows(facts)),
        *_warnings(facts),
        "## Scores\n\n" + scores_text(scores, facts),
        "## Loading\n\n" + USAGE[facts.format_name],
        "## Engines\n\n" + _engines_table(facts.engines),
        "`MANIFEST.json` holds the sha256 and size of every file; `recipe.json` says how the weights were made.",
    ]
    return f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n"


def _what(scheme: Scheme) -> str:
    return "Weights in 16 bits" if scheme.weights is None else "Low-bit weights"


def _warnings(facts: CardFacts) -> list[str]:
    """What a reader must know before believing the scores."""
    if facts.source_precision in ("bfloat16", "float16", "float32", "float64"):
        return []
    return [
        f"**The source was already quantized ({escaped(facts.source_precision)}).** These weights are a second "
        "quantization of it, and every comparison is with that source, not with the model's original 16-bit weights."
    ]


def _engines_table(engines: Sequence[Engine]) -> str:
    """The engine matrix, as a table of Markdown."""
    rows = [(engine.name, _LOADS[engine.loads], _SPEED[engine.speed], engine.note) for engine in engines]
    return table(("engine", "loads", "low bits there", ""), rows)
