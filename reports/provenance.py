"""Where numbers come from: a table of records, of what was quantized, and of what is missing or damaged."""

import re
from collections.abc import Mapping
from typing import Any

from quantlab.records import COMPUTATION
from reports.cautions import KERNELS
from reports.entries import Entry, number, prose, text
from reports.load import BASELINE, Cell, Run, spans
from reports.tables import Row, Table, grouped


def records_table(run: Run) -> Table:
    """Every record: reference, what it is, its key, file, sources, settings and data."""
    pairs = [(cell.checkpoint, _record_row(cell)) for cell in run.cells]
    columns = (
        *(
            "Record",
            "Kind",
            "Scheme",
            "Key",
            "Code",
            "Settings",
            "Data",
            "Checkpoint",
            "dtype",
            "Kernel asked for",
            "BOS",
        ),
        "File",
    )
    note = (
        "Key: SHA-256 of what made the record. Code: of the sources. Settings: of the resolved configuration. "
        "Data: of the texts and documents. The files hold all of it; hashes are cut to 12 digits here."
    )
    return Table(
        "records",
        "Records",
        columns,
        grouped(pairs),
        " ".join(filter(None, (note, _machines(run), _computations(run)))),
    )


def _machines(run: Run) -> str:
    """Which records were computed on which machine, where there is more than one."""
    machines = list(dict.fromkeys(cell.machine for cell in run.cells))
    if len(machines) < 2:
        return ""
    on = [
        f"{spans([cell.ref for cell in run.cells if cell.machine == machine])} on {machine or 'a machine unnamed'}"
        for machine in machines
    ]
    return (
        f"Computed on unlike machines: {'; '.join(on)}. Integer linears give the same bits on all of them; other sums "
        "are rounded in another order, so the last digits of scores differ (docs/reproducibility.md)."
    )


def _computations(run: Run) -> str:
    """Which records were computed with which threads and batch sizes, where they differ among those that they move."""
    hows = {cell.ref: cell.record.made_by.get(COMPUTATION) or {} for cell in run.cells}
    # Of one setting all that a record has: a scheme that no batch size moves differs in nothing by lacking it.
    settings: dict[str, dict[str, list[str]]] = {}
    for ref, how in hows.items():
        for name, value in how.items():
            settings.setdefault(name, {}).setdefault(str(value), []).append(ref)
    unlike = [
        f"{name.replace('_', ' ')} {value} ({spans(refs)})"
        for name, values in settings.items()
        if len(values) > 1
        for value, refs in values.items()
    ]
    if not unlike:
        return ""
    return (
        f"Computed in unlike ways: {', '.join(unlike)}. These records compare: sums are rounded in another order, "
        "which moves log-likelihoods by less than 1e-4, and the last digits of scores with them."
    )


def _record_row(cell: Cell) -> tuple[Entry, ...]:
    record = cell.record
    made_by = record.made_by
    checkpoint = made_by.get("checkpoint") or {}
    return (
        # "#" makes this row the target of the links to the record.
        Entry(cell.ref, source=f"#{cell.ref}"),
        Entry(record.kind),
        text(cell.scheme if record.kind == "evaluation" else ""),
        _hash(record.key),
        _hash(made_by.get("code")),
        _hash(record.config_fingerprint),
        text("; ".join(_hashes(made_by.get("data")))),
        _hash(checkpoint.get("content_hash")),
        text(checkpoint.get("dtype")),
        text(made_by.get("kernel")),
        text((record.result.get("hellaswag") or {}).get("bos") or made_by.get("bos")),
        text(f"records/{record.key}.json", limit=200),
    )


def _hash(value: object) -> Entry:
    whole = str(value or "")
    return text(whole[:12])


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
    columns = (
        "Scheme",
        "Decoder weights by bits",
        "Modules",
        "Count",
        "Action",
        "Why",
        "Bits",
        "Weights",
        "Kernel",
    )
    note = "* stands for the layer's number. Embeddings and lm_head are no decoder weights. " + "; ".join(
        f"{name}: {meaning[:1].lower()}{meaning[1:]}" for name, meaning in KERNELS.items()
    )
    return Table("quantized", "What was quantized, and what was not", columns, grouped(pairs), note)


def _quantized_rows(cell: Cell) -> list[tuple[Entry, ...]]:
    """A row for each kind of module that had the same done to it for the same reason."""
    quantization = cell.record.result.get("quantization") or {}
    start = (
        text(cell.scheme, source=cell.ref, link=cell.ref),
        Entry(_shares(quantization.get("share_by_bits") or {}), source=cell.ref),
    )
    rows: list[tuple[Entry, ...]] = []
    for row in quantization.get("table") or []:
        count, weights = row.get("count", 1), row.get("num_weights") or 0
        modules = (
            text(_places(row), limit=200),
            number(count, 0, cell.ref),
            text(row.get("action")),
            prose(": ".join(str(row[name]) for name in ("why", "note") if row.get(name))),
        )
        sizes = (number(row.get("bits"), 0, cell.ref), number(count * weights, 0, cell.ref))
        rows.append((*start, *modules, *sizes, text(row.get("kernel"))))
    return rows or [(*start, *[Entry()] * 7)]


def _places(row: Mapping[str, Any]) -> str:
    """Names of modules; where a method took another way, the layers too."""
    name = str(row.get("name") or "")
    return f"{name}, layers {row['layers']}" if row.get("layers") else name


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
    rows: tuple[Row, ...] = tuple((text(problem.file), prose(problem.what)) for problem in run.problems)
    return Table("problems", "Damaged, and left out", ("File", "Why"), rows)
