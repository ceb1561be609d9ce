"""What a GGUF file holds, read from its header alone and trusted in nothing.

A file is: magic, version, counts; key-value metadata; tensor infos; aligned data. Every count and length is held
against the bytes that are left before anything is allocated or walked, so that no file can hang or exhaust the
reader. Arrays are measured, not kept: a tokenizer's 50,000 strings are not needed to know the weights. No torch.
Source: the GGUF specification of ggml, versions 2 and 3, little endian.
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from quantlab.errors import CheckpointError
from quantlab.inspection.safetensors_header import regular_file


class GgmlType(NamedTuple):
    """A storage type: `block_bytes` bytes hold `block_size` consecutive elements of a row."""

    name: str
    block_size: int
    block_bytes: int


GGML_TYPES: dict[int, GgmlType] = {
    0: GgmlType("F32", 1, 4), 1: GgmlType("F16", 1, 2), 30: GgmlType("BF16", 1, 2), 28: GgmlType("F64", 1, 8),
    2: GgmlType("Q4_0", 32, 18), 3: GgmlType("Q4_1", 32, 20), 6: GgmlType("Q5_0", 32, 22),
    7: GgmlType("Q5_1", 32, 24), 8: GgmlType("Q8_0", 32, 34),
    10: GgmlType("Q2_K", 256, 84), 11: GgmlType("Q3_K", 256, 110), 12: GgmlType("Q4_K", 256, 144),
    13: GgmlType("Q5_K", 256, 176), 14: GgmlType("Q6_K", 256, 210),
    16: GgmlType("IQ2_XXS", 256, 66), 17: GgmlType("IQ2_XS", 256, 74), 18: GgmlType("IQ3_XXS", 256, 98),
    19: GgmlType("IQ1_S", 256, 50), 20: GgmlType("IQ4_NL", 32, 18), 21: GgmlType("IQ3_S", 256, 110),
    22: GgmlType("IQ2_S", 256, 82), 23: GgmlType("IQ4_XS", 256, 136), 29: GgmlType("IQ1_M", 256, 56),
    34: GgmlType("TQ1_0", 256, 54), 35: GgmlType("TQ2_0", 256, 66), 39: GgmlType("MXFP4", 32, 17),
}  # fmt: skip
"""ggml type id -> storage, of the types that weights are stored in."""

MAX_KEY_BYTES = 65_535
MAX_STRING_BYTES = 4_000_000
"""Of one value; the longest chat templates have 50,000."""
MAX_KEYS = 10_000
MAX_TENSORS = 50_000
MAX_ELEMENTS = 2_000_000
"""Of all arrays together; a tokenizer of 262,000 tokens with scores, types and merges has 1.4 million."""
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 20

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufArray:
    """An array in the metadata, by its length; its elements stay in the file."""

    count: int


class GgufTensor(NamedTuple):
    """One tensor: storage type, shape in torch's order (GGUF stores it reversed), place from the start of the file."""

    type: GgmlType
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class GgufHeader:
    """A GGUF file without its data."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    places: Mapping[str, tuple[int, int]]
    """Where each key lies with its type and value: from which byte of the file to before which."""

    @property
    def architecture(self) -> str:
        """`general.architecture`, a name of llama.cpp's."""
        return str(self.metadata["general.architecture"])


def read_gguf(path: Path) -> GgufHeader:
    """The metadata and tensors of a GGUF file.

    Raises:
        CheckpointError: not a GGUF file of version 2 or 3, truncated, or a header that breaks the format.
    """
    size = regular_file(path).st_size
    if size < 24:
        raise CheckpointError(f"checkpoint file is damaged: {path} holds {size} bytes: it is truncated.")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _Reader(path, data).header()


class _Reader:
    """A position in the file, and reads from there that never pass its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position = path, data, 0
        self.num_elements = 0

    def header(self) -> GgufHeader:
        if self.data[:4] != b"GGUF":
            raise CheckpointError(
                f"a .gguf file must start with 'GGUF': {self.path} starts with {self.data[:4]!r}."
            )
        self.position = 4
        version = self.scalar("I")
        if version not in (2, 3):
            raise CheckpointError(f"GGUF version must be 2 or 3, little endian: {self.path} has {version}.")
        num_tensors, num_keys = self.scalar("Q"), self.scalar("Q")
        self.room_for(num_keys, 13, "metadata keys")
        self.at_most(num_keys, MAX_KEYS, "metadata keys")
        metadata, places = self.metadata(num_keys)
        self.room_for(num_tensors, 32, "tensors")
        self.at_most(num_tensors, MAX_TENSORS, "tensors")
        infos = [self.info() for _ in range(num_tensors)]
        return GgufHeader(metadata, self.placed(infos, self.alignment(metadata)), places)

    def broken(self, fault: str) -> CheckpointError:
        return CheckpointError(f"checkpoint file is damaged: {self.path} {fault}. Get the file again.")

    def room_for(self, count: int, item_bytes: int, what: str) -> None:
        """Refuse a count of items of at least `item_bytes` each that the rest of the file cannot hold."""
        left = len(self.data) - self.position
        if count * item_bytes > left:
            raise self.broken(
                f"says that {count} {what} follow byte {self.position}, but only {left} bytes do"
            )

    def at_most(self, count: int, largest: int, what: str) -> None:
        """Refuse a count that a file could hold, but that no model needs and a reader would walk for long."""
        if count > largest:
            raise self.broken(f"says that it has {count} {what}; at most {largest} are allowed")

    def scalar(self, code: str) -> Any:
        self.room_for(1, struct.calcsize(f"<{code}"), "values")
        (value,) = struct.unpack_from(f"<{code}", self.data, self.position)
        self.position += struct.calcsize(f"<{code}")
        return value

    def string(self, limit: int | None = None) -> str:
        length = self.scalar("Q")
        self.room_for(length, 1, "bytes of a string")
        if limit is not None and length > limit:
            raise self.broken(f"holds a name of {length} bytes; at most {limit} are allowed")
        self.at_most(length, MAX_STRING_BYTES, "bytes in a string")
        start, self.position = self.position, self.position + length
        try:
            return self.data[start : self.position].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.broken(f"holds a string at byte {start} that is not UTF-8") from error

    def metadata(self, num_keys: int) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
        """Values by key, and the bytes that each key takes."""
        metadata: dict[str, Any] = {}
        places: dict[str, tuple[int, int]] = {}
        for _ in range(num_keys):
            start, key = self.position, self.string(MAX_KEY_BYTES)
            if key in metadata:
                raise self.broken(f"names the metadata key {key!r} twice")
            metadata[key] = self.value(key)
            places[key] = start, self.position
        if not isinstance(metadata.get("general.architecture"), str):
            raise self.broken("names no general.architecture")
        return metadata, places

    def value(self, key: str) -> Any:
        kind = self.scalar("I")
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(key)
        if kind not in _SCALARS:
            raise self.broken(f"gives the metadata key {key!r} the unknown type {kind}")
        return self.scalar(_SCALARS[kind])

    def array(self, key: str) -> GgufArray:
        """Walk past an array of scalars or strings; arrays of arrays, which no model uses, are refused."""
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind in _SCALARS:
            width = struct.calcsize(f"<{_SCALARS[kind]}")
            self.room_for(count, width, f"elements of {key!r}")
            self.counted(count)
            self.position += count * width
            return GgufArray(count)
        if kind != _STRING:
            raise self.broken(
                f"gives the array {key!r} elements of type {kind}; scalars and strings are allowed"
            )
        self.room_for(count, 8, f"strings of {key!r}")
        self.counted(count)
        self.skip_strings(key, count)
        return GgufArray(count)

    def counted(self, count: int) -> None:
        self.num_elements += count
        self.at_most(self.num_elements, MAX_ELEMENTS, "elements in its arrays")

    def skip_strings(self, key: str, count: int) -> None:
        length_of, end = struct.Struct("<Q").unpack_from, len(self.data)
        position = self.position
        for _ in range(count):
            if position + 8 > end:
                raise self.broken(f"ends within the array {key!r}: it is truncated")
            position += 8 + length_of(self.data, position)[0]
        if position > end:
            raise self.broken(f"ends within the array {key!r}: it is truncated")
        self.position = position

    def alignment(self, metadata: Mapping[str, Any]) -> int:
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self.broken(
                f"asks for an alignment of {alignment!r}, which is not a power of two up to 2^20"
            )
        return alignment

    def info(self) -> tuple[str, GgmlType, tuple[int, ...], int]:
        """Name, type, shape in torch's order and offset in the data of the next tensor."""
        name = self.string(MAX_KEY_BYTES)
        num_dimensions = self.scalar("I")
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise self.broken(
                f"gives the tensor {name!r} {num_dimensions} dimensions, not 1 to {MAX_DIMENSIONS}"
            )
        shape = tuple(self.scalar("Q") for _ in range(num_dimensions))[::-1]
        type_id, offset = self.scalar("I"), self.scalar("Q")
        if type_id not in GGML_TYPES:
            raise self.broken(f"stores the tensor {name!r} in the ggml type {type_id}, which is not known")
        return name, GGML_TYPES[type_id], shape, offset

    def placed(
        self, infos: list[tuple[str, GgmlType, tuple[int, ...], int]], alignment: int
    ) -> dict[str, GgufTensor]:
        """The tensors with their places, which are aligned, within the file and apart from each other."""
        start = -(-self.position // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        end_of_last = start
        for name, kind, shape, offset in sorted(infos, key=lambda info: info[3]):
            if shape[-1] % kind.block_size:
                raise self.broken(
                    f"stores {name!r} {shape} in {kind.name}, whose blocks do not divide its rows"
                )
            begin = start + offset
            end = begin + prod(shape) // kind.block_size * kind.block_bytes
            if offset % alignment or begin < end_of_last:
                raise self.broken(f"places the tensor {name!r} at a byte that is not aligned or not free")
            if end > len(self.data):
                raise self.broken(f"ends within the tensor {name!r}: it is truncated")
            if name in tensors:
                raise self.broken(f"names the tensor {name!r} twice")
            tensors[name], end_of_last = GgufTensor(kind, shape, begin, end), end
        return tensors
