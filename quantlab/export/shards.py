"""Safetensors shards written one at a time: the extra memory is one shard, whatever the model's size.

A `Part` knows the names, dtypes and shapes of its tensors before any of them exists, so the shards are planned from
sizes alone and each part is built when its shard is written.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["DEFAULT_SHARD_SIZE", "Layout", "Part", "TensorType", "write_shards"]

DEFAULT_SHARD_SIZE = 5_000_000_000
"""Bytes of a weight file, as the hub expects them at most."""


@dataclass(frozen=True)
class TensorType:
    """Dtype and shape of a tensor that does not exist yet."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes on disk, without the header."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Part:
    """Tensors that are built together and live in one shard: a quantized linear, or one kept tensor."""

    tensors: dict[str, TensorType]
    build: Callable[[], dict[str, Tensor]]
    """Makes the tensors, on the CPU, of the types promised."""
    num_linears: int = 0
    """1 for a quantized linear, 0 for a kept tensor."""

    @property
    def num_bytes(self) -> int:
        """Bytes on disk of all its tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def wider_than(self, dtype: torch.dtype) -> list[str]:
        """Names of its floating-point tensors that are stored in another dtype, which holds more."""
        return [name for name, t in self.tensors.items() if t.dtype.is_floating_point and t.dtype != dtype]


@dataclass(frozen=True)
class Layout:
    """A model in one format: how each swapped linear is stored, and what config.json says about it."""

    linears: dict[str, Part]
    """Name of a swapped linear -> its tensors, named from the linear: `weight_packed`, `weight_scale`."""
    quantization_config: dict[str, Any]
    """The entry of that name in config.json."""
    name: str
    """Name of the layout within the format."""
    num_codes: int
    """Weights that are stored in low bits."""
    extra: Sequence[Part] = ()
    """Tensors that belong to no linear, under their full names."""
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Further JSON files of the folder, by name."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """What goes into the headers of the weight files besides `format: pt`."""
    kept_in: str = ""
    """Types of everything that keeps its precision, where they are not the stored dtype."""
    notes: tuple[str, ...] = ()
    """What the files say otherwise than the model, in words."""

    @property
    def average_storage_bits(self) -> float:
        """Bits on disk per quantized weight: codes, padding, scales and shapes."""
        return 8 * sum(part.num_bytes for part in self.linears.values()) / self.num_codes


def write_shards(
    folder: Path,
    parts: Sequence[Part],
    max_shard_size: int,
    advance: Callable[[int], object],
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> int:
    """Write the parts as `model.safetensors`, or as numbered shards with an index when they exceed max_shard_size.

    Args:
        max_shard_size: bytes of a shard; a part that exceeds it by itself gets a shard of its own.
        advance: called with the number of linears written since the last call.
        metadata: goes into the header of every file.

    Returns:
        Bytes of all weight files.
    """
    shards = list(_fill(parts, max_shard_size))
    names = _file_names(len(shards))
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, shard, advance, metadata)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(part.num_bytes for part in parts)},
            "weight_map": {
                key: name
                for name, shard in zip(names, shards, strict=True)
                for part in shard
                for key in part.tensors
            },
        }
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return sum((folder / name).stat().st_size for name in names)


def _fill(parts: Sequence[Part], max_shard_size: int) -> Iterator[list[Part]]:
    """Parts in their order, cut before the shard that would grow beyond its size."""
    shard: list[Part] = []
    size = 0
    for part in parts:
        if shard and size + part.num_bytes > max_shard_size:
            yield shard
            shard, size = [], 0
        shard.append(part)
        size += part.num_bytes
    if shard:
        yield shard


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _write_shard(
    path: Path, shard: Sequence[Part], advance: Callable[[int], object], metadata: Mapping[str, str]
) -> None:
    tensors: dict[str, Tensor] = {}
    for part in shard:
        built = part.build()
        assert {name: TensorType(t.dtype, tuple(t.shape)) for name, t in built.items()} == part.tensors
        tensors |= built
        advance(part.num_linears)
    save_file(tensors, path, metadata={"format": "pt", **metadata})
