"""What a run leaves behind: one JSON and one Parquet a cell, written atomically, checked whenever they are read.

    RUN/run.json                resolved config, its fingerprint, and the keys of the records that the run plans
    RUN/records/KEY.json        the record: what made it and what came out
    RUN/records/KEY.parquet     its per-item results (column `task` says whose)
    RUN/sidecars/KEY.json       time, host and speed: everything that two equal runs do not share
    RUN/report/                 built from the above

KEY is the SHA-256 of what made the record (`made_by`: checkpoint content, scheme, data, settings, sources), never of a
name or a time. The same inputs give the same bytes. The Parquet is written first and the JSON last, with the
Parquet's hash and its own in it: a record exists when its JSON does, and a damaged one is a `RecordError`.

JSON has no NaN and no infinity. In a result such a number becomes null and `nonfinite` says what stood there;
in what is hashed (`made_by`, `config`) it is refused.
"""

import errno
import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

# Re-exported: what reading and writing raises, for those who know records only.
from quantlab.errors import OutputError as OutputError
from quantlab.errors import RecordError as RecordError

if TYPE_CHECKING:
    import pandas
    import pyarrow

SCHEMA = 1
"""Version of the files' format; part of every key."""

MAX_RECORD_BYTES = 2**28
"""Larger files are not read: no record of ours comes near."""

PROBE_BYTES = 2**20
"""Room that must be free before a run starts."""

_KEY = re.compile(r"\w{1,64}")

Kind = Literal["evaluation", "profile"]
Columns = Mapping[str, NDArray[Any]]


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
        finite = _without_nonfinite(plain(result), "", nonfinite)
        key = record_key(kind, made_by)
        return cls(kind, key, plain(made_by), plain(config), fingerprint(config), finite, nonfinite)


def record_key(kind: Kind, made_by: Mapping[str, Any]) -> str:
    """Name of the record of `made_by`, known before it is computed: 64 hexadecimal digits.

    The checkpoint's name is a label for people and not hashed: a copy of a checkpoint has the records of the original.
    """
    source = made_by.get("checkpoint")
    if isinstance(source, Mapping):
        made_by = {**made_by, "checkpoint": {name: source[name] for name in source if name != "name"}}
    return fingerprint({"schema": SCHEMA, "kind": kind, "made_by": made_by})


# ---- writing


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
        content = _parquet(items)
        record = replace(record, items_sha256=_sha256(content))
        write_atomic(folder / "records" / f"{record.key}.parquet", content)
    notes = _without_nonfinite(plain(sidecar), "", {})
    write_atomic(folder / "sidecars" / f"{record.key}.json", _pretty(notes))
    path = folder / "records" / f"{record.key}.json"
    write_sealed(path, {name: getattr(record, name) for name in _FIELDS})
    return path


def write_sealed(path: Path, body: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, with the schema's version and a checksum of all the rest in it."""
    write_atomic(path, _sealed(plain(body)))


def write_atomic(path: Path, data: bytes) -> None:
    """Replace the file at `path` by `data`: readers see the old file or the new one, whatever happens.

    A temporary file beside it is written, synced and renamed, and the folder is synced. Folders are made as needed.

    Raises:
        OutputError: no space, read-only, no permission, or any other reason, with the path. No part file stays.
    """
    try:
        _replace(path, data)
    except OSError as error:
        raise _unwritable(path, len(data), error) from error


def check_writable(folder: Path) -> None:
    """Write, sync and remove a file of `PROBE_BYTES` in a folder, so that a run fails before it computes.

    Raises:
        OutputError: the folder cannot be made or written, or its disk is full.
    """
    probe = folder / f".probe-{secrets.token_hex(8)}"
    try:
        _replace(probe, bytes(PROBE_BYTES))
        probe.unlink()
    except OSError as error:
        raise _unwritable(folder, PROBE_BYTES, error) from error


# ---- reading


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
    body = _read_sealed(folder / "run.json")
    keys = body.get("records")
    # A key becomes the name of a file.
    if not isinstance(keys, list) or not all(isinstance(key, str) and _KEY.fullmatch(key) for key in keys):
        raise _damaged(folder / "run.json", "its records are not keys")
    return body


def read_record(path: Path) -> Record:
    """Read RUN/records/KEY.json and verify it and its Parquet, byte for byte.

    Raises:
        RecordError: missing, truncated, altered, or of another format version.
    """
    body = _read_sealed(path)
    if set(body) != set(_FIELDS) or body["kind"] not in get_args(Kind):
        raise _damaged(path, "fields of another kind of file")
    record = Record(**body)
    if not path.stem == record.key == record_key(record.kind, record.made_by):
        raise _damaged(path, "its name is not the key of what made it")
    if record.items_sha256 is not None:
        _read_items_bytes(path, record.items_sha256)
    return record


def read_items(folder: Path, key: str, task: str | None = None) -> "pandas.DataFrame":
    """Per-item results of a record of the run at `folder`: one row an item, column `task`, checksum verified.

    With a task: its rows and its own columns, in their own types. Without: all rows, null where a task lacks a column.
    """
    import pyarrow
    import pyarrow.compute
    import pyarrow.parquet

    path = folder / "records" / f"{key}.json"
    record = read_record(path)
    if record.items_sha256 is None:
        raise RecordError(f"a record must have per-item results to read them: {path} has none.")
    content = _read_items_bytes(path, record.items_sha256)
    table = pyarrow.parquet.read_table(pyarrow.BufferReader(content), use_threads=False)
    if task is not None:
        table = table.filter(pyarrow.compute.equal(table["task"], task))
        table = table.select([name for name in table.column_names if table[name].null_count == 0])
    frame: pandas.DataFrame = table.to_pandas(use_threads=False)
    return frame


# ---- canonical form


def fingerprint(value: Any) -> str:
    """SHA-256 of the canonical JSON of a value, as 64 hexadecimal digits.

    Raises:
        ValueError: a number that is not finite.
    """
    text = json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return _sha256(text.encode())


def plain(value: Any) -> Any:
    """A value as JSON knows it: mappings with text keys, lists, text, numbers, booleans, null.

    Tuples and arrays become lists, numpy's scalars Python's, paths text, integer keys text.
    """
    if isinstance(value, Mapping):
        mapping = {str(key): plain(item) for key, item in value.items()}
        assert len(mapping) == len(value), f"two keys with one text: {sorted(map(str, value))}"
        return mapping
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    assert value is None or isinstance(value, str | int | float), f"not plain data: {type(value).__name__}"
    return value


@cache
def source_hash() -> str:
    """SHA-256 over names and contents of the Python sources of `probes` and `quantlab`: the code's version."""
    return _tree_hash(Path(__file__).resolve().parent.parent, ("probes", "quantlab"))


# ---- details

_FIELDS = tuple(field.name for field in fields(Record))


def _without_nonfinite(value: Any, place: str, found: dict[str, str]) -> Any:
    """A copy of plain data with null for each number that is not finite; `found` gets its dotted place and text."""
    if isinstance(value, dict):
        return {key: _without_nonfinite(item, f"{place}.{key}", found) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nonfinite(item, f"{place}.{i}", found) for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        found[place.removeprefix(".")] = str(value)
        return None
    return value


def _pretty(body: Any) -> bytes:
    return (json.dumps(body, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def _sealed(body: dict[str, Any]) -> bytes:
    sealed = body | {"schema": SCHEMA}
    return _pretty(sealed | {"checksum": fingerprint(sealed)})


def _read_sealed(path: Path) -> dict[str, Any]:
    """The body of a sealed JSON file. Any byte that differs from what was written is found."""
    content = _read_bytes(path)
    try:
        sealed = json.loads(content)
        schema = sealed.pop("schema")
        del sealed["checksum"]
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise _damaged(path, "not a sealed JSON object") from error
    if schema != SCHEMA:
        raise RecordError(
            f"a record must be of format {SCHEMA}, which this quantlab writes: {path} is of format {schema!r}. "
            "Read it with the quantlab that wrote it, or run the sweep again in another folder."
        )
    # The whole text is compared, its checksum with it, since spacing and repeated keys do not reach the checksum.
    try:
        intact = _sealed(sealed) == content
    except ValueError as error:  # a number beyond the range of floats
        raise _damaged(path, "a number that is not finite") from error
    if not intact:
        raise _damaged(path, "its checksum does not match")
    body: dict[str, Any] = sealed
    return body


def _read_items_bytes(path: Path, sha256: str) -> bytes:
    content = _read_bytes(path.with_suffix(".parquet"))
    if _sha256(content) != sha256:
        raise _damaged(path.with_suffix(".parquet"), f"its checksum is not the one in {path.name}")
    return content


def _read_bytes(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise RecordError(f"a record must be a file: {path} is not.")
        if path.stat().st_size > MAX_RECORD_BYTES:
            raise _damaged(path, f"larger than {MAX_RECORD_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise RecordError(f"a record must be readable: {path}: {error.strerror}.") from error


def _damaged(path: Path, reason: str) -> RecordError:
    return RecordError(
        f"a record must be as it was written: {path}: {reason}. Run the sweep again to replace it."
    )


def _parquet(items: Mapping[str, Columns]) -> bytes:
    """One Parquet file of all tasks' rows; the same columns give the same bytes (no time, no host in them)."""
    import pyarrow
    import pyarrow.parquet

    tables = [_table(task, columns) for task, columns in items.items()]
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.concat_tables(tables, promote_options="permissive")
    pyarrow.parquet.write_table(table, sink, compression="zstd")
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _table(task: str, columns: Columns) -> "pyarrow.Table":
    import pyarrow

    lengths = {len(column) for column in columns.values()}
    assert len(lengths) == 1 and "task" not in columns, f"{task}: columns of lengths {sorted(lengths)}"
    tasks = pyarrow.array([task] * lengths.pop(), pyarrow.string())
    arrays = {name: pyarrow.array(column) for name, column in columns.items()}
    return pyarrow.table({"task": tasks} | arrays)


def _tree_hash(root: Path, packages: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for package in packages for path in (root / package).rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _replace(path: Path, data: bytes) -> None:
    """The steps of `write_atomic`, with the system's own error."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def _unwritable(path: Path, num_bytes: int, error: OSError) -> OutputError:
    reason = error.strerror or type(error).__name__
    return OutputError(
        f"results must be writable: {path} ({num_bytes} bytes): {reason}. "
        "Free space or permissions there, or give another --out."
    )


def _sync_folder(folder: Path) -> None:
    """Make a rename in the folder durable, where its file system knows how."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
