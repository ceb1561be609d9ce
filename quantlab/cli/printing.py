"""What a command says: its result on stdout, once; everything else a line on stderr."""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from quantlab.errors import OutputError

__all__ = ["complain", "say", "show"]


def show(as_json: bool, result: Any, table: Callable[[], Any]) -> None:
    """The result on stdout, as one JSON object or as a table for people."""
    try:
        if as_json:
            sys.stdout.write(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        else:
            _print(table())
        sys.stdout.flush()
    except OSError as error:
        # The interpreter flushes stdout once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise OutputError(
                f"stdout must be writable: {error.strerror}. What was recorded is kept."
            ) from error


def say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def complain(message: object) -> None:
    """One sentence on stderr, the notes of an exception behind it."""
    notes = "".join(f" ({note})" for note in getattr(message, "__notes__", ()))
    say(f"quantlab: {message}{notes}")


def _print(table: Any) -> None:
    from rich.console import Console

    wide = None if sys.stdout.isatty() else 160
    Console(soft_wrap=wide is not None, width=wide, highlight=False).print(table)
