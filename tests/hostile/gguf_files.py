"""Bad GGUF files: counts, strings, arrays, alignment, places, and what the metadata says (B11, B12, B23, B25)."""

# ruff: noqa: E501  a case, a line

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.hostile.case import Case, Damage

TOOLS = ("gguf", "transformers-gguf")
GIGA = 1 << 30


def text(value: str | bytes) -> bytes:
    encoded = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(encoded)) + encoded


def key(name: str, kind: int, value: bytes) -> bytes:
    """One metadata entry; kinds: 4 uint32, 6 float, 7 bool, 8 string, 9 array."""
    return text(name) + struct.pack("<I", kind) + value


def array(name: str, kind: int, count: int, values: bytes = b"") -> bytes:
    return key(name, 9, struct.pack("<IQ", kind, count) + values)


def header(*parts: bytes, num_tensors: int = 0, num_keys: int | None = None, version: int = 3) -> bytes:
    count = len(parts) if num_keys is None else num_keys
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, count) + b"".join(parts)


LLAMA = key("general.architecture", 8, text("llama"))


def tensor(name: str = "a.weight", dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims) + struct.pack("<IQ", kind, offset)


def file(blob: bytes, size: int | None = None) -> Damage:
    """A GGUF file by hand, lengthened with zeros that take no room."""

    def damage(it: Path) -> Path:
        path = it / "bad.gguf"
        with path.open("wb") as out:
            out.write(blob)
            out.truncate(max(len(blob) + 64, size or 0))
        return path

    return damage


def exact(blob: bytes) -> Damage:
    """A GGUF file of these bytes and no more."""

    def damage(it: Path) -> Path:
        (it / "bad.gguf").write_bytes(blob)
        return it / "bad.gguf"

    return damage


def changed(old: bytes, new: bytes) -> Damage:
    """Replace bytes in the good file, once."""

    def damage(it: Path) -> None:
        blob = (it / "toy.gguf").read_bytes()
        assert old in blob and len(old) == len(new)
        (it / "toy.gguf").write_bytes(blob.replace(old, new, 1))

    return damage


def keyed(*entries: bytes) -> Damage:
    """More metadata in front of the good file's own; data offsets are relative and stay aligned."""

    def damage(it: Path) -> None:
        blob = (it / "toy.gguf").read_bytes()
        num_tensors, num_keys = struct.unpack_from("<QQ", blob, 8)
        parts = [*entries]
        missing = -(sum(map(len, parts)) + 13) % 32
        parts.append(key("x" * missing, 7, b"\1"))
        start = b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_keys + len(parts))
        (it / "toy.gguf").write_bytes(start + b"".join(parts) + blob[24:])

    return damage


def cut(keep: Callable[[bytes], bytes]) -> Damage:
    def damage(it: Path) -> None:
        (it / "toy.gguf").write_bytes(keep((it / "toy.gguf").read_bytes()))

    return damage


def _bad(name: str, damage: Damage, says: str, classes: str = "B11", **options: Any) -> Case:
    return Case(name, classes, damage, says, base="empty", tools=TOOLS, **options)


def _toy(name: str, damage: Damage, says: str, classes: str = "B11", **options: Any) -> Case:
    return Case(name, classes, damage, says, base="gguf", tools=TOOLS, **options)


U32 = struct.Struct("<I").pack


def size(name: str, old: int, new: int) -> Damage:
    """Another value of a uint32 key."""
    return changed(key(name, 4, U32(old)), key(name, 4, U32(new)))


HEADERS = [
    _bad("magic alone", exact(b"GGUF"), "truncated"),
    _bad("another magic", file(b"GGML" + bytes(40)), "must start with 'GGUF'"),
    _bad("version 1", file(header(version=1)), "version must be 2 or 3"),
    _bad("version 2^31", file(header(version=2**31)), "version must be 2 or 3"),
    _bad("big endian", file(header(version=3 << 24)), "version must be 2 or 3"),
    _bad("2^62 keys", file(header(num_keys=2**62)), "metadata keys follow"),
    _bad("2^64-1 keys", file(header(num_keys=2**64 - 1)), "metadata keys follow"),
    _bad("2^62 tensors", file(header(LLAMA, num_tensors=2**62)), "tensors follow"),
    _bad("the 49 bytes that hang gguf-py 0.19", exact(header(array("k" * 4, 0, 2**63, b"\0" * 1))[:49]), "elements of|follow"),
    _bad("a hundred million keys in a sparse file", file(header(LLAMA, num_keys=10**8), 2 * GIGA), "at most"),
    _bad("fifty million tensors in a sparse file", file(header(LLAMA, num_tensors=5 * 10**7), 2 * GIGA), "at most"),
    _bad("string of 2^62", file(header(struct.pack("<Q", 2**62), num_keys=1)), "bytes of a string"),
    _bad("string of 1 GB in a sparse file", file(header(key("k", 8, struct.pack("<Q", GIGA))), 2 * GIGA), "string"),
    _bad("key of 1 GB in a sparse file", file(header(struct.pack("<Q", GIGA), num_keys=1), 2 * GIGA), "name of"),
    _bad("key not UTF-8", file(header(text(b"\xff\xfe") + U32(7) + b"\1", num_keys=1)), "not UTF-8"),
    _bad("array of 2^63 numbers", file(header(array("k", 4, 2**63))), "elements of 'k' follow"),
    _bad("array of 2^63 strings", file(header(array("k", 8, 2**63))), "strings of 'k' follow"),
    _bad("array of a billion bytes in a sparse file", file(header(LLAMA, array("k", 0, 10**9)), 2 * GIGA), "at most"),
    _bad("array of a hundred million strings in a sparse file", file(header(LLAMA, array("k", 8, 10**8)), 2 * GIGA), "at most"),
    _bad("arrays of 900,000 strings, thirty times", file(header(LLAMA, *(array(f"k{i}", 8, 900_000, bytes(7_200_000))
         for i in range(12)))), "at most"),
    _bad("array of arrays", file(header(array("k", 9, 1))), "elements of type 9"),
    _bad("arrays nested ten thousand deep", file(header(key("k", 9, struct.pack("<IQ", 9, 1) * 10_000))), "elements of type 9"),
    _bad("array of no known type", file(header(array("k", 77, 1))), "elements of type 77"),
    _bad("array cut", file(header(array("k", 8, 2, struct.pack("<Q", 2**40)))), "ends within the array"),
    _bad("value of no known type", file(header(key("k", 99, b""))), "unknown type 99"),
    _bad("key twice", file(header(LLAMA, LLAMA)), "twice"),
    _bad("architecture a number", file(header(key("general.architecture", 4, U32(1)))), "names no general.architecture"),
    _bad("no architecture", file(header()), "names no general.architecture"),
    _bad("alignment 0", file(header(LLAMA, key("general.alignment", 4, U32(0)))), "not a power of two"),
    _bad("alignment 2^31", file(header(LLAMA, key("general.alignment", 4, U32(2**31)))), "not a power of two"),
    _bad("alignment 24", file(header(LLAMA, key("general.alignment", 4, U32(24)))), "not a power of two"),
    _bad("alignment as text", file(header(LLAMA, key("general.alignment", 8, text("32")))), "not a power of two"),
    _bad("alignment -32", file(header(LLAMA, key("general.alignment", 5, struct.pack("<i", -32)))), "not a power of two"),
    _bad("five dimensions", file(header(LLAMA, tensor(dims=(1,) * 5), num_tensors=1, num_keys=1)), "5 dimensions"),
    _bad("2^32-1 dimensions", file(header(LLAMA, text("a") + U32(2**32 - 1), num_tensors=1, num_keys=1)), "dimensions"),
    _bad("no dimensions", file(header(LLAMA, tensor(dims=()), num_tensors=1, num_keys=1)), "0 dimensions"),
    _bad("ggml type 77", file(header(LLAMA, tensor(kind=77), num_tensors=1, num_keys=1)), "ggml type 77"),
    _bad("ggml type 2^32-1", file(header(LLAMA, tensor(kind=2**32 - 1), num_tensors=1, num_keys=1)), "ggml type"),
    _bad("size that wraps", file(header(LLAMA, tensor(dims=(2**32, 2**32)), num_tensors=1, num_keys=1)), "ends within the tensor"),
    _bad("size that wraps to 4", file(header(LLAMA, tensor(dims=(2**62 + 1, 4)), num_tensors=1, num_keys=1)), "ends within the tensor"),
    _bad("rows of no whole block", file(header(LLAMA, tensor(dims=(31,), kind=2), num_tensors=1, num_keys=1)), "do not divide its rows"),
    _bad("offset past the end", file(header(LLAMA, tensor(offset=2**40), num_tensors=1, num_keys=1)), "ends within the tensor"),
    _bad("offset 2^64-32", file(header(LLAMA, tensor(offset=2**64 - 32), num_tensors=1, num_keys=1)), "ends within the tensor"),
    _bad("offset not aligned", file(header(LLAMA, tensor(dims=(1,), offset=4), num_tensors=1, num_keys=1)), "not aligned"),
    _bad("tensors overlap", file(header(LLAMA, tensor("a.weight", (16,)), tensor("b.weight", (1,), offset=32),
         num_tensors=2, num_keys=1) + bytes(128)), "not aligned or not free"),
    _bad("tensor twice", file(header(LLAMA, tensor(dims=(1,)), tensor(dims=(1,), offset=32), num_tensors=2, num_keys=1) + bytes(128)), "twice"),
    _bad("tensor name with ../", file(header(LLAMA, tensor("../../x"), num_tensors=1, num_keys=1) + bytes(256)),
         "no tokenizer|must have a place"),
]  # fmt: skip

TOKENS = "tokenizer.ggml.tokens"

CONTENTS = [
    _toy("cut in the middle", cut(lambda blob: blob[: len(blob) // 2]), "truncated", "B11 B5"),
    _toy("cut by one byte", cut(lambda blob: blob[:-1]), "truncated", "B11 B5"),
    _toy("cut within the metadata", cut(lambda blob: blob[:900]), "truncated|follow", "B11 B5"),
    _toy("architecture unknown", changed(b"llama", b"lhama"), "GGUF architecture must be one of", "B11 B14"),
    _toy("architecture with an escape", changed(text("general.architecture") + U32(8) + text("llama"),
         text("general.architecture") + U32(8) + text("\x1b[2J!")), "GGUF architecture must be one of", "B11 B20"),
    _toy("layers 2^32-1", size("llama.block_count", 2, 2**32 - 1), "num_hidden_layers must be", "B9 B11"),
    _toy("layers 9,999", size("llama.block_count", 2, 9999), "layer 2 is missing", "B9 B11"),
    _toy("heads 0", size("llama.attention.head_count", 4, 0), "num_attention_heads must be", "B9 B11"),
    _toy("heads 3", size("llama.attention.head_count", 4, 3), "must", "B9 B11"),
    _toy("width of another model", size("llama.feed_forward_length", 96, 128), "tensors must agree", "B11 B12"),
    _toy("layers as a float", changed(key("llama.block_count", 4, U32(2)), key("llama.block_count", 6, struct.pack("<f", 2.0))),
         "must be a whole number", "B9 B11"),
    _toy("rope base NaN", changed(key("llama.rope.freq_base", 6, struct.pack("<f", 10000.0)),
         key("llama.rope.freq_base", 6, struct.pack("<f", float("nan")))), "finite", "B11 B25"),
    _toy("rope base 0", changed(key("llama.rope.freq_base", 6, struct.pack("<f", 10000.0)),
         key("llama.rope.freq_base", 6, struct.pack("<f", 0.0))), "finite|must", "B11 B25", loads=True),
    _toy("epsilon Inf", changed(struct.pack("<f", 1e-6), struct.pack("<f", float("inf"))), "finite", "B11 B25"),
    _toy("tensor unknown", changed(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"), "must have a place in the model", "B11 B12"),
    _toy("tensor of layer 99", changed(b"blk.1.ffn_up.weight", b"blk.9.ffn_up.weight"), "no place|lacks", "B11 B12", loads=True),
    _toy("two tensors of one name", changed(b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight"), "twice", "B11 B12"),
    _toy("layer number with zeros", changed(b"blk.1.ffn_up.weight", b"blk.0.ffn_up.bias\0\0"), "must have a place|two tensors|twice", "B11 B12"),
    _toy("no tokens", changed(TOKENS.encode(), b"tokenizer.ggml.tokenz"), "must hold its tokenizer", "B11 B23"),
    _toy("tokenizer of no known model", changed(key("tokenizer.ggml.model", 8, text("gpt2")), key("tokenizer.ggml.model", 8, text("evil"))),
         "tokenizer", "B11 B23", loads=True),
    _toy("no merges", changed(b"tokenizer.ggml.merges", b"tokenizer.ggml.merged"), "cannot be loaded", "B11 B23", loads=True),
    _toy("bos id 2^32-1", size("tokenizer.ggml.bos_token_id", 0, 2**32 - 1), "cannot be loaded", "B11 B23", loads=True),
    _toy("NaN in a tensor", cut(lambda blob: blob[:-4] + struct.pack("<f", float("nan"))), "must be finite", "B11 B25", loads=True),
    _toy("Inf in a tensor", cut(lambda blob: blob[:-8] + struct.pack("<f", float("inf")) + blob[-4:]), "must be finite", "B11 B25", loads=True),
    _toy("good: 400,000 scores that no token has", keyed(array("tokenizer.ggml.scores", 6, 400_000, bytes(1_600_000))),
         "", "B11 B23", loads=True),
    _toy("nested array of the tokenizer", keyed(array("tokenizer.ggml.scores", 9, 2, array("", 9, 2)[12:])), "elements of type 9", "B11"),
    _toy("good: a template in the metadata that would run code", keyed(key("tokenizer.chat_template", 8, text("{{ ''.__class__.__mro__ }}"))), "", "B22", loads=True),
    _toy("good: as it was", lambda it: None, "", loads=True),
]  # fmt: skip

CASES = [*HEADERS, *CONTENTS]
