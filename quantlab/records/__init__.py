"""What a run leaves behind: one JSON and one Parquet a cell, written atomically, checked whenever they are read.

    RUN/run.json                resolved config, its fingerprint, and the keys of the records that the run plans
    RUN/records/KEY.json        the record: what made it and what came out
    RUN/records/KEY.parquet     its per-item results (column `task` says whose)
    RUN/sidecars/KEY.json       time, host and speed: everything that two equal runs do not share
    RUN/report/                 built from the above

KEY is the SHA-256 of what made the record (`made_by`: checkpoint content, scheme, data, settings, sources), never of a
name or a time. Its section `computation` says how, where that moves the last digits; all else says what was computed.
The same inputs give the same bytes. The Parquet is written first and the JSON last, with the Parquet's hash and its own
in it: a record exists when its JSON does, and a damaged one is a `RecordError`.

JSON has no NaN and no infinity. In a result such a number becomes null and `nonfinite` says what stood there;
in what is hashed (`made_by`, `config`) it is refused.
"""

# Errors with them: what reading and writing raises, for those who know records only.
from quantlab.errors import OutputError, RecordError
from quantlab.records.atomic import check_writable, write_atomic
from quantlab.records.canonical import fingerprint, plain
from quantlab.records.items import Columns
from quantlab.records.record import COMPUTATION, Kind, Record, measured_on, record_key, what_was_computed
from quantlab.records.run_folder import (
    read_items,
    read_record,
    read_records,
    read_run,
    read_sidecar,
    write_record,
)
from quantlab.records.sealed import write_sealed
from quantlab.records.sources import reachable_hash, source_hash

__all__ = [
    "COMPUTATION",
    "Columns",
    "Kind",
    "OutputError",
    "Record",
    "RecordError",
    "check_writable",
    "fingerprint",
    "measured_on",
    "plain",
    "reachable_hash",
    "read_items",
    "read_record",
    "read_records",
    "read_run",
    "read_sidecar",
    "record_key",
    "source_hash",
    "what_was_computed",
    "write_atomic",
    "write_record",
    "write_sealed",
]
