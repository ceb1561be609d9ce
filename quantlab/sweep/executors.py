"""Who computes the cells: this process, or worker processes on this machine.

An executor hands cells out in order, one at a time, and knows nothing of models: `work(cell, advance)` is a function
at the top of a module that computes a cell and leaves its record in the store. The store is the only truth, so a cell
may be computed twice and an executor may die at any moment. Other executors (other machines) have the same signature
as `run_cells` and are added beside it.

A cell that fails does not stop the others, and its error is raised when all are through; but when a result cannot be
written, no further cell is begun.
"""

from collections.abc import Sequence
from typing import Any

from quantlab.sweep.outcomes import Advance, Board, CellError, Event, OnEvent, Work, attempt
from quantlab.sweep.workers import environment, run_in_workers

__all__ = ["Advance", "CellError", "Event", "OnEvent", "Work", "run_cells"]


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
    board = Board(on_event, [None] * len(cells))
    if workers == 1:
        with environment(threads):
            _run_here(cells, work, board)
    else:
        run_in_workers(cells, work, board, min(workers, len(cells)), threads)
    board.raise_first()
    return board.results


def _run_here(cells: Sequence[Any], work: Work, board: Board) -> None:
    for position, cell in enumerate(cells):
        if board.stopped:
            return
        board.on_event(Event("started", position))

        def advance(amount: int, position: int = position) -> None:
            board.on_event(Event("advanced", position, amount))

        board.settle(position, attempt(work, cell, advance))
