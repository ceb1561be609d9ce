r"""How text is cut before BPE: llama.cpp's name for what a tokenizer.json says. Needs no torch.

llama.cpp knows a pre-tokenizer by a name that stands for a list of regular expressions. Each entry of the table is what
tokenizers.json of that kind hold, and was compared with what llama.cpp's expressions of that name do. Not the same are
numerals of `default` and other fallbacks, so what is not in the table has no name.

    piece        what tokenizer.json says
    regex        Split by it, each match a piece of its own
    DIGITS      Digits, each by itself
    GPT2        ByteLevel with its own expression (use_regex)

Source: llama.cpp's `llama-vocab.cpp`, the expressions of each LLAMA_VOCAB_PRE_TYPE.
"""

from collections.abc import Mapping
from typing import Any

__all__ = ["DIGITS", "GPT2", "PRE_NAMES", "pre_name", "space_prefix"]

GPT2 = "ByteLevel"
DIGITS = r"\p{N}"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK_3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
    "[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)

PRE_NAMES: Mapping[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((DIGITS, GPT2), False): "smollm",
    ((_WORDS % "{1,3}",), True): "llama-bpe",
    ((_WORDS % "{1,3}",), False): "dbrx",
    ((_WORDS % "",), False): "qwen2",
    (("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", DIGITS), False): "deepseek-coder",
    ((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK_3), False): "deepseek-v3",
}
"""(Pieces in their order, whether a word that is a token needs no merges) -> value of `tokenizer.ggml.pre`."""


def pre_name(spec: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for the pre-tokenizer of a tokenizer.json with BPE over bytes, or None."""
    # llama.cpp normalizes no text; NFC, which Qwen2's asks for, leaves most text as it is, and is let through.
    if (spec.get("normalizer") or {"type": "NFC"})["type"] != "NFC":
        return None
    pieces = [_piece(each) for each in _listed(spec.get("pre_tokenizer"), "pretokenizers")]
    if not pieces or None in pieces or pieces[-1] not in (GPT2, ""):
        return None
    return PRE_NAMES.get((tuple(filter(None, pieces)), bool(spec["model"].get("ignore_merges"))))


def space_prefix(spec: Mapping[str, Any]) -> bool | None:
    """Whether a space goes before a text, of BPE over characters; None where text is prepared in another way."""
    steps = [
        *_listed(spec.get("normalizer"), "normalizers"),
        *_listed(spec.get("pre_tokenizer"), "pretokenizers"),
    ]
    prefix = bool(steps) and steps[0] == {"type": "Prepend", "prepend": _SPACE}
    rest = steps[1:] if prefix else steps
    if len(rest) != 1:
        return None
    if rest[0] == {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}:
        return prefix
    if (
        rest[0].get("type") == "Metaspace"
        and rest[0]["replacement"] == _SPACE
        and not rest[0].get("split", True)
    ):
        return prefix or str(rest[0].get("prepend_scheme", "always")) != "never"
    return None


_SPACE = "▁"


def _listed(step: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """The steps of a sequence, or the one step."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [inner for each in step[key] for inner in _listed(each, key)]
    return [step]


def _piece(step: Mapping[str, Any]) -> str | None:
    """What the table calls a step; "" for bytes alone, None for what it has no word for."""
    if step["type"] == "ByteLevel" and not step.get("add_prefix_space", True):
        return GPT2 if step.get("use_regex", True) else ""
    if step["type"] == "Digits" and step.get("individual_digits"):
        return DIGITS
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        regex = step["pattern"].get("Regex")
        return None if regex in (None, GPT2, "") else str(regex)
    return None
