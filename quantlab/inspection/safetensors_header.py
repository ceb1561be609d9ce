"""What a safetensors file holds, read from its header alone and trusted in nothing.

A file is: 8 bytes N (little endian), N bytes of JSON `{name: {dtype, shape, data_offsets: [begin, end]}}`, then the
data. Everything is bounded before it is allocated, and the data must fill the rest of the file without overlap or
hole, so that what passes here is what the safetensors library reads. No torch.
Source: the format section of the safetensors README.
"""

import json
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

from quantlab.errors import CheckpointError

MAX_HEADER_BYTES = 25_000_000
"""The library allows four times as much, whose text alone can take 400 MB. MAX_TENSORS entries take 15 MB."""
MAX_TENSORS = 100_000
"""In one file. The largest public mixtures of experts hold fewer than 2,000 in each of their shards."""
MAX_DIMENSION = 2**48
MAX_DIMENSIONS = 64
MAX_JSON_BYTES = 16_000_000
"""Of a config or an index; an index of 100,000 tensors takes 10 MB."""
MAX_JSON_VALUES = 1_500_000
"""Commas and opening brackets in one JSON text: what it takes in memory grows with them, not with its bytes. A header
of MAX_TENSORS tensors of four dimensions has 1.1 million."""
MAX_DEPTH = 100
"""Objects and lists within each other. Python allows a thousand; what walks the tree later may allow fewer."""

DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8,
    "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of one element; dtypes below a byte are not weights that transformers loads."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor's entry: dtype as the file names it, shape, and its bytes' place in the whole file."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, by name.

    Raises:
        CheckpointError: not a regular file, truncated, or a header that breaks the format.
    """
    size = regular_file(path).st_size
    if size < 8:
        raise _broken(path, f"holds {size} bytes, fewer than the 8 of the header's length: it is truncated")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise _broken(path, f"says its header has {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
        if 8 + length > size:
            raise _broken(
                path, f"says its header has {length} bytes, but holds {size} in all: it is truncated"
            )
        text = file.read(length)
    if text.count(b'"data_offsets"') > MAX_TENSORS:
        raise _broken(path, f"lists more than {MAX_TENSORS} tensors")
    entries = read_json(text, path)
    _check_metadata(entries.pop("__metadata__", {}), path)
    tensors = {name: _entry(path, name, entry, 8 + length) for name, entry in entries.items()}
    _check_layout(path, tensors, 8 + length, size)
    return tensors


def read_int64s(tensor: StoredTensor) -> tuple[int, ...]:
    """The values of a small int64 tensor, such as a stored shape."""
    if tensor.dtype != "I64" or tensor.end - tensor.begin > 64:
        raise _broken(tensor.file, f"stores a shape as {tensor.dtype} {list(tensor.shape)}")
    with tensor.file.open("rb") as file:
        file.seek(tensor.begin)
        values = memoryview(file.read(tensor.end - tensor.begin))
    return tuple(int.from_bytes(values[i : i + 8], "little", signed=True) for i in range(0, len(values), 8))


def regular_file(path: Path) -> Any:
    """`stat` of a file that can be opened without blocking: not a pipe, a device or a folder."""
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"checkpoint file must be readable: {path}: {error.strerror}.") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"checkpoint file must be a regular file: {path} is a folder, pipe or device.")
    return status


def read_json(text: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in `text`; a key that occurs twice is an error, since readers disagree on which one counts."""

    def without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) < len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise _broken(path, f"names {twice!r} twice")
        return mapping

    if sum(text.count(mark) for mark in (b",", b"[", b"{")) > MAX_JSON_VALUES:
        raise _broken(path, f"lists more than {MAX_JSON_VALUES} values")
    try:
        tree = json.loads(text.decode("utf-8"), object_pairs_hook=without_duplicates)
    except UnicodeDecodeError as error:
        raise _broken(path, f"is not UTF-8 at byte {error.start} of its JSON") from error
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"does not hold valid JSON ({error})") from error
    if not isinstance(tree, dict):
        raise _broken(path, f"must hold a JSON object, found {type(tree).__name__}")
    return tree


def _check_metadata(metadata: Any, path: Path) -> None:
    """The library takes text alone."""
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "has metadata that is not a mapping of text to text")


def _entry(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    """One entry, with dtype, shape and offsets that agree with each other."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        found = f"the keys {sorted(entry)}" if isinstance(entry, dict) else type(entry).__name__
        raise _broken(path, f"describes {name!r} by {found}, not by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _broken(
            path, f"gives {name!r} the dtype {dtype!r}, which is not one of {', '.join(DTYPE_BYTES)}"
        )
    if not _is_naturals(shape) or not all(size <= MAX_DIMENSION for size in shape):
        raise _broken(path, f"gives {name!r} the shape {shape!r}, which is not a list of sizes")
    if len(shape) > MAX_DIMENSIONS:
        raise _broken(path, f"gives {name!r} {len(shape)} dimensions; at most {MAX_DIMENSIONS} are allowed")
    if not _is_naturals(offsets) or len(offsets) != 2:
        raise _broken(path, f"gives {name!r} the data_offsets {offsets!r}, which are not [begin, end]")
    begin, end = offsets
    if end - begin != prod(shape) * DTYPE_BYTES[dtype]:
        raise _broken(path, f"gives {name!r} {end - begin} bytes, but {dtype} {shape} takes another number")
    return StoredTensor(dtype, tuple(shape), path, data_start + begin, data_start + end)


def _is_naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_layout(path: Path, tensors: dict[str, StoredTensor], data_start: int, size: int) -> None:
    """The tensors fill [data_start, size) without overlap or hole."""
    position = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != position:
            fault = "overlaps another tensor" if tensor.begin < position else "leaves a hole before it"
            raise _broken(path, f"places {name!r} at byte {tensor.begin} where it {fault}")
        position = tensor.end
    if position > size:
        raise _broken(path, f"holds {size} bytes where its header asks for {position}: it is truncated")
    if position < size:
        raise _broken(path, f"holds {size - position} bytes after its last tensor")


def _broken(path: Path, fault: str) -> CheckpointError:
    return CheckpointError(f"checkpoint file is damaged: {path} {fault}. Get the file again.")
