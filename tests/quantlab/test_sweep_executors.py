"""Every cell gets its result or its error, whatever happens to the processes; nothing outlives the parent."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from quantlab.errors import EvaluationError, OutputError, SchemeError
from quantlab.sweep import workers as room
from quantlab.sweep.executors import CellError, Event, run_cells

_served: list[object] = []
"""Cells that this process has computed, as a model kept at module level would be."""


def compute(cell, advance):
    """What a cell does is its first word; the rest are its arguments."""
    _served.append(cell)
    action, *rest = cell
    if action == "square":
        advance(1)
        advance(2)
        return rest[0] ** 2
    if action == "process":
        return (
            os.getpid(),
            len(_served),
            os.environ["OMP_NUM_THREADS"],
            signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        )
    if action == "refuse":
        raise SchemeError(f"no such scheme: {rest[0]}.")
    if action == "pause":
        return time.sleep(0.1)
    if action == "full":
        raise OutputError("results must be writable: disk full.")
    if action == "bug":
        return {}["missing"]
    if action == "unpicklable":
        return lambda: None
    if action == "die":  # as often as the file has lines left
        lines = Path(rest[0]).read_text().splitlines()
        if lines:
            Path(rest[0]).write_text("\n".join(lines[1:]))
            advance(1)
            os.kill(os.getpid(), signal.SIGKILL)
        return "survived"
    assert action == "sleep"
    Path(rest[0]).write_text(str(os.getpid()))
    advance(1)
    time.sleep(60)
    return None


def kinds_by_cell(events: list[Event]) -> dict[int, list[str]]:
    cells: dict[int, list[str]] = {}
    for event in events:
        cells.setdefault(event.cell, []).append(event.kind)
    return cells


def wait_until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_cells(workers):
    events: list[Event] = []
    cells = [("square", n) for n in range(5)]
    assert run_cells(cells, compute, workers=workers, on_event=events.append) == [0, 1, 4, 9, 16]
    assert [e.cell for e in events if e.kind == "started"] == list(range(5))
    assert set(map(tuple, kinds_by_cell(events).values())) == {
        ("started", "advanced", "advanced", "finished")
    }
    assert sum(e.amount for e in events) == 15


@pytest.mark.parametrize("workers", [1, 2])
def test_no_cells_is_no_work(workers):
    assert run_cells([], compute, workers=workers) == []


def test_workers_live_long_with_their_threads_and_without_interrupts(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    results = run_cells([("process",)] * 6, compute, workers=2, threads=3)
    pids = {pid for pid, _, _, _ in results}
    assert len(pids) <= 2 and os.getpid() not in pids
    assert max(served for _, served, _, _ in results) >= 3
    assert {threads for _, _, threads, _ in results} == {"3"}
    assert all(signal.SIGINT in blocked for *_, blocked in results)
    assert "OMP_NUM_THREADS" not in os.environ
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.parametrize("workers", [1, 2])
def test_a_users_error_stops_no_other_cell_and_keeps_its_type(workers):
    events: list[Event] = []
    cells = [("refuse", "w99"), ("square", 3), ("refuse", "w98"), ("square", 4)]
    with pytest.raises(SchemeError, match=r"^no such scheme: w99\.") as caught:
        run_cells(cells, compute, workers=workers, on_event=events.append)
    assert caught.value.__notes__ == ["2 of 4 cells failed"]
    ends = {cell: kinds[-1] for cell, kinds in kinds_by_cell(events).items()}
    assert ends == {0: "failed", 1: "finished", 2: "failed", 3: "finished"}
    assert [e.message for e in events if e.kind == "failed"] == [
        "no such scheme: w99.",
        "no such scheme: w98.",
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bug_brings_its_traceback_and_comes_before_a_users_error(workers):
    events: list[Event] = []
    cells = [("refuse", "w99"), ("bug",), ("square", 3)]
    with pytest.raises(CellError, match=r"(?s)a bug in cell 1:.*line \d+, in compute.*KeyError: 'missing'"):
        run_cells(cells, compute, workers=workers, on_event=events.append)
    assert kinds_by_cell(events)[2][-1] == "finished"
    assert [e.message for e in events if e.cell == 1 and e.kind == "failed"] == ["KeyError: 'missing'"]


@pytest.mark.parametrize("workers", [1, 2])
def test_no_cell_is_begun_once_results_cannot_be_written(workers):
    events: list[Event] = []
    cells = [("square", 1), ("full",), *[("pause",)] * 20]
    with pytest.raises(OutputError, match="disk full"):
        run_cells(cells, compute, workers=workers, on_event=events.append)
    begun = kinds_by_cell(events)
    assert begun[0][-1] == "finished"
    assert all(kinds[-1] in ("finished", "failed") for kinds in begun.values()), "cells in flight are kept"
    # The cell before it, and with two workers what the other took on while this one failed.
    assert len(begun) == 2 if workers == 1 else len(begun) < len(cells)


def test_a_result_that_does_not_pickle_is_a_bug():
    with pytest.raises(CellError, match="pickle"):
        run_cells([("unpicklable",)], compute, workers=2)


def test_a_killed_worker_is_replaced_and_its_cell_tried_again(tmp_path):
    (tmp_path / "deaths").write_text("1\n2")
    events: list[Event] = []
    cells = [("die", str(tmp_path / "deaths")), ("square", 3)]
    assert run_cells(cells, compute, workers=2, on_event=events.append) == ["survived", 9]
    died = ["started", "advanced", "retried"]
    assert kinds_by_cell(events)[0] == [*died, *died, "started", "finished"]
    assert "SIGKILL" in next(e.message for e in events if e.kind == "retried")


def test_a_cell_that_kills_every_worker_is_named_and_the_others_go_on(tmp_path):
    (tmp_path / "deaths").write_text("\n".join("12345678"))
    events: list[Event] = []
    cells = [("die", str(tmp_path / "deaths")), ("square", 3), ("square", 4)]
    with pytest.raises(EvaluationError, match=r"lost 3 times, last by signal SIGKILL.* Use fewer workers"):
        run_cells(cells, compute, workers=2, on_event=events.append)
    assert kinds_by_cell(events)[1][-1] == kinds_by_cell(events)[2][-1] == "finished"
    assert (tmp_path / "deaths").read_text().split() == list("45678")


def test_a_worker_that_cannot_start_is_a_bug_at_once(monkeypatch, capfd):
    def vanish(cell, advance):
        return None

    vanish.__qualname__ = "no_such_function"
    monkeypatch.setattr(sys.modules[__name__], "no_such_function", vanish, raising=False)
    with pytest.raises(CellError, match="could not start: exit code 1"):
        run_cells([("square", 1)], vanish, workers=2)
    assert "no_such_function" in capfd.readouterr().err


def test_an_interrupt_ends_the_workers_at_once(tmp_path):
    interrupted: list[float] = []

    def interrupt(event: Event) -> None:
        if event.kind == "advanced":
            interrupted.append(time.monotonic())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cells = [("sleep", str(tmp_path / name)) for name in ("first", "second")]
        run_cells(cells, compute, workers=2, on_event=interrupt)
    assert time.monotonic() - interrupted[0] < 4, "cells in flight are not waited for"
    pids = [int(path.read_text()) for path in tmp_path.iterdir()]
    assert pids and not any(map(psutil.pid_exists, pids))


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_its_parent(tmp_path, blow):
    pid_file = tmp_path / "pid"
    program = (
        # A shell that starts its jobs in the background makes them ignore SIGINT, and whatever they start.
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from quantlab.sweep.executors import run_cells;"
        "from tests.quantlab.test_sweep_executors import compute;"
        "run_cells([('sleep', sys.argv[1])], compute, workers=2)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, pid_file],
        env=os.environ | {"PYTHONPATH": "."},
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: pid_file.exists() and pid_file.read_text())
    children = psutil.Process(parent.pid).children(recursive=True)
    assert int(pid_file.read_text()) in [child.pid for child in children]
    parent.send_signal(blow)
    parent.wait(timeout=20)
    assert psutil.wait_procs(children, timeout=20)[1] == []


def test_a_worker_that_ended_without_a_word_is_dead() -> None:
    """Else its parent would ask it for ever."""
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    worker = room._Worker(multiprocessing.Process(), ours)
    assert room._listen(worker, None) is False  # type: ignore[arg-type]
