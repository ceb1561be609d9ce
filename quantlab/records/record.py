"""What a record is: one cell's inputs and result, and the key that follows from the inputs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from quantlab.records.canonical import fingerprint, plain, without_nonfinite
from quantlab.records.sealed import SCHEMA

__all__ = [
    "COMPUTATION",
    "OF_THE_SCHEME",
    "Kind",
    "Record",
    "measured_on",
    "record_key",
    "what_was_computed",
]

Kind = Literal["evaluation", "profile"]

COMPUTATION = "computation"
"""The section of `made_by` that says how a result was computed (batch composition, threads): it moves the last digits,
so it is in the key, but two records that differ in it alone are of the same thing and compare."""

OF_THE_SCHEME = ("scheme", "quantize", "kernel", "calibration", "method", "transforms", "widths")
"""Entries of `made_by` that say which scheme was put on the model, and what its codes and ranges came of."""


@dataclass(frozen=True)
class Record:
    """One cell's inputs and result, as plain JSON data. Made by `Record.of`; equal inputs make equal records."""

    kind: Kind
    key: str
    made_by: dict[str, Any]
    config: dict[str, Any]
    config_fingerprint: str
    result: dict[str, Any]
    nonfinite: dict[str, str] = field(default_factory=dict)
    """Dotted places in `result` whose null stands for "nan", "inf" or "-inf"."""
    items_sha256: str | None = None
    """Hash of the Parquet of per-item results; none where there are none."""

    @classmethod
    def of(
        cls, kind: Kind, made_by: Mapping[str, Any], config: Mapping[str, Any], result: Mapping[str, Any]
    ) -> Self:
        """The record of a result; the key and the fingerprint follow from the inputs."""
        nonfinite: dict[str, str] = {}
        finite = without_nonfinite(plain(result), "", nonfinite)
        key = record_key(kind, made_by)
        return cls(kind, key, plain(made_by), plain(config), fingerprint(config), finite, nonfinite)


def what_was_computed(made_by: Mapping[str, Any]) -> dict[str, Any]:
    """What a record's inputs say of the thing itself, without how it was computed."""
    return {name: value for name, value in made_by.items() if name != COMPUTATION}


def measured_on(made_by: Mapping[str, Any]) -> dict[str, Any]:
    """What a record's inputs say of checkpoint, data and settings of the evaluation.

    The scheme is left out, and so is what its codes came of: a scheme and its baseline agree in the rest and compare,
    whatever a method was calibrated on.
    """
    return {name: value for name, value in what_was_computed(made_by).items() if name not in OF_THE_SCHEME}


def record_key(kind: Kind, made_by: Mapping[str, Any]) -> str:
    """Name of the record of `made_by`, known before it is computed: 64 hexadecimal digits.

    The checkpoint's name is a label for people and not hashed: a copy of a checkpoint has the records of the original.
    """
    source = made_by.get("checkpoint")
    if isinstance(source, Mapping):
        made_by = {**made_by, "checkpoint": {name: source[name] for name in source if name != "name"}}
    return fingerprint({"schema": SCHEMA, "kind": kind, "made_by": made_by})
