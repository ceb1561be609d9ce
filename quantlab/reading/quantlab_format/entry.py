"""One linear, as config.json describes it: every number is held within its bounds. O outputs, I inputs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantlab.errors import CheckpointError
from quantlab.reading.quantlab_format.block_types import BLOCKS
from quantlab.reading.quantlab_format.faults import cut, odd

__all__ = ["KINDS", "VERSION", "Entry", "entries", "shapes"]

KINDS = ("affine", "table", "block", "float", "same")
"""What a linear can be; the first three hold codes."""
VERSION = 1
LARGEST = 2**31
"""Of a dimension."""
MOST = 200_000
"""Linears of a model."""


@dataclass(frozen=True)
class Entry:
    """One linear, as config.json describes it; every number is within its bounds."""

    name: str
    kind: str
    shape: tuple[int, int]
    """(O, I)."""
    body: Mapping[str, Any]

    @property
    def holds_codes(self) -> bool:
        """Whether codes are stored under its own name."""
        return self.kind in KINDS[:3]


def shapes(quantization: Mapping[str, Any], where: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of `weight` as the architecture keeps it, of every linear described."""
    return {
        name: entry.shape[::-1] if entry.body.get("transposed") is True else entry.shape
        for name, entry in entries(quantization, where).items()
    }


def entries(quantization: Mapping[str, Any], where: str) -> dict[str, Entry]:
    """Every linear that a quantization_config describes.

    Raises:
        CheckpointError: another version, or an entry that is not one.
    """
    if quantization.get("version") != VERSION or isinstance(quantization.get("version"), bool):
        raise CheckpointError(
            f"quantlab's format is read in version {VERSION}: {where} has {cut(quantization.get('version'))}. "
            "Update quantlab, or export again."
        )
    found = quantization.get("linears")
    if not isinstance(found, dict) or not 0 < len(found) <= MOST:
        raise CheckpointError(
            f"quantization_config must describe 1 to {MOST} linears: that of {where} does not."
        )
    read = {name: _entry(name, body, where) for name, body in found.items()}
    for entry in read.values():
        if entry.kind == "same":
            _check_same(entry, read, where)
    return read


def _entry(name: str, body: Any, where: str) -> Entry:
    if not name or len(name) > 1000 or not name.isprintable():
        raise CheckpointError(
            f"a linear must have a printable name of 1 to 1000 letters: {where} has {cut(name)}."
        )
    if not isinstance(body, dict) or body.get("kind") not in KINDS:
        raise odd(name, where, f"must be one of {', '.join(KINDS)}")
    shape = _sizes(body.get("shape"), name, where, "shape")
    entry = Entry(name, body["kind"], shape, body)
    if entry.holds_codes:
        bits = body.get("bits")
        if type(bits) is not int or not 2 <= bits <= 8:
            raise odd(name, where, f"must have 2 to 8 bits, not {cut(bits)}")
        _check_scales(entry, _sizes(body.get("scale"), name, where, "scale"), where)
    return entry


def _check_scales(entry: Entry, scales: tuple[int, int], where: str) -> None:
    (rows, width), (of_rows, groups) = entry.shape, scales
    whole = scales == (1, 1)
    if not whole and (of_rows != rows or width % groups):
        raise odd(entry.name, where, f"must have scales that divide {list(entry.shape)}, not {list(scales)}")
    if entry.kind != "block":
        return
    kind = entry.body.get("block")
    if not isinstance(kind, str) or kind not in BLOCKS:
        raise odd(entry.name, where, f"must name a block of {', '.join(BLOCKS)}, not {cut(kind)}")
    bits, size, num_scales = BLOCKS[kind]
    if entry.body["bits"] != bits or width % size or scales != (rows, width // size * num_scales):
        raise odd(entry.name, where, f"must have the bits and scales of {kind}")


def _check_same(entry: Entry, read: Mapping[str, Entry], where: str) -> None:
    other = entry.body.get("as")
    of = read.get(other) if isinstance(other, str) else None
    if of is None or of.kind == "same" or of.shape != entry.shape:
        raise odd(entry.name, where, f"must be the same as a linear of its shape, not {cut(other)}")


def _sizes(found: Any, name: str, where: str, what: str) -> tuple[int, int]:
    good = isinstance(found, list) and len(found) == 2
    if not good or not all(type(size) is int and 0 < size < LARGEST for size in found):
        raise odd(name, where, f"must have a {what} of two sizes, not {cut(found)}")
    return found[0], found[1]
