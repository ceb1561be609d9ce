"""A record is the same bytes for the same inputs, appears whole or not at all, and no altered byte goes unnoticed."""

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from quantlab import records
from quantlab.errors import OutputError, RecordError
from quantlab.records import (
    Record,
    check_writable,
    fingerprint,
    plain,
    read_items,
    read_record,
    read_records,
    record_key,
    source_hash,
    write_atomic,
    write_record,
)

MADE_BY = {"checkpoint": "ab12", "scheme": "w4g64", "seeds": (0, 1)}
CONFIG = {"name": "toy", "limit": 3}
SIDECAR = {"host": "here", "seconds": 1.5}


def scores(shift: float = 0.0) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return {
        "hellaswag": {
            "item": np.arange(3),
            "correct": np.array([True, False, True]),
            "margin": rng.normal(size=3) + shift,
        },
        "perplexity": {"item": np.arange(2), "nats": rng.gamma(5, size=2)},
    }


def record(result: dict | None = None, made_by: dict | None = None) -> Record:
    return Record.of("evaluation", made_by or MADE_BY, CONFIG, result or {"hellaswag": {"acc": 0.5, "n": 3}})


@pytest.fixture
def written(tmp_path):
    """Path of a record with per-item results."""
    return write_record(tmp_path, record(), scores(), SIDECAR)


# ---- what is written is what is read


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
        "import sys; from pathlib import Path; from tests.quantlab.test_records import *;"
        "write_record(Path(sys.argv[1]), record(), scores(), {})"
    )
    other = written.parent.parent / "other"
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": "."}
    subprocess.run([sys.executable, "-c", program, other], check=True, env=environment)
    for path in written.parent.iterdir():
        assert path.read_bytes() == (other / "records" / path.name).read_bytes()


def test_the_key_follows_from_all_inputs_and_not_from_results():
    keys = [
        record_key("evaluation", MADE_BY),
        record_key("profile", MADE_BY),
        *(record_key("evaluation", MADE_BY | {name: "other"}) for name in MADE_BY),
    ]
    assert len(set(keys)) == len(keys)
    assert record({"acc": 1}).key == record({"acc": 2}).key
    assert record_key("evaluation", dict(reversed(MADE_BY.items()))) == keys[0]


def test_numbers_that_are_not_finite_are_null_and_named(tmp_path):
    result = {"a": [1.0, float("nan")], "b": {"c": np.float32("-inf")}}
    read = read_record(write_record(tmp_path, record(result), {}, {}))
    assert read.result == {"a": [1.0, None], "b": {"c": None}}
    assert read.nonfinite == {"a.1": "nan", "b.c": "-inf"}


def test_what_is_hashed_must_be_finite():
    with pytest.raises(ValueError, match="not JSON compliant"):
        Record.of("profile", {"x": float("nan")}, CONFIG, {})


def test_plain_data_knows_numpy_paths_and_integer_keys():
    value = {
        16: np.float64(0.5),
        "p": Path("a/b"),
        "t": (np.int8(3), np.array([[1, 2]])),
        "b": np.bool_(True),
    }
    assert plain(value) == {"16": 0.5, "p": "a/b", "t": [3, [[1, 2]]], "b": True}
    with pytest.raises(AssertionError, match="one text"):
        plain({1: "a", "1": "b"})
    with pytest.raises(AssertionError, match="not plain data: set"):
        plain({"s": {1}})


def test_text_of_any_kind_survives(tmp_path):
    result = {"token": "\udc80 </script> \x00 \u202e é"}
    assert read_record(write_record(tmp_path, record(result), {}, {})).result == result


def test_source_hash_is_of_names_and_contents(tmp_path):
    assert source_hash() == source_hash() and len(source_hash()) == 64
    seen = set()
    for name, content in [("a.py", "x = 1"), ("a.py", "x = 2"), ("b.py", "x = 2"), ("c.txt", "y")]:
        (tmp_path / "probes").mkdir(exist_ok=True)
        (tmp_path / "probes" / name).write_text(content)
        seen.add(records._tree_hash(tmp_path, ("probes", "quantlab")))
    assert len(seen) == 3  # the text file is no source


# ---- which records a run has


def test_records_of_a_folder_come_by_key(tmp_path):
    keys = [write_record(tmp_path, record(made_by={"n": n}), {}, {}).stem for n in range(4)]
    assert [r.key for r in read_records(tmp_path)] == sorted(keys)


def test_records_of_a_run_are_those_it_plans(tmp_path):
    keys = [write_record(tmp_path, record(made_by={"n": n}), {}, {}).stem for n in range(4)]
    planned = [keys[2], "0" * 64, keys[0]]
    records.write_sealed(tmp_path / "run.json", {"config": {}, "config_fingerprint": "", "records": planned})
    assert [r.key for r in read_records(tmp_path)] == [keys[2], keys[0]]


def test_a_folder_without_records_is_named(tmp_path):
    with pytest.raises(RecordError, match=r"must hold records: .* has no folder 'records'"):
        read_records(tmp_path / "nothing")


# ---- damage


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
        patch.setattr(records, "SCHEMA", version)
        path = write_record(tmp_path, record(), {}, {})
    with pytest.raises(RecordError, match=f"must be of format 1, .* is of format {version!r}"):
        read_record(path)


def test_an_endless_file_is_not_read(tmp_path, monkeypatch, written):
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 100)
    with pytest.raises(RecordError, match="larger than 100 bytes"):
        read_record(written)
    fifo = tmp_path / "fifo.json"
    os.mkfifo(fifo)
    with pytest.raises(RecordError, match="must be a file"):
        read_record(fifo)


# ---- places that cannot be written


def failing(number: int):
    def call(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("step", ["fsync", "replace", "open"])
def test_a_failed_write_leaves_the_old_file_and_no_part(tmp_path, monkeypatch, number, step):
    path = tmp_path / "x.json"
    write_atomic(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(
            *{"fsync": (os, "fsync"), "replace": (Path, "replace"), "open": (Path, "open")}[step],
            failing(number),
        )
        with pytest.raises(OutputError, match=rf"x\.json \(3 bytes\): {os.strerror(number)}"):
            write_atomic(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    assert path.read_bytes() == b"old"


def test_an_interrupted_write_leaves_no_part(tmp_path, monkeypatch):
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "x", b"new")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_found_before_computing(tmp_path):
    # A real limit of the kernel: no file of this process may grow beyond 1,000 bytes.
    program = (
        "import sys; from pathlib import Path; from quantlab.records import *;"
        "from quantlab.errors import OutputError\n"
        "folder = Path(sys.argv[1]); write_atomic(folder / 'small', b'x' * 1000)\n"
        "try: check_writable(folder)\n"
        "except OutputError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
        env=os.environ | {"PYTHONPATH": ".", "PYTHONDONTWRITEBYTECODE": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert f"results must be writable: {tmp_path} (1048576 bytes): File too large." in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "runs", Path("/proc/nothing/runs")):
        with pytest.raises(OutputError, match=f"results must be writable: {folder}"):
            check_writable(folder)


def test_a_writable_folder_stays_empty(tmp_path):
    check_writable(tmp_path / "new" / "run")
    assert list((tmp_path / "new" / "run").iterdir()) == []
