"""A record is the same bytes for the same inputs, appears whole or not at all, and no altered byte goes unnoticed."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from quantlab.errors import RecordError
from quantlab.records import (
    fingerprint,
    plain,
    read_items,
    read_record,
    read_records,
    record_key,
    sealed,
    write_record,
    write_sealed,
)
from tests.quantlab.records.toy_records import CONFIG, MADE_BY, SIDECAR, record, scores


@pytest.fixture
def written(tmp_path):
    """Path of a record with per-item results."""
    return write_record(tmp_path, record(), scores(), SIDECAR)


def test_record_and_items_come_back(tmp_path, written):
    read = read_record(written)
    assert read.key == record_key("evaluation", MADE_BY) == written.stem
    assert (read.result, read.made_by) == ({"hellaswag": {"acc": 0.5, "n": 3}}, plain(MADE_BY))
    assert (read.config, read.config_fingerprint) == (CONFIG, fingerprint(CONFIG))
    frame = read_items(tmp_path, read.key)
    assert list(frame["task"]) == ["hellaswag"] * 3 + ["perplexity"] * 2


def test_items_of_one_task_keep_their_columns_and_types(tmp_path, written):
    frame = read_items(tmp_path, written.stem, "hellaswag")
    for name, column in scores()["hellaswag"].items():
        assert frame[name].dtype == column.dtype
        assert np.array_equal(frame[name], column)
    assert "nats" not in frame


def test_items_hold_text_and_nan(tmp_path):
    columns = {"token": np.array(["é", "</script>"], dtype=object), "nats": np.array([np.nan, 1.0])}
    path = write_record(tmp_path, record(), {"perplexity": columns}, {})
    frame = read_items(tmp_path, path.stem, "perplexity")
    assert list(frame["token"]) == ["é", "</script>"]
    assert np.array_equal(frame["nats"], columns["nats"], equal_nan=True)


def test_record_without_items(tmp_path):
    path = write_record(tmp_path, record(), {}, SIDECAR)
    assert read_record(path).items_sha256 is None and not path.with_suffix(".parquet").exists()
    with pytest.raises(RecordError, match="has none"):
        read_items(tmp_path, path.stem)


def test_same_inputs_are_the_same_bytes_whatever_the_sidecar(tmp_path):
    contents = []
    for run, sidecar in (("a", SIDECAR), ("b", {"host": "there", "seconds": float("inf")})):
        path = write_record(tmp_path / run, record(), scores(), sidecar)
        contents.append((path.name, path.read_bytes(), path.with_suffix(".parquet").read_bytes()))
    assert contents[0] == contents[1]
    assert json.loads((tmp_path / "b" / "sidecars" / contents[0][0]).read_text())["seconds"] is None


def test_same_inputs_are_the_same_bytes_in_another_process(written):
    program = (
        "import sys; from pathlib import Path; from quantlab.records import write_record;"
        "from tests.quantlab.records.toy_records import *;"
        "write_record(Path(sys.argv[1]), record(), scores(), {})"
    )
    other = written.parent.parent / "other"
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": "."}
    subprocess.run([sys.executable, "-c", program, other], check=True, env=environment)
    for path in written.parent.iterdir():
        assert path.read_bytes() == (other / "records" / path.name).read_bytes()


def test_numbers_that_are_not_finite_are_null_and_named(tmp_path):
    result = {"a": [1.0, float("nan")], "b": {"c": np.float32("-inf")}}
    read = read_record(write_record(tmp_path, record(result), {}, {}))
    assert read.result == {"a": [1.0, None], "b": {"c": None}}
    assert read.nonfinite == {"a.1": "nan", "b.c": "-inf"}


def test_text_of_any_kind_survives(tmp_path):
    result = {"token": "\udc80 </script> \x00 \u202e é"}
    assert read_record(write_record(tmp_path, record(result), {}, {})).result == result


def test_records_of_a_folder_come_by_key(tmp_path):
    keys = [write_record(tmp_path, record(made_by={"n": n}), {}, {}).stem for n in range(4)]
    assert [r.key for r in read_records(tmp_path)] == sorted(keys)


def test_records_of_a_run_are_those_it_plans(tmp_path):
    keys = [write_record(tmp_path, record(made_by={"n": n}), {}, {}).stem for n in range(4)]
    planned = [keys[2], "0" * 64, keys[0]]
    write_sealed(tmp_path / "run.json", {"config": {}, "config_fingerprint": "", "records": planned})
    assert [r.key for r in read_records(tmp_path)] == [keys[2], keys[0]]


def test_a_folder_without_records_is_named(tmp_path):
    with pytest.raises(RecordError, match=r"must hold records: .* has no folder 'records'"):
        read_records(tmp_path / "nothing")


def damaged_copies(content: bytes, num_flips: int):
    """Every byte (or a seeded sample) with one bit flipped, and the file cut at as many places."""
    rng = np.random.default_rng(5)
    positions = range(len(content))
    if len(content) > num_flips:
        positions = rng.choice(len(content), num_flips, replace=False)
    for position in positions:
        flipped = bytearray(content)
        flipped[position] ^= 1 << rng.integers(8)
        yield bytes(flipped)
        yield content[:position]
    yield content + b"\n"


def test_every_flipped_bit_and_every_cut_is_found(tmp_path, written):
    for path in (written, written.with_suffix(".parquet")):
        content = path.read_bytes()
        for damaged in damaged_copies(content, num_flips=1000):
            path.write_bytes(damaged)
            with pytest.raises(RecordError):
                read_record(written)
        path.write_bytes(content)
    read_record(written)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[1]",
        b'{"schema": 1}',
        b"[" * 100_000,
        b'{"checksum": "", "schema": 1, "x": NaN}',
        b'{"checksum": "", "schema": 1, "x": 1e999}',
        b"\xff\xfe{\x00}\x00",
    ],
    ids=["empty", "null", "list", "no checksum", "deep", "nan", "overflow", "utf-16"],
)
def test_a_file_that_is_no_record_is_named(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=r"x\.json"):
        read_record(path)


def test_a_record_under_another_name_is_refused(written):
    other = written.with_name("0" * 64 + ".json")
    written.rename(other)
    with pytest.raises(RecordError, match="not the key of what made it"):
        read_record(other)


def test_a_record_whose_items_are_gone_is_refused(written):
    written.with_suffix(".parquet").unlink()
    with pytest.raises(RecordError, match=r"must be a file: .*\.parquet"):
        read_record(written)


@pytest.mark.parametrize("version", [0, 2, "1"])
def test_another_format_version_is_named(tmp_path, monkeypatch, version):
    with monkeypatch.context() as patch:
        patch.setattr(sealed, "SCHEMA", version)
        path = write_record(tmp_path, record(), {}, {})
    with pytest.raises(RecordError, match=f"must be of format 1, .* is of format {version!r}"):
        read_record(path)


def test_an_endless_file_is_not_read(tmp_path, monkeypatch, written):
    monkeypatch.setattr(sealed, "MAX_RECORD_BYTES", 100)
    with pytest.raises(RecordError, match="larger than 100 bytes"):
        read_record(written)
    fifo = tmp_path / "fifo.json"
    os.mkfifo(fifo)
    with pytest.raises(RecordError, match="must be a file"):
        read_record(fifo)
