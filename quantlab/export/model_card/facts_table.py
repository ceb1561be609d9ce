"""The card's table of what is quantized, and how."""

from quantlab.export.model_card.facts import CardFacts
from quantlab.export.model_card.markdown import escaped
from quantlab.schemes import METHODS, TRANSFORMS, Scheme, TensorSpec, WeightFormat

__all__ = ["facts_rows"]


def facts_rows(facts: CardFacts) -> list[tuple[str, str]]:
    """What is said, and what holds."""
    scheme = facts.scheme
    return [
        ("scheme", f"`{scheme.name}`"),
        ("codes chosen by", _method(scheme)),
        *_transforms(scheme),
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
        ("source", f"{escaped(facts.base_model)}, {escaped(facts.source_precision)}"),
        ("source content", f"`{facts.content_hash}`"),
        *(("note", escaped(note)) for note in facts.notes),
    ]


def _method(scheme: Scheme) -> str:
    """How codes were chosen."""
    if not isinstance(scheme.weights, TensorSpec):
        return "nothing" if scheme.weights is None else f"the format {scheme.weights.name} itself"
    return "round to nearest" if scheme.method == "rtn" else METHODS[scheme.method].summary


def _transforms(scheme: Scheme) -> list[tuple[str, str]]:
    """Their row, where there are any."""
    done = "; ".join(TRANSFORMS[name].summary for name in scheme.transforms)
    return [("transforms", done)] if done else []


def _scales(facts: CardFacts) -> str:
    if facts.scheme.weights is None:
        return "none"
    return facts.fixed_scales or facts.rounded_to


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
