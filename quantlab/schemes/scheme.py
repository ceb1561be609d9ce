"""Scheme: what is quantized and how, a value whose name is built from its numbers and parses back.

`w4g64a8kv8l6t-gptq-smooth`: a row of parts (`quantlab.schemes.places`), then after dashes the weight method and the
transforms (`quantlab.schemes.catalogue`). Formats with an arithmetic of their own are weights by name: `nf4`, `nf4-a8`.
The baseline is `w16`. A tensor of logits is all heads and maps of one layer and one sequence, never a batch; a
map is all heads of one of the two maps of differential attention.
"""

from dataclasses import dataclass, fields
from typing import Self

from quantlab.errors import SchemeError
from quantlab.schemes.catalogue import METHODS, MIXED, TRANSFORMS
from quantlab.schemes.names import read_name
from quantlab.schemes.places import PLACES, check_place
from quantlab.schemes.spec import TensorSpec, WeightFormat

__all__ = ["Scheme"]


@dataclass(frozen=True)
class Scheme:
    """What is quantized and how; None leaves a kind of tensor at 16 bits. A Scheme that exists can be run."""

    weights: TensorSpec | WeightFormat | None = None
    """Weights of the decoder's linears."""
    activations: TensorSpec | None = None
    """Inputs of the decoder's linears."""
    query: TensorSpec | None = None
    """Queries as they enter the attention product."""
    key: TensorSpec | None = None
    """Keys as they enter the attention product."""
    value: TensorSpec | None = None
    """Values as they enter the attention product."""
    cache: TensorSpec | None = None
    """Keys and values as a cache holds them."""
    logits: TensorSpec | None = None
    """Attention logits, after scale, soft-cap and bias and before the mask."""
    probs: TensorSpec | None = None
    """Attention probabilities, after the softmax."""
    effective: TensorSpec | None = None
    """Maps as they weigh the values, A1 - lambda A2, in attention that joins its maps."""
    lambdas: TensorSpec | None = None
    """Lambda of each token and head, in differential attention that has one."""
    hidden: TensorSpec | None = None
    """The residual stream after each decoder layer."""
    method: str = "rtn"
    """How weight codes are chosen, a name of METHODS."""
    transforms: tuple[str, ...] = ()
    """Changes of the weights that keep the function, names of TRANSFORMS in their order."""
    mixed: bool = False
    """Whether bits of some linears are not these but those of `quantize.widths`."""

    def __post_init__(self) -> None:
        for letter, place in PLACES.items():
            spec = getattr(self, place.field)
            if isinstance(spec, TensorSpec):
                check_place(letter, spec)
        self._check_words()
        if self.cache is not None and (self.key is not None or self.value is not None):
            raise SchemeError("the cache ('kv') holds keys and values: leave 'k' and 'v' out, or 'kv'.")
        if self.activations is not None and self.format == "llm_int8":
            raise SchemeError("llm_int8 quantizes the inputs of linears its own way: leave the part 'a' out.")

    def _check_words(self) -> None:
        if self.method not in METHODS:
            raise SchemeError(f"weight method must be one of {', '.join(METHODS)}: found {self.method!r}.")
        unknown = [name for name in self.transforms if name not in TRANSFORMS]
        if unknown or list(self.transforms) != [name for name in TRANSFORMS if name in self.transforms]:
            raise SchemeError(
                f"transforms are some of {', '.join(TRANSFORMS)}, in this order: found {self.transforms!r}."
            )
        if {"rotate", "spin"} <= set(self.transforms):
            raise SchemeError("spin is rotate with a learned rotation: leave one of the two out.")
        for word in (*([] if self.method == "rtn" else [self.method]), *([MIXED] if self.mixed else [])):
            if not isinstance(self.weights, TensorSpec):
                found = self.format or "none"
                raise SchemeError(f"{word} needs weights on a uniform grid (w4g64-{word}): found {found}.")
        if self.method == "hqq" and isinstance(self.weights, TensorSpec) and self.weights.symmetric:
            raise SchemeError(
                "hqq fits the zero points of weights: a symmetric grid has none. Add z, as in w4g64z-hqq."
            )
        self._check_static()
        if self.weights is None and "bias" in self.transforms:
            raise SchemeError("bias makes up for the error of quantized weights: found none (w4g64-bias).")

    def _check_static(self) -> None:
        """Refuse ranges of calibration that something later would move."""
        static = [name for name, spec in self.head_sites.items() if spec.static]
        if static and {"rotate", "spin"} & set(self.transforms):
            raise SchemeError(
                "queries and keys are turned by rotate as they arrive, so ranges from calibration are not theirs: "
                "found static ones. Leave the 's' of q, k, v or kv out, or the rotation."
            )
        if {"attn_value", "kv_cache"} & set(static) and self.method == "awq":
            raise SchemeError(
                "awq rescales values after their ranges were measured: found static ones. Leave the 's' of v or kv "
                "out, or use gptq."
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """The scheme that a name says, canonical or not.

        Raises:
            SchemeError: unknown text (the nearest known name is given), bits out of range, or a combination that
                means nothing.
        """
        return cls(**read_name(text))

    @property
    def name(self) -> str:
        """The canonical name; `Scheme.parse(scheme.name) == scheme`."""
        parts = "".join(_part_name(letter, getattr(self, place.field)) for letter, place in PLACES.items())
        words = [*([] if self.method == "rtn" else [self.method]), *self.transforms]
        named = [self.format or "", parts, *words, MIXED if self.mixed else ""]
        if not self.format and not parts:
            named[0] = "w16"
        return "-".join(filter(None, named))

    @property
    def format(self) -> str | None:
        """The weights' format by name, where it has an arithmetic of its own."""
        return self.weights.name if isinstance(self.weights, WeightFormat) else None

    @property
    def is_baseline(self) -> bool:
        """Whether nothing is quantized or transformed."""
        return self == Scheme()

    @property
    def needs(self) -> frozenset[str]:
        """What it takes of calibration: `tokens`, `inputs` of linears, `attention` (ranges of q, k, v)."""
        words = [METHODS[self.method], *(TRANSFORMS[name] for name in self.transforms)]
        needs = frozenset[str]().union(*(word.needs for word in words))
        if self.activations is not None and self.activations.static:
            needs |= {"tokens", "inputs"}
        if any(spec.static for spec in self.head_sites.values()):
            needs |= {"tokens", "attention"}
        return needs

    @property
    def reads_inputs(self) -> bool:
        """Whether inputs of linears decide more than codes: a corrected bias, or a static scale of these inputs."""
        return "bias" in self.transforms or (self.activations is not None and self.activations.static)

    @property
    def sites(self) -> dict[str, TensorSpec]:
        """What is quantized of attention maps, by the name of its site."""
        specs = {"attn_logits": self.logits, "attn_probs": self.probs, "attn_effective": self.effective}
        return {name: spec for name, spec in specs.items() if spec is not None}

    @property
    def head_sites(self) -> dict[str, TensorSpec]:
        """What is quantized of queries, keys and values, by the name of its site; `kv_cache` is both of the last."""
        specs = {
            "attn_query": self.query,
            "attn_key": self.key,
            "attn_value": self.value,
            "kv_cache": self.cache,
        }
        return {name: spec for name, spec in specs.items() if spec is not None}

    @property
    def _values(self) -> tuple[TensorSpec, ...]:
        """What is quantized of tensors that hold tokens and channels."""
        specs = (self.activations, *self.head_sites.values(), self.lambdas, self.hidden)
        return tuple(spec for spec in specs if spec is not None)

    @property
    def rounds_values(self) -> bool:
        """Whether values that pass through the model are rounded to codes, and not weights alone.

        A value near the middle of two codes then turns a difference in its last place into a whole step, and layers
        of steps into a score that differs by as much as the scheme itself costs a document. So such a scheme is
        scored in one fixed layout: a row holds one document, whatever the batch size.
        """
        return bool(self.sites or self._values) or self.format == "llm_int8"

    @property
    def spans_sequence(self) -> bool:
        """Whether a dynamic scale or choice spans tokens; then every context is scored with every ending by itself."""
        spans = {"tensor", "map", "channel", "head"}
        values = any(not spec.static and spec.granularity in spans for spec in self._values)
        rows = any(spec.granularity in spans for spec in self.sites.values())
        window = self.cache is not None and self.cache.window is not None
        return values or rows or window or self.format == "llm_int8"


def _part_name(letter: str, spec: TensorSpec | WeightFormat | None) -> str:
    """One part as the canonical name has it; a default granularity is left out."""
    if not isinstance(spec, TensorSpec):
        return ""
    place = PLACES[letter]
    default = spec.granularity == place.granularities[0] and not place.always_named
    return f"{letter}{spec.bits}{'' if default else spec.grain}{spec.modifiers}"


assert {place.field for place in PLACES.values()} < {field.name for field in fields(Scheme)}
