"""A run's folder -> `Run`: its readable records in a fixed order, their per-item results, holes and damage.

Every record gets a short reference, R1, R2, …, by which tables, findings and captions name it. A damaged record is
never used and never silent: it becomes a `Problem`. A planned cell without a record becomes a `Hole`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from quantlab.records import Record, RecordError, read_items, read_record, read_run, read_sidecar
from reports.machines import machine_of
from reports.planned import Hole, Pairing, holes, pairing
from reports.scheme_names import BASELINE as BASELINE
from reports.scheme_names import read_scheme

_KINDS = ("nothing", "weights", "weights + activations", "activations", "attention logits")


@dataclass(frozen=True)
class Problem:
    """A file of the run that was left out, and why."""

    file: str
    what: str


@dataclass(frozen=True)
class Cell:
    """One recorded cell: a record, its reference, its checkpoint's label and its per-item results."""

    ref: str
    checkpoint: str
    record: Record
    items: pd.DataFrame = field(repr=False)
    machine: str = ""
    """What computed it, from its sidecar; empty where that does not say."""

    @property
    def scheme(self) -> str:
        """Canonical scheme name; the baseline for a profile."""
        return _scheme(self.record)

    def of_task(self, task: str) -> pd.DataFrame:
        """Per-item results of one task, indexed by item; empty where the task was not scored."""
        if "task" not in self.items or "item" not in self.items:
            return pd.DataFrame()
        rows = self.items[self.items["task"] == task]
        return rows.set_index("item").sort_index().dropna(axis="columns", how="all")


@dataclass(frozen=True)
class Run:
    """What a run left behind."""

    name: str
    cells: tuple[Cell, ...]
    holes: tuple[Hole, ...] = ()
    pairing: Pairing | None = None
    """What the configuration's section `compare` says; none where it says nothing."""
    problems: tuple[Problem, ...] = ()
    num_unplanned: int = 0
    """Records in the folder that the run does not plan: made by other settings, data or sources; not used."""

    def of_kind(self, kind: str) -> tuple[Cell, ...]:
        """The cells of kind "evaluation" or "profile"."""
        return tuple(cell for cell in self.cells if cell.record.kind == kind)

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """Labels of the checkpoints, named holes included, in the order of tables and colours."""
        holes = (hole.checkpoint for hole in self.holes if hole.kind != "unknown")
        return tuple(dict.fromkeys([*(cell.checkpoint for cell in self.cells), *holes]))


def scheme_order(scheme: str) -> tuple[int, str, int, str]:
    """Sort key: the baseline, then what is quantized, then bits from many to few."""
    parsed = read_scheme(scheme)
    place = _KINDS.index(parsed.kinds) if parsed.kinds in _KINDS else len(_KINDS)
    return place, parsed.kinds, -parsed.bits, scheme


def spans(refs: Sequence[str]) -> str:
    """References in short: `R1, R3–R5`."""
    numbers = [int(ref[1:]) for ref in refs]
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(f"R{a}" if a == b else f"R{a}–R{b}" for a, b in zip(starts, ends, strict=True))


def load_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises:
        RecordError: the folder holds no record that can be read.
    """
    problems: list[Problem] = []
    plan = _read_plan(folder, problems)
    planned = None if plan is None else plan["records"]
    found = {path.stem: path for path in sorted((folder / "records").glob("[!.]*.json"))}
    chosen = found if planned is None else {key: found[key] for key in planned if key in found}
    read = [pair for key, path in chosen.items() if (pair := _read_cell(folder, key, path, problems))]
    if not read:
        faults = "".join(f" {problem.file}: {problem.what}" for problem in problems[:1])
        raise RecordError(
            f"a report needs a run's folder with at least one whole record: {folder} has none.{faults}"
        )
    cells = tuple(
        replace(cell, machine=machine_of(read_sidecar(folder, cell.record.key)))
        for cell in _number(read, _labels([record for record, _ in read]))
    )
    missing = () if plan is None else holes(plan, cells)
    name = str((plan or {}).get("config", {}).get("name") or folder.resolve().name)
    return Run(name, cells, missing, pairing(plan, cells), tuple(problems), len(found) - len(chosen))


def _read_plan(folder: Path, problems: list[Problem]) -> dict[str, Any] | None:
    if not (folder / "run.json").exists():
        return None
    try:
        return read_run(folder)
    except RecordError as error:
        problems.append(Problem("run.json", _reason(error, folder)))
        return None


def _read_cell(
    folder: Path, key: str, path: Path, problems: list[Problem]
) -> tuple[Record, pd.DataFrame] | None:
    try:
        record = read_record(path)
        return record, read_items(folder, key) if record.items_sha256 else pd.DataFrame()
    except RecordError as error:
        problems.append(Problem(f"records/{path.name}", _reason(error, folder)))
        return None


def _reason(error: RecordError, folder: Path) -> str:
    """The error's sentence with paths as seen from the run's folder, so that a moved run gives the same report."""
    return str(error).replace(f"{folder}/", "")


def _labels(records: Sequence[Record]) -> list[str]:
    """A checkpoint's name for each record, with dtype or content hash behind it where two would share a name."""
    sources = [record.made_by.get("checkpoint") or {} for record in records]
    plain = [str(source.get("name") or "unnamed checkpoint") for source in sources]
    typed = [f"{name}, {source.get('dtype')}" for name, source in zip(plain, sources, strict=True)]
    hashed = [
        f"{name}, {str(source.get('content_hash'))[:8]}" for name, source in zip(typed, sources, strict=True)
    ]
    for labels in (plain, typed):
        pairs = Counter(label for label, _ in set(zip(labels, hashed, strict=True)))
        if max(pairs.values()) == 1:
            return labels
    return hashed


def _number(read: Sequence[tuple[Record, pd.DataFrame]], labels: Sequence[str]) -> tuple[Cell, ...]:
    """Cells by checkpoint (in the order found), profiles first, then schemes from 16 bits down; numbered from R1."""
    places = {label: place for place, label in enumerate(dict.fromkeys(labels))}
    rows = [(label, record, items) for label, (record, items) in zip(labels, read, strict=True)]
    rows.sort(
        key=lambda row: (places[row[0]], row[1].kind != "profile", scheme_order(_scheme(row[1])), row[1].key)
    )
    return tuple(
        Cell(f"R{i}", label, record, items) for i, (label, record, items) in enumerate(rows, start=1)
    )


def _scheme(record: Record) -> str:
    return str(record.made_by.get("scheme") or BASELINE)
