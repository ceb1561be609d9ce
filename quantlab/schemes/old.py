"""Scheme: what is quantized and how, a value whose name is built from its numbers and parses back.

A name is a row of parts, then after dashes the weight method and the transforms: `w4g64a8l6t`. A part is a
letter, its bits (2 to 8; 16 means untouched and is left out) and its granularity (left out: the first one):

    w   weights of linears        c output channel, t tensor, gN groups of N along the input
    a   inputs of linears         r token, t sequence, c channel of a sequence, gN groups within a token
    l   attention logits          t tensor, h head, r query row; always named
    p   attention probabilities   as l
    e   effective maps            as l: A1 - lambda A2, where attention joins its maps before the values
    d   lambda of each token      r token (its heads), t sequence; diff_v2's
    x   outputs of decoder layers as a: the residual stream after each layer
    q k v kv                      outputs of projections, cache: known, and refused by this version

Then `z` for asymmetric (a zero point) and `s` for static. The baseline is `w16`. A tensor of logits is all
heads and maps of one layer and one sequence, never a batch. Case, order and extra dashes parse (`W4A16-g128`,
`A8-W8`); the canonical name is what is printed, recorded and compared.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import gcd
from typing import Literal, Self, get_args

from quantlab.errors import SchemeError, nearest

__all__ = ["SCHEMES", "Granularity", "Scheme", "TensorSpec", "check_shapes"]

Granularity = Literal["tensor", "channel", "group", "row", "head"]

SCHEMES: dict[str, str] = {
    "w16": "the checkpoint as it is: the baseline of every comparison",
    "w8": "weights 8 bits, one scale per output channel; activations untouched",
    "w6": "weights 6 bits, one scale per output channel",
    "w4": "weights 4 bits, one scale per output channel",
    "w4g128": "weights 4 bits, one scale per 128 inputs",
    "w4g64": "weights 4 bits, one scale per 64 inputs",
    "w4g32z": "weights 4 bits, scale and zero point per 32 inputs (the grid of GGUF's Q4_1)",
    "w3g64": "weights 3 bits, one scale per 64 inputs",
    "w2g32": "weights 2 bits, one scale per 32 inputs",
    "w8a8": "weights and inputs of linears 8 bits, per channel and per token, as integer products",
    "w6a6": "weights and inputs of linears 6 bits, per channel and per token, as integer products",
    "w4a8": "weights 4 bits per channel, inputs of linears 8 bits per token, as integer products",
    "w4a4": "weights and inputs of linears 4 bits, per channel and per token, as integer products",
    "w8a8t": "inputs of linears share one scale per sequence instead of one per token",
    "a8": "inputs of linears 8 bits per token; weights untouched",
    "l8t": "only attention logits, 8 bits, one scale per layer and sequence: the paper's protocol",
    "l6t": "only attention logits, 6 bits, one scale per layer and sequence: the paper's protocol",
    "l4t": "only attention logits, 4 bits, one scale per layer and sequence: the paper's protocol",
    "l4h": "only attention logits, 4 bits, one scale per head and sequence",
    "l4r": "only attention logits, 4 bits, one scale per head and query",
    "p8t": "only attention probabilities, 8 bits, one scale per layer and sequence",
    "x8": "only the outputs of decoder layers (hidden states), 8 bits per token",
    "d8": "only the lambda of each token (diff_v2), 8 bits",
    "e8t": "only the effective maps A1 - lambda A2 of differential attention, 8 bits",
    "w4g64a8l6t": "weights, activations and attention logits together",
}
"""Canonical names of common schemes, with one line each; any other name of the grammar is as good."""

_LETTERS: dict[str, Granularity] = {"t": "tensor", "c": "channel", "g": "group", "r": "row", "h": "head"}
_LETTER_OF = {granularity: letter for letter, granularity in _LETTERS.items()}


@dataclass(frozen=True)
class _Place:
    """What one letter of a name quantizes, and the granularities that mean something there, default first."""

    field: str
    what: str
    granularities: tuple[Granularity, ...]
    always_named: bool = False


_PLACES = {
    "w": _Place("weights", "weights", ("channel", "tensor", "group")),
    "a": _Place("activations", "inputs of linears", ("row", "tensor", "channel", "group")),
    "l": _Place("logits", "attention logits", ("tensor", "head", "row"), always_named=True),
    "p": _Place("probs", "attention probabilities", ("tensor", "head", "row"), always_named=True),
    "e": _Place("effective", "effective attention maps", ("tensor", "head", "row"), always_named=True),
    "d": _Place("lambdas", "lambda of each token", ("row", "tensor")),
    "x": _Place("hidden", "outputs of decoder layers", ("row", "tensor", "channel", "group")),
}
_PARTS_TO_COME = {
    "q": "outputs of the query projection",
    "k": "outputs of the key projection",
    "v": "outputs of the value projection",
    "kv": "the key-value cache",
}
_METHODS_TO_COME = ("gptq", "awq", "hqq", "spqr", "quip", "aqlm")
_TRANSFORMS_TO_COME = ("smooth", "rotate", "fold", "clip")
_FORMATS_TO_COME = (
    *("q8_0", "q6_k", "q5_k", "q4_k", "q3_k", "q2_k", "q5_0", "q5_1", "q4_0", "q4_1"),
    *("nf4", "fp4", "mxfp4", "mxfp6", "mxfp8", "nvfp4", "fp8"),
)
# No number of a scheme needs more digits; int() refuses thousands of them.
_GROUP = "g[0-9]{1,6}"
_PART = re.compile(rf"(kv|[waqkvlpedx])([0-9]{{1,3}})((?:{_GROUP}|[tcrhzs])*)")
_MODIFIER = re.compile(rf"{_GROUP}|[tcrhzs]")


@dataclass(frozen=True)
class TensorSpec:
    """How one kind of tensor is quantized: a uniform grid of 2^bits codes, one scale per `granularity`."""

    bits: int
    """Bits that a value carries, 2..8."""
    granularity: Granularity
    """What shares a scale; the table of the module says what each word means for each kind of tensor."""
    group_size: int | None = None
    """Neighbours along the input that share a scale; given exactly when granularity is "group"."""
    symmetric: bool = True
    """True: scale = absmax / (2^(bits-1) - 1). False: scale and zero point from min and max."""
    static: bool = False
    """Scales from calibration data instead of from the values themselves."""

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise SchemeError(f"bits must be 2 to 8, or 16 for untouched: found {self.bits}.")
        if self.granularity not in get_args(Granularity):
            raise SchemeError(
                f"granularity must be one of {', '.join(_LETTER_OF)}: found {self.granularity!r}."
            )
        if (self.granularity == "group") != (self.group_size is not None):
            raise SchemeError(
                f"group_size goes with granularity group: found {self.granularity}, {self.group_size}."
            )
        if self.group_size is not None and self.group_size < 2:
            raise SchemeError(f"group_size must be at least 2: found {self.group_size}.")

    @property
    def modifiers(self) -> str:
        """Granularity, zero point and static as letters of a name: `g64z`."""
        size = "" if self.group_size is None else str(self.group_size)
        return (
            f"{_LETTER_OF[self.granularity]}{size}{'' if self.symmetric else 'z'}{'s' if self.static else ''}"
        )


@dataclass(frozen=True)
class Scheme:
    """What is quantized and how; None leaves a kind of tensor at 16 bits. A Scheme that exists can be run."""

    weights: TensorSpec | None = None
    """Weights of the decoder's linears."""
    activations: TensorSpec | None = None
    """Inputs of the decoder's linears."""
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
    """How weight codes are chosen: round to nearest."""
    transforms: tuple[str, ...] = ()
    """Function-preserving changes made before quantization."""

    def __post_init__(self) -> None:
        for letter, place in _PLACES.items():
            spec: TensorSpec | None = getattr(self, place.field)
            if spec is not None:
                _check_place(letter, place, spec)
        if self.method != "rtn":
            raise SchemeError(f"weight method {self.method!r} is not available in this version: use rtn.")
        if self.transforms:
            raise SchemeError(
                f"transform {self.transforms[0]!r} is not available in this version: leave it out."
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """The scheme that a name says, canonical or not.

        Raises:
            SchemeError: unknown text (the nearest known name is given), bits out of range, a granularity that
                means nothing there, or a part of the grammar that this version does not offer.
        """
        name = text.strip().lower()
        if name in _FORMATS_TO_COME:
            raise SchemeError(
                f"format {name!r} is not available as a scheme in this version: use w4g32 or its like."
            )
        parts: dict[str, tuple[int, list[str]]] = {}
        loose: list[str] = []
        for segment in filter(None, name.split("-")):
            if not _read_parts(segment, parts, text):
                loose.append(segment)
        method, transforms = _read_words(loose, parts, text)
        if not parts:
            raise _unknown(text, text)
        specs = {_PLACES[letter].field: _build_spec(letter, *part, text) for letter, part in parts.items()}
        return cls(**specs, method=method, transforms=transforms)

    @property
    def name(self) -> str:
        """The canonical name; `Scheme.parse(scheme.name) == scheme`."""
        return "".join(_part_name(place, letter, self) for letter, place in _PLACES.items()) or "w16"

    @property
    def is_baseline(self) -> bool:
        """Whether nothing is quantized."""
        return self == Scheme()

    @property
    def sites(self) -> dict[str, TensorSpec]:
        """What is quantized inside attention, by the name of its site."""
        specs = {"attn_logits": self.logits, "attn_probs": self.probs, "attn_effective": self.effective}
        return {name: spec for name, spec in specs.items() if spec is not None}

    @property
    def _values(self) -> tuple[TensorSpec | None, ...]:
        """What is quantized of tensors [.., tokens, channels]."""
        return self.activations, self.lambdas, self.hidden

    @property
    def rounds_values(self) -> bool:
        """Whether values that pass through the model are rounded to codes, and not weights alone.

        A value near the middle of two codes then turns a difference in its last place into a whole step, and layers
        of steps into a score that differs by as much as the scheme itself costs a document. So such a scheme is
        scored in one fixed layout: a row holds one document, whatever the batch size.
        """
        return bool(self.sites) or any(spec is not None for spec in self._values)

    @property
    def spans_sequence(self) -> bool:
        """Whether a dynamic scale spans tokens; then every context is scored with every ending by itself."""
        tokens = {spec.granularity for spec in self._values if spec is not None} & {"tensor", "channel"}
        rows = {spec.granularity for spec in self.sites.values()} & {"tensor", "head"}
        return bool(tokens or rows)


def check_shapes(scheme: Scheme, linears: Mapping[str, tuple[int, int]], skip: Sequence[str] = ()) -> None:
    """Refuse group sizes that do not divide a linear's inputs, from names and shapes alone.

    Args:
        linears: name -> (out_features, in_features) of every linear that the scheme would quantize.
        skip: dotted patterns of linears that stay at 16 bits.

    Raises:
        SchemeError: names the first linear that does not fit and the group size that would.
    """
    sizes = [spec.group_size for spec in (scheme.weights, scheme.activations) if spec and spec.group_size]
    for name, (_, in_features) in linears.items():
        if any(fnmatchcase(name, pattern) for pattern in skip):
            continue
        for size in sizes:
            if in_features % size:
                raise _does_not_divide(name, in_features, size)


def _does_not_divide(name: str, in_features: int, size: int) -> SchemeError:
    fits = gcd(in_features, size)
    instead = f"group_size={fits}" if fits > 1 else "one scale per channel"
    return SchemeError(
        f"group_size must divide in_features: {name} has in_features={in_features}, group_size={size}. "
        f'Use {instead}, or add "*.{name.rpartition(".")[2]}" to skip.'
    )


def _part_name(place: _Place, letter: str, scheme: Scheme) -> str:
    spec: TensorSpec | None = getattr(scheme, place.field)
    if spec is None:
        return ""
    modifiers = spec.modifiers
    if spec.granularity == place.granularities[0] and not place.always_named:
        modifiers = modifiers[1:]
    return f"{letter}{spec.bits}{modifiers}"


def _check_place(letter: str, place: _Place, spec: TensorSpec) -> None:
    if spec.granularity not in place.granularities:
        known = ", ".join(f"{_LETTER_OF[g]} ({g})" for g in place.granularities)
        raise SchemeError(
            f"{place.what} ({letter!r}) take a scale per {known}: found {_LETTER_OF[spec.granularity]} "
            f"({spec.granularity})."
        )
    if spec.static and letter == "w":
        raise SchemeError("weights are always static: leave the 's' out.")
    if spec.static:
        raise SchemeError(
            f"static scales of {place.what} are not available in this version: leave the 's' out."
        )


def _read_parts(segment: str, parts: dict[str, tuple[int, list[str]]], text: str) -> bool:
    """Add the parts of a segment such as `w4g64a8`; False when the segment is not made of parts."""
    if not re.fullmatch(f"(?:{_PART.pattern})+", segment):
        return False
    for letter, bits, modifiers in _PART.findall(segment):
        if letter in _PARTS_TO_COME:
            what = f"{_PARTS_TO_COME[letter]} ({letter!r} in {text!r})"
            raise SchemeError(
                f"quantizing {what} is not available in this version: w, a, l, p, e, d and x are."
            )
        if letter in parts:
            raise SchemeError(f"scheme {text!r} names {letter!r} twice: each letter goes in once.")
        parts[letter] = int(bits), _MODIFIER.findall(modifiers)
    return True


def _read_words(
    loose: Sequence[str], parts: dict[str, tuple[int, list[str]]], text: str
) -> tuple[str, tuple[str, ...]]:
    """Method and transforms among segments that are no parts; a loose `g128` goes to the weights."""
    method, transforms = "rtn", []
    for word in loose:
        if re.fullmatch(_GROUP, word):
            _attach_group(word, parts, text)
        elif word in _METHODS_TO_COME:
            method = word
        elif word in _TRANSFORMS_TO_COME:
            transforms.append(word)
        elif word in _FORMATS_TO_COME:
            raise SchemeError(
                f"format {word!r} is not available as a scheme in this version: found in {text!r}."
            )
        elif word != "rtn":
            raise _unknown(word, text)
    return method, tuple(transforms)


def _attach_group(word: str, parts: dict[str, tuple[int, list[str]]], text: str) -> None:
    quantized = [letter for letter, (bits, _) in parts.items() if bits != 16]
    if quantized != ["w"]:
        raise SchemeError(
            f"{word!r} in {text!r} must follow the part it belongs to: write it after the bits (w4{word}a8)."
        )
    parts["w"][1].append(word)


def _build_spec(letter: str, bits: int, modifiers: Sequence[str], text: str) -> TensorSpec | None:
    """The spec of one part; None at 16 bits."""
    grains = [modifier for modifier in modifiers if modifier[0] in _LETTERS]
    if len(grains) > 1 or len(set(modifiers)) < len(modifiers):
        raise SchemeError(f"{letter}{bits} in {text!r} takes one granularity: found {''.join(modifiers)!r}.")
    if bits == 16:
        if modifiers:
            raise SchemeError(
                f"{letter}16 in {text!r} stays untouched, so it takes no granularity, zero point or static scale: "
                f"leave out {''.join(modifiers)!r}, or ask for 2 to 8 bits."
            )
        return None
    if not 2 <= bits <= 8:
        raise SchemeError(f"bits must be 2 to 8, or 16 for untouched: {text!r} asks for {letter}{bits}.")
    granularity = _LETTERS[grains[0][0]] if grains else _PLACES[letter].granularities[0]
    size = int(grains[0][1:]) if granularity == "group" else None
    return TensorSpec(bits, granularity, size, symmetric="z" not in modifiers, static="s" in modifiers)


def _unknown(word: str, text: str) -> SchemeError:
    whole = word == text
    known = (*SCHEMES, *_FORMATS_TO_COME) if whole else ("rtn", *_METHODS_TO_COME, *_TRANSFORMS_TO_COME)
    found = f"unknown scheme {_cut(text)!r}" if whole else f"unknown {_cut(word)!r} in scheme {_cut(text)!r}"
    grammar = "a name is made of w, a, l, p, e, d, x with bits and granularity: w4g64a8l6t (`quantlab list schemes`)"
    return SchemeError(f"{found}: {grammar}.{nearest(word.lower(), known)}")


def _cut(text: str) -> str:
    """The text as a message shows it."""
    return text if len(text) <= 40 else f"{text[:40]}..."
