"""What may come of a cell, and the board on which an executor keeps it: results, failures, events for progress."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from quantlab.errors import OutputError, UserError

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


@dataclass
class Board:
    """Results and failures of cells by position, each told to the listener as it comes."""

    on_event: OnEvent
    results: list[Any]
    failures: dict[int, Exception] = field(default_factory=dict)
    stopped: bool = False
    """No further cell is begun: its result could not be kept."""

    def settle(self, cell: int, outcome: tuple[str, Any]) -> None:
        """Keep what `attempt` returned for a cell."""
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
        """Raise the first failure, bugs before users' errors, if there is one."""
        order = sorted(self.failures.items(), key=lambda item: (isinstance(item[1], UserError), item[0]))
        if not order:
            return
        first = order[0][1]
        if len(order) > 1:
            first.add_note(f"{len(order)} of {len(self.results)} cells failed")
        raise first


def attempt(work: Work, cell: Any, advance: Advance) -> tuple[str, Any]:
    """What came of a cell: ("finished", result), ("failed", a user's error) or ("bug", a traceback)."""
    try:
        return "finished", work(cell, advance)
    except UserError as error:
        return "failed", error
    except Exception:
        return "bug", traceback.format_exc()
