"""The README.md of a folder: what was quantized, what it scores, who runs it fast. Needs no torch.

Scores come only from records of the same checkpoint content, the same scheme and the same skipped linears; where there
is none the card says "not measured". The front matter follows the Hugging Face hub's metadata (`base_model`,
`base_model_relation`, `model-index`).
"""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import yaml

import quantlab
from quantlab.export.engines import Engine
from quantlab.export.usage import USAGE
from quantlab.records import Record
from quantlab.schemes import METHODS, TRANSFORMS, Scheme, TensorSpec, WeightFormat

__all__ = ["CardFacts", "matching_scores", "model_card"]

Scores = Mapping[str, tuple[Record, Mapping[str, Any]]]
"""Task -> the record that measured it, and the task's summary in its result."""

_SIZES = {"hellaswag": "n", "perplexity": "num_tokens"}
"""Task -> what counts its items."""
_METRICS = {"hellaswag": ("acc", "acc_norm"), "perplexity": ("nats_per_token", "perplexity")}
"""Task -> scores on the card; each has its interval beside it as `<score>_interval`."""


@dataclass(frozen=True)
class CardFacts:
    """What a card says besides scores."""

    scheme: Scheme
    format_name: str
    layout: str
    base_model: str
    """Name of the checkpoint that was quantized."""
    content_hash: str
    source_precision: str
    """What the checkpoint's weights were: `bfloat16`, or `dequantized Q4_1`."""
    stored_dtype: str
    """Dtype of everything that keeps its precision, and of scales where `scale_dtype` is empty."""
    num_swapped: int
    skipped: Sequence[str]
    """Decoder linears that keep their precision because the user skipped them."""
    skip: Sequence[str]
    """The patterns that say so."""
    average_storage_bits: float
    weights_bytes: int
    tied_embeddings: bool
    engines: Sequence[Engine]
    """Who loads the folder, and how it runs there."""
    wider: Sequence[str] = ()
    """Tensors that the stored dtype would round, stored in their own."""
    notes: tuple[str, ...] = ()
    """What methods and transforms did otherwise than asked, or untied."""
    scale_dtype: str = ""
    """Dtype of scales where the format fixes another."""
    kept_in: str = ""
    """Types of everything that keeps its precision, where they are not the stored dtype."""


def matching_scores(
    records: Sequence[Record],
    content_hash: str,
    scheme: Scheme,
    skip: Sequence[str] = (),
    made_by: Mapping[str, Any] = MappingProxyType({}),
) -> Scores:
    """Of each task the largest evaluation that was made of exactly these weights.

    Args:
        made_by: what a record says of calibration, method, transforms and widths, where the scheme has them.
    """
    best: dict[str, tuple[Record, Mapping[str, Any]]] = {}
    for record in sorted(records, key=lambda record: record.key):
        if record.kind != "evaluation" or not _is_of(record.made_by, content_hash, scheme, skip, made_by):
            continue
        for task, size in _SIZES.items():
            summary = record.result.get(task)
            if summary and (task not in best or summary[size] > best[task][1][size]):
                best[task] = record, summary
    return best


def _is_of(
    recorded: Mapping[str, Any],
    content_hash: str,
    scheme: Scheme,
    skip: Sequence[str],
    made_by: Mapping[str, Any],
) -> bool:
    skipped = recorded.get("quantize", {}).get("skip", ())
    return (
        recorded.get("checkpoint", {}).get("content_hash") == content_hash
        and recorded.get("scheme") == scheme.name
        and sorted(skipped) == sorted(skip)
        and all(recorded.get(name) == made_by.get(name) for name in _MAKES_CODES)
    )


_MAKES_CODES = ("calibration", "method", "transforms", "widths")
"""Entries of a record's `made_by` that codes depend on."""


def model_card(facts: CardFacts, scores: Scores) -> str:
    """README.md: YAML front matter and Markdown."""
    front = yaml.safe_dump(_front_matter(facts, scores), sort_keys=False, allow_unicode=True, width=10_000)
    sections = [
        f"# {_escaped(facts.base_model)}, {facts.scheme.name}",
        f"{_what(facts.scheme)} of {_escaped(facts.base_model)}, made by quantlab {quantlab.__version__}.",
        "## What is quantized\n\n" + _table(("", ""), _facts_rows(facts)),
        *_warnings(facts),
        "## Scores\n\n" + _scores_text(scores, facts),
        "## Loading\n\n" + USAGE[facts.format_name],
        "## Engines\n\n" + engines_table(facts.engines),
        "`MANIFEST.json` holds the sha256 and size of every file; `recipe.json` says how the weights were made.",
    ]
    return f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n"


def engines_table(engines: Sequence[Engine]) -> str:
    """The engine matrix, as a table of Markdown."""
    rows = [(engine.name, _LOADS[engine.loads], _SPEED[engine.speed], engine.note) for engine in engines]
    return _table(("engine", "loads", "low bits there", ""), rows)


_LOADS = {"here": "yes", "elsewhere": "should, by the format's documentation", "no": "no"}
_SPEED = {
    "faster": "faster where it has a kernel",
    "smaller": "smaller files only",
    "simulated": "simulated in floats",
}


def _front_matter(facts: CardFacts, scores: Scores) -> dict[str, Any]:
    bits = 16 if facts.scheme.weights is None else facts.scheme.weights.bits
    front: dict[str, Any] = {
        "base_model": _one_line(facts.base_model),
        "base_model_relation": "quantized",
        **({"library_name": "transformers"} if _in_transformers(facts) else {}),
        "pipeline_tag": "text-generation",
        "tags": ["quantlab", facts.format_name, facts.scheme.name, f"{bits}-bit"],
    }
    if scores:
        results = [_model_index_entry(task, record, summary) for task, (record, summary) in scores.items()]
        front["model-index"] = [
            {"name": f"{_one_line(facts.base_model)}, {facts.scheme.name}", "results": results}
        ]
    return front


def _in_transformers(facts: CardFacts) -> bool:
    """Whether transformers loads the folder by itself."""
    return any(engine.name == "transformers" and engine.loads == "here" for engine in facts.engines)


def _what(scheme: Scheme) -> str:
    return "Weights in 16 bits" if scheme.weights is None else "Low-bit weights"


def _model_index_entry(task: str, record: Record, summary: Mapping[str, Any]) -> dict[str, Any]:
    dataset = (
        {"name": "HellaSwag", "type": "hellaswag", "split": "validation"}
        if task == "hellaswag"
        else {"name": str(summary.get("source", "text")), "type": "text"}
    )
    return {
        "task": {"type": "text-generation", "name": "Text Generation"},
        "dataset": dataset,
        "metrics": [
            {
                "type": metric,
                "name": metric,
                "value": summary[metric],
                "args": {
                    _SIZES[task]: summary[_SIZES[task]],
                    "interval_95": list(summary[f"{metric}_interval"]),
                    "record": record.key,
                },
            }
            for metric in _METRICS[task]
        ],
    }


def _facts_rows(facts: CardFacts) -> list[tuple[str, str]]:
    scheme = facts.scheme
    return [
        ("scheme", f"`{scheme.name}`"),
        ("codes chosen by", _method(scheme)),
        *(
            [("transforms", "; ".join(TRANSFORMS[name].summary for name in scheme.transforms))]
            if scheme.transforms
            else []
        ),
        ("weights", _grid(scheme.weights)),
        ("inputs of linears", _grid(scheme.activations)),
        ("format", f"{facts.format_name}, {facts.layout}"),
        ("quantized", f"{facts.num_swapped} linears of the decoder"),
        (
            "storage bits per quantized weight",
            f"{facts.average_storage_bits:.3f}, with scales, padding and shapes",
        ),
        ("weight files", f"{facts.weights_bytes:,} bytes"),
        (f"kept in {facts.kept_in or facts.stored_dtype}", _kept(facts)),
        ("scales", _scales(facts)),
        ("source", f"{_escaped(facts.base_model)}, {_escaped(facts.source_precision)}"),
        ("source content", f"`{facts.content_hash}`"),
        *(("note", _escaped(note)) for note in facts.notes),
    ]


def _method(scheme: Scheme) -> str:
    """How codes were chosen."""
    if not isinstance(scheme.weights, TensorSpec):
        return "nothing" if scheme.weights is None else f"the format {scheme.weights.name} itself"
    return "round to nearest" if scheme.method == "rtn" else METHODS[scheme.method].summary


_SCALES = {
    **dict.fromkeys(("nf4", "fp4", "llm_int8"), "float32"),
    **dict.fromkeys(("nf4_dq", "fp4_dq"), "8 bits, with a float32 scale per 256 of them"),
    **dict.fromkeys(("mxfp4", "mxfp6", "mxfp6e3m2"), "powers of two in 8 bits"),
    "nvfp4": "8-bit floats, with one float32 for the matrix",
    **dict.fromkeys(("q8_0", "q5_1", "q5_0", "q4_1", "q4_0"), "float16"),
    **dict.fromkeys(("q6_k", "q5_k", "q4_k", "q3_k"), "float16 and small integers, as the type has them"),
}
"""Format of weights -> how its scales are stored, where that is fixed and they are not rounded to the stored dtype."""


def _scales(facts: CardFacts) -> str:
    if facts.scheme.weights is None:
        return "none"
    return _SCALES.get(facts.scheme.format or "", facts.scale_dtype or facts.stored_dtype)


def _grid(spec: TensorSpec | WeightFormat | None) -> str:
    if spec is None:
        return "not quantized"
    if isinstance(spec, WeightFormat):
        return spec.name
    scale = {
        "channel": "a scale per output channel",
        "group": f"a scale per {spec.group_size} inputs",
        "row": "a dynamic scale per token",
    }
    zero = "symmetric" if spec.symmetric else "with zero point"
    return f"{spec.bits} bits, {zero}, {scale.get(spec.granularity, 'a scale per ' + spec.granularity)}"


def _kept(facts: CardFacts) -> str:
    head = "embeddings, norms, biases and output head"
    if facts.tied_embeddings:
        head += " (tied to the embeddings)"
    if facts.skipped:
        head += f"; skipped by request: {', '.join(f'`{name}`' for name in facts.skipped)}"
    if facts.wider:
        head += (
            f"; kept in their own dtype, which holds more: {', '.join(f'`{name}`' for name in facts.wider)}"
        )
    return head


def _warnings(facts: CardFacts) -> list[str]:
    """What a reader must know before believing the scores."""
    if facts.source_precision in ("bfloat16", "float16", "float32", "float64"):
        return []
    return [
        f"**The source was already quantized ({_escaped(facts.source_precision)}).** These weights are a second "
        "quantization of it, and every comparison is with that source, not with the model's original 16-bit weights."
    ]


def _scores_text(scores: Scores, facts: CardFacts) -> str:
    if not scores:
        return "not measured"
    rows = [
        (
            "HellaSwag, zero-shot" if task == "hellaswag" else "text",
            metric,
            _number(summary[metric]),
            " to ".join(_number(end) for end in summary[f"{metric}_interval"]),
            f"{summary[_SIZES[task]]:,} {'documents' if task == 'hellaswag' else 'tokens'}",
            f"`{record.key[:12]}`",
        )
        for task, (record, summary) in scores.items()
        for metric in _METRICS[task]
    ]
    missing = [f"{task}: not measured" for task in _SIZES if task not in scores]
    table = _table(("task", "score", "value", "95% interval", "n", "record"), rows)
    return "\n\n".join([table, *missing, _how_measured(scores, facts)])


def _how_measured(scores: Scores, facts: CardFacts) -> str:
    """Of which codes the scores are, those in the folder or those from scales of another dtype, and what ran."""
    settings = [record.made_by.get("quantize", {}) for record, _ in scores.values()]
    measured = {setting.get("scale_dtype", "float32") for setting in settings}
    ran, scale_dtype = _kernels_text(scores), facts.scale_dtype or facts.stored_dtype
    if facts.scheme.weights is None:
        return f"Measured by quantlab on the weights of this folder.{ran}"
    if facts.scheme.format in _SCALES or measured == {scale_dtype}:
        return f"Measured by quantlab on the codes and scales of this folder.{ran}"
    return (
        f"Measured by quantlab on the scheme with scales in {' and '.join(sorted(measured))}; the scales of this "
        f"folder are rounded to {scale_dtype} and its codes chosen after that, so they differ slightly.{ran}"
    )


_KERNELS = {
    "weight_only": "in floats on dequantized weights",
    "simulated": "in floats on rounded inputs and dequantized weights",
    "int8_mm": "as integer products of codes",
}
"""A name of `quantlab.kernels` in words."""


def _kernels_text(scores: Scores) -> str:
    """How the linears were computed, as the records say; nothing where they do not."""
    recorded = (record.result.get("quantization", {}).get("kernels", {}) for record, _ in scores.values())
    names = sorted({name for kernels in recorded for name in kernels})
    return f" Its linears ran {' and '.join(_KERNELS.get(name, name) for name in names)}." if names else ""


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(text: str) -> str:
    """Text of unknown origin on one line of Markdown, with nothing in it that renders."""
    return re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", html.escape(_one_line(text), quote=False))


def _one_line(text: str) -> str:
    return " ".join(text.split())
