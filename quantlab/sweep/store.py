"""The run's folder as the only truth about what is done: look up, claim, put.

A record that is there and whole is never computed again; a damaged one counts as absent. Two sweeps may share a
folder: whoever holds a cell's claim computes it and the other waits, then finds the record. A claim is a lock of the
operating system (flock), so it ends with its process, however that dies: there is no stale claim to judge by pid or
clock. Where the file system has no such locks, both compute the cell, to the same bytes.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlab.errors import RecordError
from quantlab.locks import locked, make_folder
from quantlab.records import (
    Columns,
    Record,
    check_writable,
    fingerprint,
    plain,
    read_record,
    read_run,
    write_record,
    write_sealed,
)

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunStore:
    """Records of the run at `folder`. Holds no state, so workers make their own from the path."""

    folder: Path

    def open(self, config: Mapping[str, Any], keys: Sequence[str], *, joining: bool = False) -> None:
        """Check that the folder takes results, and write run.json, before anything is computed.

        Args:
            config: the resolved configuration.
            keys: records that this run plans, in order.
            joining: keep the configuration and the records of the run that is there, and add these to its plan.

        Raises:
            OutputError: the folder cannot be written.
            RecordError: the run.json that is to be joined is damaged.
        """
        check_writable(self.folder)
        for name in ("records", "sidecars"):
            make_folder(self.folder / name)
        body = {"config": plain(config), "config_fingerprint": fingerprint(config), "records": list(keys)}
        with self._held("run"):
            if joining and (self.folder / "run.json").exists():
                there = read_run(self.folder)
                body = there | {"records": list(dict.fromkeys([*there["records"], *keys]))}
            write_sealed(self.folder / "run.json", body)

    def path(self, key: str) -> Path:
        """Where the record of this key is or will be."""
        return self.folder / "records" / f"{key}.json"

    def get(self, key: str) -> Record | None:
        """The record of this key, or none where it is missing, damaged or of another format."""
        try:
            return read_record(self.path(key))
        except RecordError as error:
            if self.path(key).exists():
                _LOG.warning("to be computed again: %s", error)
            return None

    def has(self, key: str) -> bool:
        """Whether a whole record of this key is there."""
        return self.get(key) is not None

    def put(self, record: Record, items: Mapping[str, Columns], sidecar: Mapping[str, Any]) -> Path:
        """Write the record unless a whole one is there: the first wins. Returns its path."""
        if self.has(record.key):
            return self.path(record.key)
        return write_record(self.folder, record, items, sidecar)

    @contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Be the only one that computes this key; yields whether it still has to be computed.

        Waits while another process holds the claim.
        """
        with self._held(key):
            yield not self.has(key)

    @contextmanager
    def _held(self, name: str) -> Iterator[None]:
        """Be the only writer of NAME's files; what a killed writer left half-written is removed."""
        with locked(self.folder / ".claims" / name) as held:
            if held:
                self._remove_leftovers(name)
            yield

    def _remove_leftovers(self, name: str) -> None:
        for folder in (self.folder, self.folder / "records", self.folder / "sidecars"):
            for leftover in folder.glob(f".{name}.*.tmp"):
                leftover.unlink(missing_ok=True)
