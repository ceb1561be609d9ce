"""Sealed JSON: an object with the format's version and a checksum of all the rest in it, read only if intact."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantlab.errors import RecordError
from quantlab.records.atomic import write_atomic
from quantlab.records.canonical import fingerprint, plain

__all__ = ["SCHEMA", "damaged", "pretty", "read_bytes", "read_sealed", "write_sealed"]

SCHEMA = 1
"""Version of the files' format; part of every key."""

MAX_RECORD_BYTES = 2**28
"""Larger files are not read: no record of ours comes near."""


def write_sealed(path: Path, body: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, with the schema's version and a checksum of all the rest in it."""
    write_atomic(path, _sealed(plain(body)))


def read_sealed(path: Path) -> dict[str, Any]:
    """The body of a sealed JSON file. Any byte that differs from what was written is found."""
    content = read_bytes(path)
    try:
        sealed = json.loads(content)
        schema = sealed.pop("schema")
        del sealed["checksum"]
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise damaged(path, "not a sealed JSON object") from error
    if schema != SCHEMA:
        raise RecordError(
            f"a record must be of format {SCHEMA}, which this quantlab writes: {path} is of format {schema!r}. "
            "Read it with the quantlab that wrote it, or run the sweep again in another folder."
        )
    # The whole text is compared, its checksum with it, since spacing and repeated keys do not reach the checksum.
    try:
        intact = _sealed(sealed) == content
    except ValueError as error:  # a number beyond the range of floats
        raise damaged(path, "a number that is not finite") from error
    if not intact:
        raise damaged(path, "its checksum does not match")
    body: dict[str, Any] = sealed
    return body


def read_bytes(path: Path) -> bytes:
    """A file's content; what is no file, or too large to be ours, is refused."""
    try:
        if not path.is_file():
            raise RecordError(f"a record must be a file: {path} is not.")
        if path.stat().st_size > MAX_RECORD_BYTES:
            raise damaged(path, f"larger than {MAX_RECORD_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise RecordError(f"a record must be readable: {path}: {error.strerror}.") from error


def pretty(body: Any) -> bytes:
    """Plain data as the text of a file."""
    return (json.dumps(body, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def damaged(path: Path, reason: str) -> RecordError:
    """The complaint about a file."""
    return RecordError(
        f"a record must be as it was written: {path}: {reason}. Run the sweep again to replace it."
    )


def _sealed(body: dict[str, Any]) -> bytes:
    sealed = body | {"schema": SCHEMA}
    return pretty(sealed | {"checksum": fingerprint(sealed)})
