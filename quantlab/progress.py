"""Progress on stderr: one bar with the time left over the whole run, and what is being computed.

Where stderr is no terminal, a line per finished cell says the same.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from quantlab.sweep.executors import Event
from quantlab.sweep.plan import Cell

_SPEED_WINDOW_S = 600
"""The speed that predicts the end is that of the last so many seconds: cells differ in speed."""


class RunProgress:
    """`with RunProgress() as progress: run(config, progress.watch)`."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar = _bar(self._console)
        self._cells: Sequence[Cell] = ()
        self._advanced: list[float] = []
        self._running: dict[int, None] = {}
        self._finished = 0
        self._began = monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        self._task = self._bar.add_task("checking", total=None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def watch(self, cells: Sequence[Cell]) -> Callable[[Event], None]:
        """Take note of what will be computed; returns the listener."""
        self._cells, self._advanced, self._began = cells, [0.0] * len(cells), monotonic()
        self._bar.reset(self._task, total=sum(cell.cost for cell in cells))
        if not cells:
            self._bar.update(self._task, description="nothing to compute: every cell is recorded")
        return self._see

    def _see(self, event: Event) -> None:
        if event.kind == "started":
            self._running[event.cell] = None
        elif event.kind == "advanced":
            self._move(
                event.cell, min(self._advanced[event.cell] + event.amount, self._cells[event.cell].cost)
            )
        elif event.kind == "retried":
            self._move(event.cell, 0.0)
            self._say(f"{self._cells[event.cell].title}: tried again, {event.message}")
        else:
            self._end(event)
        self._bar.update(self._task, description=self._description())

    def _move(self, cell: int, advanced: float) -> None:
        self._bar.advance(self._task, advanced - self._advanced[cell])
        self._advanced[cell] = advanced

    def _end(self, event: Event) -> None:
        self._running.pop(event.cell, None)
        self._finished += 1
        self._move(event.cell, self._cells[event.cell].cost)
        title = self._cells[event.cell].title
        # A lone cell's failure is the command's own, which says it once.
        if event.kind == "failed" and len(self._cells) > 1:
            self._say(f"{title}: failed: {event.message}")
        elif event.kind == "finished" and not self._console.is_terminal:
            self._say(f"{title}: done, {self._finished} of {len(self._cells)}{self._remaining()}")

    def _remaining(self) -> str:
        done, total = sum(self._advanced), sum(cell.cost for cell in self._cells)
        left = (monotonic() - self._began) * (total - done) / max(done, 1.0)
        return f", about {left / 60:.1f} min left" if done < total else ""

    def _description(self) -> str:
        running = ", ".join(self._cells[cell].title for cell in self._running)
        return f"{self._finished}/{len(self._cells)} {running}"

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def counted(title: str) -> Iterator[Callable[[int], None]]:
    """A bar for one job of unknown length; yields what to call with the number of things done."""
    with _bar(Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None)
        yield lambda count: bar.advance(task, count)


def _bar(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(
        *columns,
        console=console,
        disable=not sys.stderr.isatty(),
        speed_estimate_period=_SPEED_WINDOW_S,
        refresh_per_second=4,
    )
