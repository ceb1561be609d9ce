"""Who computes the cells: this process, or worker processes on this machine.

An executor hands cells out in order, one at a time, and knows nothing of models: `work(cell, advance)` is a function
at the top of a module that computes a cell and leaves its record in the store. The store is the only truth, so a cell
may be computed twice and an executor may die at any moment. Other executors (other machines) have the same signature
as `run_cells` and are added beside it.

Workers are spawned, live for many cells (so `work` may keep a loaded model at module level) and end when the parent
does, however it ends. A worker that is killed is replaced and its cell tried again, at most `MAX_RETRIES` times. A
cell that fails does not stop the others, and its error is raised when all are through; but when a result cannot be
written, no further cell is begun.
"""

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Literal

from quantlab.errors import EvaluationError, OutputError, UserError

MAX_RETRIES = 2
"""Times that a cell is tried again after its worker died."""

Advance = Callable[[int], None]
"""Told how many more units of work are done."""

Work = Callable[[Any, Advance], Any]
"""Computes one cell; what it returns must pickle."""


@dataclass(frozen=True)
class Event:
    """What happens to a cell: started, (advanced*, retried?)*, then finished or failed."""

    kind: Literal["started", "advanced", "retried", "finished", "failed"]
    cell: int
    """Position among the cells that were handed over."""
    amount: int = 0
    """Units done since the last event, of `advanced`; `retried` takes back all that the cell had advanced."""
    message: str = ""
    """One sentence, of `retried` and `failed`."""


OnEvent = Callable[[Event], None]


class CellError(Exception):
    """A bug met in a cell; carries the traceback of the process where it happened."""


def run_cells(
    cells: Sequence[Any],
    work: Work,
    *,
    workers: int = 1,
    threads: int = 1,
    on_event: OnEvent = lambda event: None,
) -> list[Any]:
    """Compute every cell and return what `work` returned, in the order of the cells.

    Args:
        workers: processes; 1 computes in this process.
        threads: OMP_NUM_THREADS and its kin in each worker, set before it imports torch. In this process `work`
            itself sets torch's threads, since torch may have been imported long before.
        on_event: called in this process, for progress.

    Raises:
        UserError: of the first failed cell (its own type), or that a cell's worker was killed too often.
        CellError: a bug; these come before the user's errors.
    """
    board = _Board(on_event, [None] * len(cells))
    if workers == 1:
        with _environment(threads):
            _run_here(cells, work, board)
    else:
        _run_in_workers(cells, work, board, min(workers, len(cells)), threads)
    board.raise_first()
    return board.results


@dataclass
class _Board:
    """Results and failures of cells by position, each told to the listener as it comes."""

    on_event: OnEvent
    results: list[Any]
    failures: dict[int, Exception] = field(default_factory=dict)
    stopped: bool = False
    """No further cell is begun: its result could not be kept."""

    def settle(self, cell: int, outcome: tuple[str, Any]) -> None:
        verdict, value = outcome
        if verdict == "finished":
            self.results[cell] = value
            self.on_event(Event("finished", cell))
        else:
            failure = value if verdict == "failed" else CellError(f"a bug in cell {cell}:\n{value}")
            self.failures[cell] = failure
            self.stopped |= isinstance(failure, OutputError)
            # A user's error is one sentence; a traceback says in its last line what happened.
            self.on_event(Event("failed", cell, message=str(value).strip().rpartition("\n")[2]))

    def raise_first(self) -> None:
        order = sorted(self.failures.items(), key=lambda item: (isinstance(item[1], UserError), item[0]))
        if not order:
            return
        first = order[0][1]
        if len(order) > 1:
            first.add_note(f"{len(order)} of {len(self.results)} cells failed")
        raise first


def _attempt(work: Work, cell: Any, advance: Advance) -> tuple[str, Any]:
    """What came of a cell: ("finished", result), ("failed", a user's error) or ("bug", a traceback)."""
    try:
        return "finished", work(cell, advance)
    except UserError as error:
        return "failed", error
    except Exception:
        return "bug", traceback.format_exc()


def _run_here(cells: Sequence[Any], work: Work, board: _Board) -> None:
    for position, cell in enumerate(cells):
        if board.stopped:
            return
        board.on_event(Event("started", position))

        def advance(amount: int, position: int = position) -> None:
            board.on_event(Event("advanced", position, amount))

        board.settle(position, _attempt(work, cell, advance))


# ---- worker processes: the parent's side


@dataclass
class _Worker:
    process: BaseProcess
    channel: Connection
    cell: int | None = None
    """The cell in flight; none before the first and between cells."""
    ready: bool = False
    """It has started and understood what its work is."""


def _run_in_workers(cells: Sequence[Any], work: Work, board: _Board, workers: int, threads: int) -> None:
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
    with _environment(threads), _interrupts_blocked():
        process.start()
    theirs.close()  # so that the end of the process is the end of the channel
    return _Worker(process, ours)


def _hand_over(worker: _Worker, position: int, cells: Sequence[Any], board: _Board) -> None:
    worker.cell = position
    board.on_event(Event("started", position))
    with suppress(OSError):  # it died meanwhile: found when it is listened to
        worker.channel.send(cells[position])


def _with_news(crew: Sequence[_Worker]) -> list[_Worker]:
    """Workers that sent something or died; waits for the first."""
    ready = set(wait([worker.channel for worker in crew]))
    return [worker for worker in crew if worker.channel in ready]


def _listen(worker: _Worker, board: _Board) -> bool:
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


def _bury(worker: _Worker, waiting: deque[int], retries: list[int], board: _Board) -> None:
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


# ---- worker processes: the child's side


def _serve(channel: Connection, work: Work) -> None:
    """Life of a worker: cells in, outcomes out, until the parent closes the channel or dies."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, ConnectionError):
        channel.send(("ready", None))
        while True:
            cell = channel.recv()
            outcome = _attempt(work, cell, lambda amount: channel.send(("advanced", amount)))
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
def _environment(threads: int) -> Iterator[None]:
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
