"""A tokenizer as the keys `tokenizer.*` of a GGUF file.

Of a GGUF source they are copied byte for byte. Of a Hugging Face tokenizer they are made from its tokenizer.json:

    tokenizer.ggml.model              "gpt2": BPE over bytes; "llama": BPE over characters, bytes for the unknown ones
    tokenizer.ggml.pre                of "gpt2": the name by which llama.cpp knows how text is cut before BPE
    tokenizer.ggml.tokens             strings; rows of the embedding without a token are [PAD7], of type 5
    tokenizer.ggml.token_type         1 normal, 2 unknown, 3 control, 4 added by users, 5 unused, 6 a byte
    tokenizer.ggml.merges             of "gpt2": "left right", the first one first
    tokenizer.ggml.scores             of "llama": the higher, the sooner a token is merged
    tokenizer.ggml.bos_token_id ...   bos, eos, unknown, padding, where there are any
    tokenizer.ggml.add_bos_token      and add_eos_token: what the tokenizer does by itself
    tokenizer.chat_template           Jinja, as text; it is never run

What llama.cpp would cut or merge otherwise is refused: another text would reach the model.
Source: llama.cpp's converter for the keys, its `llama-vocab.cpp` for what each name of `pre` does.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from quantlab.errors import SchemeError
from quantlab.export.gguf_file import Value, key_bytes
from quantlab.inspection.checkpoint import CheckpointInfo
from quantlab.inspection.gguf_header import read_gguf
from quantlab.inspection.gguf_names import TOKEN_IDS
from quantlab.inspection.gguf_pretokenizers import pre_name, space_prefix

__all__ = ["tokenizer_keys"]

_NORMAL, _UNKNOWN, _CONTROL, _ADDED, _UNUSED, _BYTE = range(1, 7)


def tokenizer_keys(tokenizer: PreTrainedTokenizerBase, info: CheckpointInfo, num_tokens: int) -> list[bytes]:
    """The keys, each with its value, as a file holds them.

    Args:
        num_tokens: rows of the embedding, all of which need a token.

    Raises:
        SchemeError: llama.cpp has nothing that cuts and merges text as this tokenizer does.
    """
    if info.kind == "gguf":
        places = {key: at for key, at in read_gguf(info.path).places.items() if key.startswith("tokenizer.")}
        with info.path.open("rb") as file:
            return [_read(file, *at) for at in places.values()]
    keys = _of_json(tokenizer, num_tokens) | _special(tokenizer)
    if isinstance(template := tokenizer.chat_template, dict):
        template = template.get("default")
    return [
        *(key_bytes(f"tokenizer.ggml.{key}", value) for key, value in keys.items()),
        *([key_bytes("tokenizer.chat_template", template)] if template else []),
    ]


def _read(file: Any, begin: int, end: int) -> bytes:
    file.seek(begin)
    return bytes(file.read(end - begin))


def _of_json(tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> dict[str, Value]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise refused(f"{type(tokenizer).__name__} has no tokenizer.json")
    spec = json.loads(backend.to_str())
    model = spec["model"]
    if model["type"] != "BPE":
        raise refused(f"its model is {model['type']}, not BPE")
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise refused("its BPE has dropout, prefixes or suffixes")
    tokens, types = _tokens(spec, num_tokens)
    own = _characters(spec, tokens) if model.get("byte_fallback") else _bytes(spec)
    first = {"model": own.pop("model"), **({"pre": own.pop("pre")} if "pre" in own else {})}
    return first | {"tokens": tokens, "token_type": np.array(types, np.int32)} | own


def _tokens(spec: Mapping[str, Any], num_tokens: int) -> tuple[list[str], list[int]]:
    """Texts and types of all rows."""
    model = spec["model"]
    vocab, added = dict(model["vocab"]), {token["content"]: token for token in spec.get("added_tokens") or ()}
    vocab |= {text: token["id"] for text, token in added.items()}
    if max(vocab.values()) >= num_tokens:
        raise refused(f"it has the id {max(vocab.values())}, and the embedding {num_tokens} rows")
    tokens, types = [f"[PAD{row}]" for row in range(num_tokens)], [_UNUSED] * num_tokens
    for text, row in vocab.items():
        tokens[row], types[row] = text, _type(text, added.get(text), model)
    return tokens, types


def _type(text: str, added: Mapping[str, Any] | None, model: Mapping[str, Any]) -> int:
    if model.get("byte_fallback"):
        if text == model.get("unk_token"):
            return _UNKNOWN
        if text in _BYTE_TOKENS:
            return _BYTE
    if added is None:
        return _NORMAL
    return _CONTROL if added["special"] else _ADDED


_BYTE_TOKENS = {f"<0x{byte:02X}>": byte for byte in range(256)}


def _bytes(spec: Mapping[str, Any]) -> dict[str, Value]:
    """BPE over bytes."""
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in spec["model"]["merges"]]
    pre = pre_name(spec)
    if pre is None:
        raise refused("it cuts text before BPE in a way that llama.cpp has no name for that we know")
    return {"model": "gpt2", "pre": pre, "merges": merges}


def _characters(spec: Mapping[str, Any], tokens: list[str]) -> dict[str, Value]:
    """BPE over characters, as SentencePiece has it: the order of merges becomes one of the tokens that they make."""
    prefix = space_prefix(spec)
    if prefix is None:
        raise refused("it prepares text for SentencePiece's BPE in a way that llama.cpp does not")
    vocab = spec["model"]["vocab"]
    if missing := _BYTE_TOKENS.keys() - vocab.keys():
        raise refused(f"it falls back to bytes and lacks {len(missing)} of their tokens")
    pairs = [
        tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in spec["model"]["merges"]
    ]
    ranks = _ranks(pairs)
    if ranks is None or not set(_splits(vocab)) <= set(pairs):
        raise refused("its merges are not those of SentencePiece, which go by the token that they make")
    scores = np.array([-float(ranks.get(text, len(ranks))) for text in tokens], np.float32)
    return {"model": "llama", "scores": scores, "add_space_prefix": prefix}


def _ranks(pairs: list[tuple[str, ...]]) -> dict[str, int] | None:
    """Place of each token among those that merges make; None where merges of one are apart."""
    ranks: dict[str, int] = {}
    last = None
    for pair in pairs:
        text = "".join(pair)
        if text != last and text in ranks:
            return None
        ranks.setdefault(text, len(ranks))
        last = text
    return ranks


def _splits(vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to make a token of the vocabulary of two others; llama.cpp takes them all."""
    return [
        (text[:at], text[at:])
        for text in vocab
        if text not in _BYTE_TOKENS
        for at in range(1, len(text))
        if text[:at] in vocab and text[at:] in vocab
    ]


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, Value]:
    keys: dict[str, Value] = {
        f"{key}_token_id": int(value)
        for key, name in TOKEN_IDS.items()
        if (value := getattr(tokenizer, name, None)) is not None
    }
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    bos, eos = ([getattr(tokenizer, name)] for name in ("bos_token_id", "eos_token_id"))
    for add_bos, add_eos in ((False, False), (True, False), (False, True), (True, True)):
        if whole == (bos if add_bos else []) + plain + (eos if add_eos else []):
            return keys | {"add_bos_token": add_bos, "add_eos_token": add_eos}
    raise refused("it puts more around a text than bos and eos")


def refused(reason: str) -> SchemeError:
    """The error for a tokenizer that a file cannot hold."""
    return SchemeError(
        f"a GGUF file must hold a tokenizer that llama.cpp runs to the same ids: this one cannot be, since {reason}. "
        "Use another format."
    )
