"""Cells computed by worker processes on this machine.

Workers are spawned, live for many cells (so the work may keep a loaded model at module level) and end when the parent
does, however it ends: each watches the parent, and Ctrl-C, which a terminal sends to all, reaches only the parent. A
worker that dies is replaced and its cell tried again, at most `MAX_RETRIES` times.
"""

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from quantlab.errors import EvaluationError
from quantlab.quiet import quiet_imports
from quantlab.sweep.outcomes import Board, CellError, Event, Work, attempt

MAX_RETRIES = 2
"""Times that a cell is tried again after its worker died."""


# ---- the parent's side


@dataclass
class _Worker:
    process: BaseProcess
    channel: Connection
    cell: int | None = None
    """The cell in flight; none before the first and between cells."""
    ready: bool = False
    """It has started and understood what its work is."""


def run_in_workers(cells: Sequence[Any], work: Work, board: Board, workers: int, threads: int) -> None:
    waiting, retries = deque(range(len(cells))), [0] * len(cells)
    crew: list[_Worker] = []
    try:
        while waiting or any(worker.cell is not None for worker in crew):
            busy = sum(worker.cell is not None for worker in crew)
            while len(crew) < min(workers, busy + len(waiting)):
                crew.append(_start(work, threads))
            for worker in [worker for worker in crew if worker.ready and worker.cell is None and waiting]:
                if waiting:
                    _hand_over(worker, waiting.popleft(), cells, board)
            for worker in _with_news(crew):
                if not _listen(worker, board):
                    crew.remove(worker)
                    _bury(worker, waiting, retries, board)
            if board.stopped:
                waiting.clear()
    except BaseException:
        for worker in crew:
            worker.process.kill()
        raise
    finally:
        for worker in crew:
            _dismiss(worker)


def _start(work: Work, threads: int) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, work), daemon=True)
    with environment(threads), _interrupts_blocked():
        process.start()
    theirs.close()  # so that the end of the process is the end of the channel
    return _Worker(process, ours)


def _hand_over(worker: _Worker, position: int, cells: Sequence[Any], board: Board) -> None:
    worker.cell = position
    board.on_event(Event("started", position))
    with suppress(OSError):  # it died meanwhile: found when it is listened to
        worker.channel.send(cells[position])


def _with_news(crew: Sequence[_Worker]) -> list[_Worker]:
    """Workers that sent something or died; waits for the first."""
    ready = set(wait([worker.channel for worker in crew]))
    return [worker for worker in crew if worker.channel in ready]


def _listen(worker: _Worker, board: Board) -> bool:
    """Take one message; False when the worker is dead."""
    try:
        kind, value = worker.channel.recv()
    except (EOFError, OSError):
        return False
    if kind == "ready":
        worker.ready = True
    elif kind == "advanced":
        assert worker.cell is not None
        board.on_event(Event("advanced", worker.cell, value))
    else:
        assert worker.cell is not None
        board.settle(worker.cell, (kind, value))
        worker.cell = None
    return True


def _bury(worker: _Worker, waiting: deque[int], retries: list[int], board: Board) -> None:
    """Give a dead worker's cell to the next one, or up."""
    worker.process.join()
    worker.channel.close()
    how = _cause_of_death(worker.process.exitcode)
    if not worker.ready:
        raise CellError(f"a worker process could not start: {how}; its own words are above")
    if worker.cell is None:
        return
    retries[worker.cell] += 1
    if retries[worker.cell] <= MAX_RETRIES:
        board.on_event(Event("retried", worker.cell, message=f"its worker was lost ({how})"))
        waiting.appendleft(worker.cell)
        return
    error = EvaluationError(
        f"a cell must fit into memory and not end its process: its worker was lost {MAX_RETRIES + 1} times, "
        f"last by {how}. Use fewer workers or a smaller batch_size; the other cells are recorded."
    )
    board.settle(worker.cell, ("failed", error))


def _cause_of_death(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        return f"signal {name}, as when memory runs out" if name == "SIGKILL" else f"signal {name}"
    return f"exit code {exitcode}"


def _dismiss(worker: _Worker) -> None:
    """End a worker that waits for its next cell, or was killed."""
    worker.channel.close()
    if not worker.ready:  # still importing, for work that is done
        worker.process.kill()
    worker.process.join(timeout=5)
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join()


# ---- the worker's side


def _serve(channel: Connection, work: Work) -> None:
    """Life of a worker: cells in, outcomes out, until the parent closes the channel or dies."""
    quiet_imports()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, ConnectionError):
        channel.send(("ready", None))
        while True:
            cell = channel.recv()
            outcome = attempt(work, cell, lambda amount: channel.send(("advanced", amount)))
            try:
                channel.send(outcome)
            except (pickle.PicklingError, TypeError, AttributeError):  # a result that does not pickle
                channel.send(("bug", traceback.format_exc()))


def _end_with_parent() -> None:
    """A parent that was killed cannot say goodbye; without this its workers would compute on, for nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


# ---- what a process inherits

_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "RAYON_NUM_THREADS",
)


@contextmanager
def environment(threads: int) -> Iterator[None]:
    """The environment in which a process starts with so many threads."""
    before = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """A process started here never sees Ctrl-C, which a terminal sends to all: its parent ends it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
