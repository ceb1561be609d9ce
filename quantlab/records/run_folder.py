"""A run's folder: records are written and read, each with its per-item results beside it."""

import json
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from quantlab.errors import RecordError
from quantlab.records.atomic import write_atomic
from quantlab.records.canonical import plain, sha256, without_nonfinite
from quantlab.records.items import Columns, frame_of, parquet_of
from quantlab.records.record import Kind, Record, record_key
from quantlab.records.sealed import damaged, pretty, read_bytes, read_sealed, write_sealed

if TYPE_CHECKING:
    import pandas

__all__ = ["read_items", "read_record", "read_records", "read_run", "read_sidecar", "write_record"]

_KEY = re.compile(r"\w{1,64}")
_FIELDS = tuple(field.name for field in fields(Record))


def write_record(
    folder: Path, record: Record, items: Mapping[str, Columns], sidecar: Mapping[str, Any]
) -> Path:
    """Write a record into the run at `folder`, its JSON last; returns the path of the JSON.

    Args:
        items: task -> columns of equal length, one row an item; empty where the record has none.
        sidecar: time, host, speed: what may differ between equal runs.

    Raises:
        OutputError: the folder cannot be written.
    """
    if items:
        content = parquet_of(items)
        record = replace(record, items_sha256=sha256(content))
        write_atomic(folder / "records" / f"{record.key}.parquet", content)
    notes = without_nonfinite(plain(sidecar), "", {})
    write_atomic(folder / "sidecars" / f"{record.key}.json", pretty(notes))
    path = folder / "records" / f"{record.key}.json"
    write_sealed(path, {name: getattr(record, name) for name in _FIELDS})
    return path


def read_records(folder: Path) -> list[Record]:
    """The run's finished records: those that run.json plans, in its order, or every one, by key, without a run.json.

    Raises:
        RecordError: no records there, or one that is damaged.
    """
    records = folder / "records"
    if not records.is_dir():
        raise RecordError(
            f"a run's folder must hold records: {folder} has no folder 'records'. Run a sweep first."
        )
    run = folder / "run.json"
    if run.exists():
        paths = [records / f"{key}.json" for key in read_run(folder)["records"]]
        return [read_record(path) for path in paths if path.exists()]
    return [read_record(path) for path in sorted(records.glob("[!.]*.json"))]


def read_run(folder: Path) -> dict[str, Any]:
    """run.json: `config`, `config_fingerprint`, and `records`, the keys that the run plans."""
    body = read_sealed(folder / "run.json")
    keys = body.get("records")
    # A key becomes the name of a file.
    if not isinstance(keys, list) or not all(isinstance(key, str) and _KEY.fullmatch(key) for key in keys):
        raise damaged(folder / "run.json", "its records are not keys")
    return body


def read_record(path: Path) -> Record:
    """Read RUN/records/KEY.json and verify it and its Parquet, byte for byte.

    Raises:
        RecordError: missing, truncated, altered, or of another format version.
    """
    body = read_sealed(path)
    if set(body) != set(_FIELDS) or body["kind"] not in get_args(Kind):
        raise damaged(path, "fields of another kind of file")
    record = Record(**body)
    if not path.stem == record.key == record_key(record.kind, record.made_by):
        raise damaged(path, "its name is not the key of what made it")
    if record.items_sha256 is not None:
        _read_items_bytes(path, record.items_sha256)
    return record


def read_sidecar(folder: Path, key: str) -> dict[str, Any]:
    """Time, host and speed of a record of the run at `folder`; empty where it has none that can be read."""
    try:
        notes = json.loads(read_bytes(folder / "sidecars" / f"{key}.json"))
    except (RecordError, ValueError):
        return {}
    return notes if isinstance(notes, dict) else {}


def read_items(folder: Path, key: str, task: str | None = None) -> "pandas.DataFrame":
    """Per-item results of a record of the run at `folder`: one row an item, column `task`, checksum verified.

    With a task: its rows and its own columns, in their own types. Without: all rows, null where a task lacks a column.
    """
    path = folder / "records" / f"{key}.json"
    record = read_record(path)
    if record.items_sha256 is None:
        raise RecordError(f"a record must have per-item results to read them: {path} has none.")
    return frame_of(_read_items_bytes(path, record.items_sha256), task)


def _read_items_bytes(path: Path, expected: str) -> bytes:
    """The Parquet beside a record's JSON, of the hash that the record names."""
    content = read_bytes(path.with_suffix(".parquet"))
    if sha256(content) != expected:
        raise damaged(path.with_suffix(".parquet"), f"its checksum is not the one in {path.name}")
    return content
