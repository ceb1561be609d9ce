"""What a figure or a table needs of a scheme's name, read by the grammar that made it (`quantlab.schemes`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from quantlab.errors import SchemeError
from quantlab.schemes import Scheme, TensorSpec, WeightFormat
from quantlab.schemes.places import PLACES

__all__ = ["BASELINE", "SchemeName", "read_scheme"]

BASELINE = "w16"
"""Scheme of a checkpoint as it is."""

KINDS = {
    "w": "weights",
    "a": "activations",
    "l": "attention logits",
    "p": "attention probabilities",
    "e": "effective maps",
    "d": "lambda",
    "x": "hidden states",
    "q": "queries",
    "k": "keys",
    "v": "values",
    "kv": "KV cache",
}
"""Letter of a place -> what a reader calls it."""
_OF_TOKENS = ("a", "q", "k", "v", "kv", "d", "x")
"""Places whose rows are tokens; a row of logits or probabilities is a query's."""
_MAPS = {1: "the added map only", 2: "the subtracted map only"}
_UNIFORM = {"q8_0": "w8g32", "q5_0": "w5g32", "q5_1": "w5g32z", "q4_0": "w4g32", "q4_1": "w4g32z"}
"""Formats -> the uniform grid of their bits and groups."""


@dataclass(frozen=True)
class SchemeName:
    """What a scheme name says: which kinds of tensor carry how many bits."""

    parts: Mapping[str, TensorSpec | WeightFormat]
    """Letter of the place -> how it is quantized; empty for the baseline."""
    words: tuple[str, ...]
    """The weights' format, method and transforms; the whole name where it is of another grammar."""

    @property
    def bits(self) -> int:
        """The fewest bits that any quantized kind carries; 16 for the baseline."""
        return min((spec.bits for spec in self.parts.values()), default=16)

    @property
    def kinds(self) -> str:
        """The kinds of tensor that are quantized: `weights + activations`."""
        named = [KINDS[letter] for letter in self.parts]
        return " + ".join([*named, *([] if self.parts else self.words)]) or "nothing"

    @property
    def series(self) -> str:
        """`kinds`, with the bits of those that carry more than `bits`: w4a8 is `weights + activations at 8 bits`."""
        if len({spec.bits for spec in self.parts.values()}) < 2:
            return self.kinds
        return " + ".join(
            KINDS[letter] + (f" at {spec.bits} bits" if spec.bits > self.bits else "")
            for letter, spec in self.parts.items()
        )

    @property
    def detail(self) -> str:
        """Granularities and method: `groups of 64, zero point`; names the kind where there are several."""
        grains = {letter: _grain(letter, spec) for letter, spec in self.parts.items()}
        several = len(grains) > 1
        texts = [
            f"{KINDS[letter]} {grain}" if several else grain for letter, grain in grains.items() if grain
        ]
        return ", ".join([*texts, *self.words])

    @property
    def weight_grid(self) -> str:
        """The weights' part of the name, such as `w4g32z`; empty when weights are untouched."""
        weights = self.parts.get("w")
        if isinstance(weights, WeightFormat):
            return _UNIFORM.get(weights.name, weights.name)
        return "" if weights is None else Scheme(weights).name


@cache
def read_scheme(name: str) -> SchemeName:
    """Read a scheme's name; one of another grammar becomes one word of its own."""
    try:
        scheme = Scheme.parse(name)
    except SchemeError:
        return SchemeName({}, (name,))
    specs = {letter: getattr(scheme, place.field) for letter, place in PLACES.items()}
    words = [scheme.format, None if scheme.method == "rtn" else scheme.method, *scheme.transforms]
    words += ["mixed"] if scheme.mixed else []
    return SchemeName(
        {letter: spec for letter, spec in specs.items() if spec is not None},
        tuple(word for word in words if word),
    )


def _grain(letter: str, spec: TensorSpec | WeightFormat) -> str:
    """What shares a scale, and what else a grid has, in words; empty for a format, whose name says it."""
    if isinstance(spec, WeightFormat):
        return ""
    shared = f"per {spec.granularity}"
    if spec.group_size is not None:
        shared = f"groups of {spec.group_size}"
    elif spec.granularity == "row" and letter in _OF_TOKENS:
        shared = "per token"
    further = (
        None if spec.symmetric else "zero point",
        "static" if spec.static else None,
        None if spec.map is None else _MAPS[spec.map],
        None if spec.window is None else f"the last {spec.window} tokens as they are",
    )
    return ", ".join([shared, *filter(None, further)])
