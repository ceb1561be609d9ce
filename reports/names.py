"""Texts from outside made safe to show, and scheme names read for what a figure or table needs of them.

Checkpoint names and token texts are data of strangers: line breaks, control, bidirectional and invisible characters
are shown as escapes, so that a text cannot break a line, reorder its neighbours or hide. HTML and Markdown escaping
comes on top of it, where the text is written.
"""

import re
import unicodedata
from dataclasses import dataclass

BASELINE = "w16"
"""Scheme of a checkpoint as it is."""

_UNSEEN = {"Cc", "Cf", "Co", "Cs", "Cn", "Zl", "Zp"}
_SHORT = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
_PART = re.compile(r"(kv|[a-z])(\d+)((?:g\d+|[tmcrhzs])*)")
_KINDS = {
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
_GRAINS = {
    "t": "per tensor",
    "m": "per map",
    "c": "per channel",
    "r": "per row",
    "h": "per head",
    "z": "zero point",
    "s": "static",
}
_FORMAT_BITS = {
    "nf4": 4, "fp4": 4, "nf4_dq": 4, "fp4_dq": 4, "fp8": 8, "fp8e5m2": 8, "mxfp4": 4, "mxfp6": 6, "mxfp6e3m2": 6,
    "nvfp4": 4, "llm_int8": 8, "q8_0": 8, "q6_k": 6, "q5_k": 5, "q5_0": 5, "q5_1": 5, "q4_k": 4, "q4_0": 4, "q4_1": 4,
    "q3_k": 3,
}  # fmt: skip
"""Formats of weights with an arithmetic of their own, and the bits of a code."""
_FORMAT_GRIDS = {"q8_0": "w8g32", "q5_0": "w5g32", "q5_1": "w5g32z", "q4_0": "w4g32", "q4_1": "w4g32z"}
"""Formats -> the uniform grid of their bits and groups."""
_LEFT_OUT = {"w": "per channel", "a": "per token", "d": "per token", "x": "per token"}


def visible(text: object, limit: int = 80) -> str:
    """The text on one line with nothing unseen in it, at most `limit` characters; a longer one ends in `…`."""
    raw = str(text)
    shown = "".join(_character(c) for c in raw[: limit + 1])
    return shown if len(shown) <= limit and len(raw) <= limit else shown[: limit - 1] + "…"


def token(text: object, limit: int = 40) -> str:
    """`visible`, with spaces at the ends as `␣`: a token that is a space should not look like none."""
    shown = visible(text, limit)
    bare = shown.strip(" ")
    left = len(shown) - len(shown.lstrip(" ")) if bare else len(shown)
    return "␣" * left + bare + "␣" * (len(shown) - left - len(bare))


def markdown(text: object) -> str:
    """The text, with every character that Markdown or inline HTML would act on escaped, and no link or mention in it.

    Viewers make links of bare addresses and mentions, whatever is escaped: a zero-width space breaks those.
    """
    escaped = re.sub(r"([\\`*_\[\]<>|~&$#!])", r"\\\1", str(text))
    return re.sub(
        r"(?i)(:(?=//)|(?<![a-z0-9])www(?=\.)|@|(?<![a-z0-9])(?:mailto|xmpp):)", r"\1&#8203;", escaped
    )


@dataclass(frozen=True)
class SchemeName:
    """What a scheme name says: which kinds of tensor carry how many bits."""

    parts: dict[str, tuple[int, str]]
    """letter -> (bits, modifiers such as `g64z`); empty for the baseline."""
    words: tuple[str, ...]
    """The weights' format, method and transforms, and whatever is not understood."""

    @property
    def bits(self) -> int:
        """The fewest bits that any quantized kind carries; 16 for the baseline."""
        return min((bits for bits, _ in self.parts.values()), default=16)

    @property
    def kinds(self) -> str:
        """The kinds of tensor that are quantized: `weights + activations`."""
        named = [_KINDS.get(letter, letter) for letter in self.parts]
        return " + ".join([*named, *([] if self.parts else self.words)]) or "nothing"

    @property
    def series(self) -> str:
        """`kinds`, with the bits of those that carry more than `bits`: w4a8 is `weights + activations at 8 bits`."""
        if len({bits for bits, _ in self.parts.values()}) < 2:
            return self.kinds
        named = [
            _KINDS.get(letter, letter) + (f" at {bits} bits" if bits > self.bits else "")
            for letter, (bits, _) in self.parts.items()
        ]
        return " + ".join(named)

    @property
    def detail(self) -> str:
        """Granularities and method: `groups of 64, zero point`; names the kind where there are several."""
        grains = [
            (letter, "" if modifiers in _FORMAT_BITS else _grain(letter, modifiers))
            for letter, (_, modifiers) in self.parts.items()
        ]
        texts = [
            f"{_KINDS.get(letter, letter)} {grain}" if grain and len(grains) > 1 else grain
            for letter, grain in grains
        ]
        return ", ".join([*filter(None, texts), *self.words])

    @property
    def weight_grid(self) -> str:
        """The weights' part of the name, such as `w4g32z`; empty when weights are untouched."""
        if "w" not in self.parts:
            return ""
        bits, modifiers = self.parts["w"]
        if modifiers in _FORMAT_BITS:
            return _FORMAT_GRIDS.get(modifiers, modifiers)
        return f"w{bits}{modifiers}"


def read_scheme(name: str) -> SchemeName:
    """Read a canonical scheme name; a name of another grammar becomes one word of its own."""
    first, *rest = name.split("-")
    if first in _FORMAT_BITS:
        parts = _parts(rest[0]) if rest else {}
        words = rest[1:] if parts else rest
        return SchemeName({"w": (_FORMAT_BITS[first], first)} | parts, (first, *words))
    parts = _parts(first)
    if not parts:
        return SchemeName({}, (name,))
    return SchemeName({k: v for k, v in parts.items() if v[0] < 16}, tuple(rest))


def _parts(text: str) -> dict[str, tuple[int, str]]:
    """letter -> (bits, modifiers) of a text such as `w4g64a8`; empty for another one."""
    if not re.fullmatch(f"(?:{_PART.pattern})+", text):
        return {}
    return {letter: (int(bits), modifiers) for letter, bits, modifiers in _PART.findall(text)}


def _grain(letter: str, modifiers: str) -> str:
    named = re.findall(r"g\d+|[tmcrhzs]", modifiers)
    if not any(m[0] in "gtmcrh" for m in named) and letter in _LEFT_OUT:
        named = [_LEFT_OUT[letter], *named]
    return ", ".join(f"groups of {m[1:]}" if re.fullmatch(r"g\d+", m) else _GRAINS.get(m, m) for m in named)


def _character(c: str) -> str:
    if unicodedata.category(c) not in _UNSEEN:
        return c
    return _SHORT.get(c) or (f"\\x{ord(c):02x}" if ord(c) < 0x100 else f"\\u{{{ord(c):x}}}")
