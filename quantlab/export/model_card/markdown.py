"""Pieces of Markdown."""

import html
import re
from collections.abc import Sequence

__all__ = ["escaped", "one_line", "table"]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are Markdown already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: str) -> str:
    """Text of unknown origin on one line of Markdown, with nothing in it that renders."""
    return re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", html.escape(one_line(text), quote=False))


def one_line(text: str) -> str:
    """The same with single spaces between words."""
    return " ".join(text.split())
