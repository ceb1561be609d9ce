"""Bad safetensors files: header, layout, dtypes, and what lies where a file should be (B4-B7, B19)."""

# ruff: noqa: E501  a case, a line

import json
import os
from pathlib import Path

from tests.hostile.case import (
    WEIGHTS,
    Case,
    both,
    entry,
    linked,
    moved_out,
    packed,
    reheaded,
    sparse,
    written,
)

TOOLS = ("transformers", "safetensors")


def _case(name: str, classes: str, blob: bytes, says: str) -> Case:
    return Case(name, classes, written(WEIGHTS, blob), says, tools=TOOLS)


def _length(value: int) -> bytes:
    return value.to_bytes(8, "little")


def _many_empty(count: int) -> bytes:
    """A header of `count` tensors of no elements."""
    one = '"dtype":"F32","shape":[0],"data_offsets":[0,0]'
    return packed(("{" + ",".join(f'"t{i}":{{{one}}}' for i in range(count)) + "}").encode(), b"")


def _last_twice(count: int) -> bytes:
    """A header whose last of many names is its first one again."""
    one = '"dtype":"F32","shape":[0],"data_offsets":[0,0]'
    names = [*range(count), 0]
    return packed(("{" + ",".join(f'"t{i}":{{{one}}}' for i in names) + "}").encode(), b"")


def _pipe(it: Path) -> None:
    (it / WEIGHTS).unlink()
    os.mkfifo(it / WEIGHTS)


def _directory(it: Path) -> None:
    (it / WEIGHTS).unlink()
    (it / WEIGHTS).mkdir()


def _truncated(keep: int | None, lost: int = 0) -> "Case":
    def damage(it: Path) -> None:
        blob = (it / WEIGHTS).read_bytes()
        (it / WEIGHTS).write_bytes(blob[:keep] if keep is not None else blob[: len(blob) - lost])

    what = f"to {keep} bytes" if keep is not None else f"by {lost}"
    return Case(f"cut {what}", "B5", damage, "it is truncated", tools=TOOLS)


def _longer(it: Path) -> None:
    with (it / WEIGHTS).open("ab") as file:
        file.write(bytes(5))


def _retyped(dtype: str) -> Case:
    """Every tensor claims another dtype of no known width, and keeps its place."""

    def change(header: dict) -> None:  # type: ignore[type-arg]
        for name, value in header.items():
            if name != "__metadata__":
                value["dtype"] = dtype

    return Case(
        f"dtype {dtype}", "B7", reheaded(change), f"the dtype '{dtype}', which is not one of", tools=TOOLS
    )


def _overlapping(header: dict) -> None:  # type: ignore[type-arg]
    first, second = sorted(
        (v for k, v in header.items() if k != "__metadata__"), key=lambda v: v["data_offsets"]
    )[:2]
    begin = second["data_offsets"][0] - 4
    width = second["data_offsets"][1] - second["data_offsets"][0]
    assert first
    second["data_offsets"] = [begin, begin + width]


def _holed(header: dict) -> bytes:  # type: ignore[type-arg]
    header.pop(max((k for k in header if k != "__metadata__"), key=lambda k: header[k]["data_offsets"]))
    return json.dumps(header).encode()


def _wide(header: dict) -> None:  # type: ignore[type-arg]
    name = max((k for k in header if k != "__metadata__"), key=lambda k: header[k]["data_offsets"])
    begin = header[name]["data_offsets"][0]
    header[name] |= {"shape": [2**30], "data_offsets": [begin, begin + 2**32]}


def _shaped(shape: list, offsets: list | None = None) -> bytes:  # type: ignore[type-arg]
    return packed({"a": entry(shape=shape, offsets=offsets or [0, 4])})


CASES = [
    _case("empty file", "B4", b"", "holds 0 bytes"),
    _case("seven bytes", "B4", bytes(7), "holds 7 bytes"),
    _case("length beyond the file", "B4", _length(99) + b"{}", "says its header has 99 bytes, but holds 10"),
    _case("length 2^63", "B4", _length(2**63) + b"{}", "are allowed"),
    _case("length 2^64-1", "B4", _length(2**64 - 1) + b"{}", "are allowed"),
    _case("length wraps with the eight", "B4", _length(2**64 - 8) + b"{}", "are allowed"),
    _case("header of no bytes", "B4", _length(0) + b"", "does not hold valid JSON"),
    _case("not UTF-8", "B4", packed(b'{"\xff": 1}'), "is not UTF-8 at byte 2"),
    _case("lone surrogate", "B4", packed(b'{"\\ud800": 1}'), "describes"),
    _case("UTF-16", "B4", packed('{"a": 1}'.encode("utf-16")), "not UTF-8|valid JSON"),
    _case("BOM", "B4 B17", packed(b"\xef\xbb\xbf{}"), "does not hold valid JSON"),
    _case("not JSON", "B4", packed(b"{,}"), "does not hold valid JSON"),
    _case("a list", "B4", packed(b"[]"), "must hold a JSON object"),
    _case("entry null", "B4", packed({"a": None}), "describes 'a' by NoneType"),
    _case("NaN offsets", "B4", packed({"a": entry(offsets=[float("nan"), 4])}), "which are not .begin, end."),
    _case("infinite offsets", "B4", packed({"a": entry(offsets=[0, float("inf")])}), "which are not .begin, end."),
    _case("fractional offsets", "B4", packed({"a": entry(offsets=[0.0, 4.0])}), "which are not .begin, end."),
    _case("negative offsets", "B4", packed({"a": entry(offsets=[-4, 0])}), "which are not .begin, end."),
    _case("offsets of text", "B4", packed({"a": entry(offsets=["0", "4"])}), "which are not .begin, end."),
    _case("offsets of a thousand digits", "B4", packed(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,1'
          + b"0" * 1000 + b"]}}"), "gives 'a' 1000"),
    _case("number of ten thousand digits", "B4", packed(b'{"a":{"dtype":"F32","shape":[' + b"1" * 10_000
          + b'],"data_offsets":[0,4]}}'), "does not hold valid JSON"),
    _case("nested a hundred thousand deep", "B17", packed(b'{"a":' * 100_000), "does not hold valid JSON"),
    _case("header of spaces", "B17", packed(b" " * 20_000_000, b""), "does not hold valid JSON"),
    Case("header of 3 GB that is not there", "B17", sparse(WEIGHTS, 3 << 30, _length(3 << 30)), "are allowed",
         tools=TOOLS),
    Case("header of 90 MB of zeros", "B17", sparse(WEIGHTS, 91_000_000, _length(90_000_000)),
         "are allowed|valid JSON", tools=TOOLS),
    _case("lists of nothing, 12 MB", "B17 B6", packed(b'{"a":[' + b"[]," * 4_000_000 + b"[]]}", b""), "lists more than"),
    Case("overlap", "B5", reheaded(_overlapping), "where it overlaps another tensor", tools=TOOLS),
    Case("bytes that no tensor has", "B5", reheaded(_holed), "bytes after its last tensor", tools=TOOLS),
    _case("hole", "B5", packed({"a": entry(offsets=[4, 8])}, bytes(8)), "where it leaves a hole before it"),
    Case("out of range", "B5", reheaded(_wide), "it is truncated", tools=TOOLS),
    _case("offsets reversed", "B5", packed({"a": entry(offsets=[4, 0])}), "gives 'a' -4 bytes"),
    _case("offsets of three", "B5", packed({"a": entry(offsets=[0, 2, 4])}), "which are not .begin, end."),
    _case("two tensors in one place", "B5", packed({"a": entry(), "b": entry()}), "overlaps another tensor"),
    _truncated(100),
    _truncated(None, 1),
    _truncated(None, 100_000),
    Case("too long by five bytes", "B5", _longer, "holds 5 bytes after its last tensor", tools=TOOLS),
    _case("a million empty tensors", "B6", _many_empty(1_000_000), "are allowed|lists more than"),
    _case("300,000 empty tensors", "B6", _many_empty(300_000), "lists more than"),
    _case("the last of 60,000 names twice", "B6", _last_twice(60_000), "names 't0' twice"),
    _case("shape of 2^62 and 0", "B6", _shaped([2**62, 0], [0, 0]), "not a list of sizes"),
    _case("shape that wraps to 1", "B6", _shaped([2**32, 2**32, 1]), "takes another number"),
    _case("shape 2^63", "B6", _shaped([2**63]), "not a list of sizes"),
    _case("shape negative twice", "B6", _shaped([-1, -1]), "not a list of sizes"),
    _case("shape of ten thousand ones", "B6", _shaped([1] * 10_000), "dimensions"),
    _case("name twice", "B6", packed(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
          b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'), "names 'a' twice"),
    _case("key of an entry twice", "B6", packed(b'{"a":{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}'),
          "names 'dtype' twice"),
    _case("metadata twice", "B6", packed(b'{"__metadata__":{},"__metadata__":{},'
          b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'), "names '__metadata__' twice"),
    _case("metadata that is no text", "B6", packed({"__metadata__": {"a": [1]}, "a": entry()}), "metadata"),
    _case("metadata a list", "B6", packed({"__metadata__": [], "a": entry()}), "metadata"),
    _case("entry with a key too many", "B6", packed({"a": entry() | {"offset": 3}}), "describes 'a'"),
    _case("name of a megabyte", "B6 B20", packed({"a" * 2**20: entry(shape=[2])}), "takes another number"),
    _retyped("F13"),
    _retyped("f32"),
    _retyped("F4"),
    _retyped("F6_E2M3"),
    _case("F4 of three halves of a byte", "B7", packed({"a": entry("F4", [3], [0, 2])}, bytes(2)), "the dtype 'F4'"),
    _case("dtype a list", "B7", packed({"a": entry(["F32"])}), "the dtype"),
    _case("dtype null", "B7", packed({"a": entry(None)}), "the dtype None"),
    _case("width of another dtype", "B7", packed({"a": entry("F64")}), "takes another number"),
    Case("a pipe", "B19", _pipe, "must be a regular file", tools=TOOLS),
    Case("a folder", "B19", _directory, "must be a regular file", tools=TOOLS),
    Case("/dev/zero", "B19", linked(WEIGHTS, "/dev/zero"), "is a link to|regular file", tools=TOOLS),
    Case("a link out", "B19", moved_out(WEIGHTS), "is a link to", tools=TOOLS),
    Case("a link to itself", "B19", linked(WEIGHTS, WEIGHTS), "must", tools=TOOLS),
    Case("a link to nothing", "B19", linked(WEIGHTS, "nothing"), "must", tools=TOOLS),
    Case("a link through /proc", "B19", linked(WEIGHTS, "/proc/self/mem"), "is a link to|must", tools=TOOLS),
    Case("good: spaces after the header", "B4", both(reheaded(lambda h: json.dumps(h).encode() + b" " * 64)), "",
         loads=True, tools=TOOLS),
]  # fmt: skip
