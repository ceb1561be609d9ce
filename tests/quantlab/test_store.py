"""The folder is the only truth: first record wins, claims exclude, and a kill at any moment loses nothing finished."""

import fcntl
import hashlib
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from quantlab import locks
from quantlab.errors import OutputError
from quantlab.records import Record, fingerprint, read_items, read_run, record_key
from quantlab.sweep.executors import run_cells
from quantlab.sweep.store import RunStore

NUM_CELLS = 6


def made_by(number: int) -> dict[str, int]:
    return {"cell": number}


def compute(cell: tuple[str, int, float], advance) -> str:
    """A cell as the pipeline has it: claim, compute unless recorded, put. Leaves a mark each time it computes."""
    folder, number, seconds = cell
    store, key = RunStore(Path(folder)), record_key("evaluation", made_by(number))
    with store.claim(key) as absent:
        if absent:
            with (store.folder / "computed").open("a") as log:
                log.write(f"{number}\n")
            time.sleep(seconds)
            nats = np.random.default_rng(number).gamma(5, size=50)
            record = Record.of("evaluation", made_by(number), {"toy": True}, {"nats": nats.mean()})
            store.put(record, {"perplexity": {"item": np.arange(50), "nats": nats}}, {"pid": os.getpid()})
    advance(1)
    return key


def sweep(folder: Path, workers: int = 1, seconds: float = 0.0) -> list[str]:
    cells = [(str(folder), number, seconds) for number in range(NUM_CELLS)]
    RunStore(folder).open({"toy": True}, [record_key("evaluation", made_by(n)) for n in range(NUM_CELLS)])
    return run_cells(cells, compute, workers=workers)


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file that must not depend on history."""
    paths = [folder / "run.json", *(folder / "records").iterdir()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def computed(folder: Path) -> list[int]:
    return sorted(int(line) for line in (folder / "computed").read_text().split())


def start_sweep(folder: Path, workers: int, seconds: float) -> subprocess.Popen:
    program = (
        "import sys; from pathlib import Path; from tests.quantlab.test_store import sweep;"
        "sweep(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))"
    )
    arguments = [sys.executable, "-c", program, str(folder), str(workers), str(seconds)]
    return subprocess.Popen(arguments, env=os.environ | {"PYTHONPATH": "."})


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """What an uninterrupted sweep leaves."""
    folder = tmp_path_factory.mktemp("reference")
    sweep(folder)
    return contents(folder)


# ---- records by key


def test_a_recorded_cell_is_not_computed_again(tmp_path, reference):
    keys = sweep(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "records").iterdir()}
    assert sweep(tmp_path) == keys
    assert computed(tmp_path) == list(range(NUM_CELLS))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "records").iterdir()} == before
    assert contents(tmp_path) == reference


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_record_is_absent_and_computed_again(tmp_path, reference, suffix, damage, caplog):
    store, key = RunStore(tmp_path), sweep(tmp_path)[2]
    path = store.path(key).with_suffix(suffix)
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(flipped if damage == "flip" else content[:middle])
    assert store.get(key) is None and not store.has(key)
    said = [message for message in caplog.messages if "computed again" in message]
    assert bool(said) == (damage != "remove" or suffix == ".parquet")
    sweep(tmp_path)
    assert computed(tmp_path) == [0, 1, 2, 2, 3, 4, 5]
    assert contents(tmp_path) == reference


def test_the_first_record_wins(tmp_path):
    store = RunStore(tmp_path)
    columns = {"perplexity": {"nats": np.array([1.0, 2.0])}}
    first = store.put(Record.of("evaluation", made_by(0), {}, {"nats": 1.5}), columns, {"who": "first"})
    content = first.read_bytes()
    second = store.put(Record.of("evaluation", made_by(0), {}, {"nats": 9.0}), columns, {"who": "second"})
    assert second == first and first.read_bytes() == content
    assert "first" in (tmp_path / "sidecars" / first.name).read_text()
    record = store.get(first.stem)
    assert record is not None and record.result == {"nats": 1.5}
    assert list(read_items(tmp_path, record.key)["nats"]) == [1.0, 2.0]


def test_run_json_holds_config_fingerprint_and_plan(tmp_path):
    store = RunStore(tmp_path / "deep" / "run")
    store.open({"limit": 3, "path": Path("a/b")}, ["k1", "k0"])
    run = read_run(store.folder)
    assert run["config"] == {"limit": 3, "path": "a/b"}
    assert run["config_fingerprint"] == fingerprint(run["config"])
    assert run["records"] == ["k1", "k0"]
    store.open({"limit": 4}, ["k1", "k2"], joining=True)
    assert read_run(store.folder) == run | {"records": ["k1", "k0", "k2"]}
    store.open({"limit": 4}, ["k2"])
    assert read_run(store.folder)["config"] == {"limit": 4}
    assert read_run(store.folder)["records"] == ["k2"]


def test_a_folder_that_takes_no_results_is_refused_before_computing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="results must be writable"):
        RunStore(tmp_path / "file" / "run").open({}, [])


# ---- kill -9


def test_a_killed_sweep_goes_on_to_the_same_bytes(tmp_path, reference):
    parent = start_sweep(tmp_path, workers=2, seconds=0.5)
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("records/*.json"))) < 2:
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.01)
    family = [psutil.Process(parent.pid), *psutil.Process(parent.pid).children(recursive=True)]
    for process in family:
        process.kill()
    parent.wait()
    psutil.wait_procs(family, timeout=10)
    finished = {path.stem for path in tmp_path.glob("records/*.json")}
    assert 2 <= len(finished) < NUM_CELLS
    sweep(tmp_path, workers=2)
    assert contents(tmp_path) == reference
    repeated = len(computed(tmp_path)) - NUM_CELLS
    assert repeated <= 2, "at most the cells in flight, one a worker, are computed again"


def count_down_to_death(calls: int) -> None:
    """SIGKILL this process right before the given one of its calls that change the disk."""
    remaining = [calls]

    def deadly(function):
        def call(*args, **kwargs):
            remaining[0] -= 1
            if remaining[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for owner, name in [(Path, "open"), (os, "fsync"), (Path, "replace"), (Path, "unlink"), (os, "close")]:
        setattr(owner, name, deadly(getattr(owner, name)))


FAULTS = """
import os, sys
from pathlib import Path
from tests.quantlab import test_store as t
import pyarrow.parquet
root, calls = Path(sys.argv[1]), 0
t.NUM_CELLS = 2
t.sweep(root / "reference")
while True:
    calls += 1
    folder = root / str(calls)
    child = os.fork()
    if child == 0:
        t.count_down_to_death(calls)
        t.sweep(folder)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    t.sweep(folder)
    assert t.contents(folder) == t.contents(root / "reference"), f"killed before call {calls}"
    assert len(t.computed(folder)) <= 3, f"killed before call {calls}"
    if status == 0:
        break
    assert os.WTERMSIG(status) == 9
print(calls - 1)
"""


def test_a_kill_before_any_change_of_the_disk_loses_at_most_one_cell(tmp_path):
    """Kill the sweep before its first, second, ... write, sync, rename or unlink; every resumption ends the same."""
    environment = os.environ | {"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, tmp_path], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    # Each of 2 cells changes the disk at least at open, sync, rename and sync of its three files.
    assert int(done.stdout) >= 24


# ---- two sweeps in one folder


def test_two_sweeps_in_one_folder_compute_each_cell_once(tmp_path, reference):
    sweeps = [start_sweep(tmp_path, workers=1, seconds=0.1) for _ in range(2)]
    assert [process.wait(timeout=60) for process in sweeps] == [0, 0]
    assert computed(tmp_path) == list(range(NUM_CELLS))
    assert contents(tmp_path) == reference
    assert list((tmp_path / ".claims").iterdir()) == []


def test_a_claim_ends_with_its_process(tmp_path):
    """The holder is killed while another waits: the waiter goes on at once and finds the cell still to be done."""
    key, store = record_key("evaluation", made_by(0)), RunStore(tmp_path)
    holder = start_sweep(tmp_path, workers=1, seconds=60)
    deadline = time.monotonic() + 30
    while not (tmp_path / "computed").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with (tmp_path / ".claims" / key).open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    holder.kill()
    holder.wait()
    with store.claim(key) as absent:
        assert absent
    assert not (tmp_path / ".claims" / key).exists()


def test_a_lock_on_a_removed_file_is_no_claim(tmp_path, monkeypatch):
    """While we waited, the holder removed the claim's file and a third process made a new one."""
    path, real = tmp_path / ".claims" / "key", locks._wait_for

    def wait_while_others_move(descriptor: int, waited: Path) -> bool:
        monkeypatch.setattr(locks, "_wait_for", real)
        path.unlink()
        path.touch()
        return real(descriptor, waited)

    monkeypatch.setattr(locks, "_wait_for", wait_while_others_move)
    with (
        RunStore(tmp_path).claim("key"),
        path.open() as file,
        pytest.raises(BlockingIOError),
    ):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_claim_removes_what_a_killed_writer_left(tmp_path):
    store, key = RunStore(tmp_path), "ab" * 32
    store.open({}, [])
    leftovers = [tmp_path / name / f".{key}.json.0123.tmp" for name in ("records", "sidecars")]
    foreign = tmp_path / "records" / f".{'cd' * 32}.json.0123.tmp"
    for path in [*leftovers, foreign]:
        path.write_bytes(b"half")
    with store.claim(key):
        assert [path.exists() for path in leftovers] == [False, False]
        assert foreign.exists(), "another cell's writer may be alive"


def test_without_locks_the_cell_is_computed_and_nobodys_part_is_removed(tmp_path, monkeypatch):
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    store, key = RunStore(tmp_path), "ab" * 32
    store.open({}, [])
    part = tmp_path / "records" / f".{key}.json.0123.tmp"
    part.write_bytes(b"half")
    with store.claim(key) as absent:
        assert absent and part.exists()


def test_waiting_is_said(tmp_path, caplog):
    store, key = RunStore(tmp_path), record_key("evaluation", made_by(0))
    other = start_sweep(tmp_path, workers=1, seconds=0.5)
    deadline = time.monotonic() + 30
    while not (tmp_path / "computed").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with caplog.at_level(logging.INFO), store.claim(key) as absent:
        assert not absent, "the other sweep has recorded it meanwhile"
    assert any("another process works on this" in message for message in caplog.messages)
    other.kill()
    other.wait()
