"""The container of a GGUF file, version 3, little endian; one tensor is in memory at a time. No torch.

    bytes                      what
    4                          "GGUF"
    4, 8, 8                    uint32 3; uint64 number of tensors; uint64 number of keys
    of every key               string key; uint32 type of the value; the value
    of every tensor            string name; uint32 number of dimensions; uint64 each, the innermost first;
                               uint32 ggml type; uint64 offset from the start of the data
    0 .. 31                    zeros, up to a multiple of 32: here the data starts
    of every tensor            its bytes, row after row; zeros up to a multiple of 32

A string is a uint64 number of bytes and UTF-8. An array is uint32 type of its elements, uint64 count, the elements.
Types of values: 4 uint32, 5 int32, 6 float32, 7 bool (one byte), 8 string, 9 array.
Source: the GGUF specification of ggml.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantlab.inspection.gguf_header import GGML_TYPES, GgmlType

__all__ = ["ALIGNMENT", "TYPES", "FileTensor", "Value", "key_bytes", "write_file"]

Value = bool | int | float | str | Sequence[str] | NDArray[np.int32] | NDArray[np.float32]
"""What a key can hold; an int is a uint32."""

ALIGNMENT = 32
TYPES: Mapping[str, tuple[int, GgmlType]] = {kind.name: (number, kind) for number, kind in GGML_TYPES.items()}
"""Name of a ggml type -> its number in a file, and its size."""

_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = range(4, 10)


@dataclass(frozen=True)
class FileTensor:
    """A tensor that does not exist yet."""

    name: str
    kind: str
    """Name of its ggml type."""
    shape: tuple[int, ...]
    """In torch's order: [O, I] of a matrix."""
    build: Callable[[], NDArray[Any]]
    """Makes its bytes: C-contiguous, of any dtype."""

    @property
    def num_bytes(self) -> int:
        """Of the data, without what fills up to the next tensor."""
        _, kind = TYPES[self.kind]
        return prod(self.shape) // kind.block_size * kind.block_bytes


def write_file(path: Path, keys: Sequence[bytes], tensors: Sequence[FileTensor]) -> None:
    """Write a file: keys as `key_bytes` makes them, tensors built one after the other."""
    start = _header(keys, tensors)
    with path.open("wb") as file:
        file.write(start + bytes(-len(start) % ALIGNMENT))
        for tensor in tensors:
            data = np.ascontiguousarray(tensor.build())
            assert data.nbytes == tensor.num_bytes, f"{tensor.name}: {data.nbytes}, not {tensor.num_bytes}"
            file.write(data.data)
            file.write(bytes(-data.nbytes % ALIGNMENT))


def key_bytes(key: str, value: Value) -> bytes:
    """One key with its type and value."""
    kind, body = _value(value)
    return _string(key) + struct.pack("<I", kind) + body


def _value(value: Value) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return _BOOL, struct.pack("<?", value)
    if isinstance(value, int):
        return _UINT32, struct.pack("<I", value)
    if isinstance(value, float):
        return _FLOAT32, struct.pack("<f", value)
    if isinstance(value, str):
        return _STRING, _string(value)
    if isinstance(value, np.ndarray):
        kind, dtype = (_INT32, "<i4") if value.dtype == np.int32 else (_FLOAT32, "<f4")
        return _ARRAY, struct.pack("<IQ", kind, len(value)) + value.astype(dtype).tobytes()
    return _ARRAY, struct.pack("<IQ", _STRING, len(value)) + b"".join(map(_string, value))


def _string(text: str) -> bytes:
    encoded = text.encode("utf-8")
    return struct.pack("<Q", len(encoded)) + encoded


def _header(keys: Sequence[bytes], tensors: Sequence[FileTensor]) -> bytes:
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(keys)), *keys]
    offset = 0
    for tensor in tensors:
        dims = tensor.shape[::-1]
        parts += [_string(tensor.name), struct.pack(f"<I{len(dims)}Q", len(dims), *dims)]
        parts.append(struct.pack("<IQ", TYPES[tensor.kind][0], offset))
        offset += -(-tensor.num_bytes // ALIGNMENT) * ALIGNMENT
    return b"".join(parts)
