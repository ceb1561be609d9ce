"""Names of schemes, read: parts such as `w4g64a8l6t`, then after dashes formats, the method and the transforms.

A part is a letter (`quantlab.schemes.places`), its bits (2 to 8; 16 means untouched and is left out) and its
granularity (left out: the first one), then `z` for asymmetric (a zero point), `s` for static, `m1` or `m2` for one map
of differential attention alone and `uN` for a window of unquantized keys. Case, order and extra dashes parse
(`W4A16-g128`, `A8-W8`); the canonical name is what is printed, recorded and compared.
"""

import re
from collections.abc import Sequence
from typing import Any

from quantlab.errors import SchemeError, nearest
from quantlab.schemes.catalogue import FORMATS_TO_COME, METHODS, MIXED, SCHEMES, TRANSFORMS, WEIGHT_FORMATS
from quantlab.schemes.places import PLACES
from quantlab.schemes.spec import LETTERS, TensorSpec

__all__ = ["read_name"]

# No number of a scheme needs more digits; int() refuses thousands of them.
_GROUP = "g[0-9]{1,6}"
_WORDS = rf"{_GROUP}|u[0-9]{{1,6}}|m[12]|[tmcrhzs]"
_PART = re.compile(rf"(kv|[waqkvlpedx])([0-9]{{1,3}})((?:{_WORDS})*)")
_MODIFIER = re.compile(_WORDS)

_Parts = dict[str, tuple[int, list[str]]]
"""Letter -> bits and modifiers."""


def read_name(text: str) -> dict[str, Any]:
    """The fields of the scheme that a name says.

    Raises:
        SchemeError: unknown text (the nearest known name is given), bits out of range, or a word that is not known.
    """
    parts: _Parts = {}
    loose: list[str] = []
    for segment in filter(None, text.strip().lower().split("-")):
        if not _read_parts(segment, parts, text):
            loose.append(segment)
    fields = _read_words(loose, parts, text)
    if not parts and not fields:
        raise _unknown(text, text)
    specs = {PLACES[letter].field: _build_spec(letter, *part, text) for letter, part in parts.items()}
    return specs | fields


def _read_parts(segment: str, parts: _Parts, text: str) -> bool:
    """Add the parts of a segment such as `w4g64a8`; False when the segment is not made of parts."""
    if not re.fullmatch(f"(?:{_PART.pattern})+", segment):
        return False
    for letter, bits, modifiers in _PART.findall(segment):
        if letter in parts:
            raise SchemeError(f"scheme {text!r} names {letter!r} twice: each letter goes in once.")
        parts[letter] = int(bits), _MODIFIER.findall(modifiers)
    return True


def _read_words(loose: Sequence[str], parts: _Parts, text: str) -> dict[str, Any]:
    """Format, method and transforms among segments that are no parts; a loose `g128` goes to the weights."""
    fields: dict[str, Any] = {}
    transforms = []
    for word in loose:
        if re.fullmatch(_GROUP, word):
            _attach_group(word, parts, text)
        elif word in WEIGHT_FORMATS:
            _once("weights", word, "w" in parts or "weights" in fields, text)
            fields["weights"] = WEIGHT_FORMATS[word]
        elif word in METHODS:
            _once("a weight method", word, "method" in fields, text)
            fields["method"] = word
        elif word in TRANSFORMS:
            transforms.append(word)
        elif word == MIXED:
            fields["mixed"] = True
        elif word in FORMATS_TO_COME:
            raise SchemeError(
                f"format {word!r} is not available as a scheme in this version: found in {_cut(text)!r}. Use w4g32 "
                "or its like."
            )
        else:
            raise _unknown(word, text) if parts or len(loose) > 1 else _unknown(text, text)
    if transforms:
        fields["transforms"] = tuple(name for name in TRANSFORMS if name in transforms)
    return fields


def _once(what: str, word: str, taken: bool, text: str) -> None:
    if taken:
        raise SchemeError(f"scheme {_cut(text)!r} names {what} twice: {word!r} cannot be added.")


def _attach_group(word: str, parts: _Parts, text: str) -> None:
    quantized = [letter for letter, (bits, _) in parts.items() if bits != 16]
    if quantized != ["w"]:
        raise SchemeError(
            f"{word!r} in {text!r} must follow the part it belongs to: write it after the bits (w4{word}a8)."
        )
    parts["w"][1].append(word)


def _build_spec(letter: str, bits: int, modifiers: Sequence[str], text: str) -> TensorSpec | None:
    """The spec of one part; None at 16 bits."""
    numbers = {kind: [m for m in modifiers if m[0] == kind and m != kind] for kind in "mu"}
    grains = [m for m in modifiers if m[0] in LETTERS and m not in numbers["m"]]
    if len(grains) > 1 or len(set(modifiers)) < len(modifiers) or any(len(m) > 1 for m in numbers.values()):
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
    granularity = LETTERS[grains[0][0]] if grains else PLACES[letter].granularities[0]
    map_, window = (int(found[0][1:]) if found else None for found in numbers.values())
    return TensorSpec(
        bits,
        granularity,
        int(grains[0][1:]) if granularity == "group" else None,
        symmetric="z" not in modifiers,
        static="s" in modifiers,
        map=map_,  # type: ignore[arg-type]
        window=window,
    )


def _unknown(word: str, text: str) -> SchemeError:
    whole = word == text
    words = (*METHODS, *TRANSFORMS, MIXED, *WEIGHT_FORMATS)
    known = (*SCHEMES, *WEIGHT_FORMATS) if whole else words
    found = f"unknown scheme {_cut(text)!r}" if whole else f"unknown {_cut(word)!r} in scheme {_cut(text)!r}"
    grammar = (
        f"a name is made of {', '.join(PLACES)} with bits and granularity, then a method and transforms: "
        "w4g64a8l6t, w4g64-gptq (`quantlab list schemes`)"
    )
    return SchemeError(f"{found}: {grammar}.{nearest(word.lower(), known)}")


def _cut(text: str) -> str:
    """The text as a message shows it."""
    return text if len(text) <= 40 else f"{text[:40]}..."
