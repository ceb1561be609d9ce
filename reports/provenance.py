"""Where numbers come from: a table of records, of what was quantized, and of what is missing or damaged."""

import re
from collections.abc import Mapping
from typing import Any, cast

import pandas as pd

from reports.load import BASELINE, Cell, Run
from reports.tables import Entry, Row, Table, grouped, number, text

_SAME = ["action", "why", "bits", "kernel"]
"""What modules of one row share, besides their name."""


def records_table(run: Run) -> Table:
    """Every record: reference, what it is, its key, file, sources, settings and data."""
    pairs = [(cell.checkpoint, _record_row(cell)) for cell in run.cells]
    columns = (
        "Record",
        "Kind",
        "Scheme",
        "Key and file",
        "Code",
        "Settings",
        "Data",
        "Checkpoint",
        "dtype",
        "Kernel",
        "BOS",
    )
    note = (
        "Key: SHA-256 of what made the record. Code: of the sources. Settings: of the resolved configuration. "
        "Data: of the texts and documents. The files hold all of it; hashes are cut to 12 digits here."
    )
    return Table("records", "Records", columns, grouped(pairs), note)


def _record_row(cell: Cell) -> tuple[Entry, ...]:
    record = cell.record
    made_by = record.made_by
    checkpoint = made_by.get("checkpoint") or {}
    return (
        # "#" makes this row the target of the links to the record.
        Entry(cell.ref, source=f"#{cell.ref}"),
        Entry(record.kind),
        text(cell.scheme if record.kind == "evaluation" else ""),
        text(f"records/{record.key}.json", source=record.key),
        _hash(made_by.get("code")),
        _hash(record.config_fingerprint),
        text("; ".join(_hashes(made_by.get("data")))),
        _hash(checkpoint.get("content_hash")),
        text(checkpoint.get("dtype")),
        text(made_by.get("kernel")),
        text(made_by.get("bos")),
    )


def _hash(value: object) -> Entry:
    whole = str(value or "")
    return text(whole[:12], source=whole)


def _hashes(data: object, prefix: str = "") -> list[str]:
    """`hellaswag 1a2b3c…` for every hash in a nested mapping of data; other scalars as they are."""
    if isinstance(data, Mapping):
        return [part for name, value in data.items() for part in _hashes(value, f"{prefix} {name}".strip())]
    if data is None:
        return []
    shown = str(data)
    return [f"{prefix} {shown[:12] if re.fullmatch('[0-9a-f]{40,}', shown) else shown}".strip()]


def quantized_table(run: Run) -> Table:
    """Per scheme: share of decoder weights at each width, what was swapped and skipped and why, on which kernel."""
    pairs = [
        (cell.checkpoint, row)
        for cell in run.of_kind("evaluation")
        if cell.scheme != BASELINE
        for row in _quantized_rows(cell)
    ]
    columns = ("Scheme", "Weights by bits", "Action", "Modules", "Which", "Why", "Bits", "Kernel", "Weights")
    note = (
        "Shares are of decoder weights. Layers of one kind are counted together; * stands for the layer's number. "
        "“integer”: real integer products; “simulated”: rounded to the grid and computed in floating point."
    )
    return Table("quantized", "What was quantized, and what was not", columns, grouped(pairs), note)


def _quantized_rows(cell: Cell) -> list[tuple[Entry, ...]]:
    """A row for each kind of module that had the same done to it for the same reason."""
    quantization = cell.record.result.get("quantization") or {}
    shares = Entry(_shares(quantization.get("share_by_bits") or {}), source=cell.ref)
    scheme = text(cell.scheme, source=cell.ref, link=cell.ref)
    modules = pd.DataFrame(quantization.get("rows") or [], columns=["name", *_SAME, "num_weights"])
    if modules.empty:
        return [(scheme, shares, *[Entry()] * 7)]
    modules["name"] = modules["name"].astype(str).str.replace(r"\.\d+(?=\.|$)", ".*", regex=True)
    rows: list[tuple[Entry, ...]] = []
    for kind, group in modules.groupby(["name", *_SAME], sort=False, dropna=False):
        name, action, why, bits, kernel = cast("tuple[Any, ...]", kind)
        count = number(len(group), 0, cell.ref)
        weights = number(pd.to_numeric(group["num_weights"]).sum(), 0, cell.ref)
        named = (text(name), text(why, limit=160), number(bits, 0, cell.ref), text(kernel))
        rows.append((scheme, shares, text(action), count, *named, weights))
    return rows


def _shares(shares: Mapping[str, Any]) -> str:
    ordered = sorted(shares.items(), key=lambda item: float(item[0]))
    return ", ".join(f"{float(share):.1%} at {bits}" for bits, share in ordered) or "–"


def holes_table(run: Run) -> Table:
    """Planned cells without a record."""
    rows: tuple[Row, ...] = tuple(
        (text(hole.checkpoint), Entry(hole.kind), text(hole.scheme), text(hole.key)) for hole in run.holes
    )
    return Table("holes", "Planned, and not there", ("Checkpoint", "Kind", "Scheme", "Key"), rows)


def problems_table(run: Run) -> Table:
    """Files that were left out, and why."""
    rows: tuple[Row, ...] = tuple(
        (text(problem.file), text(problem.what, limit=400)) for problem in run.problems
    )
    return Table("problems", "Damaged, and left out", ("File", "Why"), rows)
