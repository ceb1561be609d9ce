"""Where the documents of a text begin, and the two conventions by which a text of rows becomes one string.

Blocks of one document are alike, so an interval of a text's score needs to know them. Two marks are known: the token
`<|endoftext|>` between documents, and the titles of WikiText's articles, ` = Title = ` between blank lines (a section's
is ` = = Section = = `). A text with neither is one document.
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["CONVENTIONS", "SEPARATOR", "Convention", "arranged", "first_tokens", "starts"]

Convention = Literal["rows", "file"]
CONVENTIONS: dict[Convention, str] = {
    "rows": "its rows joined by two newlines",
    "file": "the file as it is",
}
"""How a text is read -> what tables and figures call it."""

SEPARATOR = "<|endoftext|>"
_TITLE = re.compile(r"(?:\A|\n)[ \t]*\n( = (?!=)[^\n]*(?<!=) = )\n(?=[ \t]*\n)")


def arranged(text: str, convention: Convention) -> tuple[str, list[int]]:
    """The text under a convention of perplexity, and where its documents begin.

    `rows` is that of most papers on WikiText-2: every line is a row with its newline, a blank line is an empty row, and
    rows are joined by two newlines. `file` is llama.cpp's.

    Returns:
        The text; offsets of the first character of every document, ascending, the first of them 0.
    """
    offsets = starts(text)
    if convention == "file":
        return text, offsets
    # Not splitlines, which cuts at characters that are no newline.
    lines = [line for line in re.split(r"(?<=\n)", text) if line]
    rows = [line if line.strip() else "" for line in lines]
    old = [*accumulate(map(len, lines), initial=0)]
    new = [*accumulate((len(row) + 2 for row in rows), initial=0)]
    places = [bisect_right(old, offset) - 1 for offset in offsets]
    return "\n\n".join(rows), [new[at] + offset - old[at] for at, offset in zip(places, offsets, strict=True)]


def starts(text: str) -> list[int]:
    """Offsets of the first character of every document, ascending; the first is 0."""
    if SEPARATOR in text:
        found = [match.end() for match in re.finditer(re.escape(SEPARATOR), text)]
    else:
        found = [match.start(1) for match in _TITLE.finditer(text)]
    # What is blank before the first document or behind the last separator is none.
    return [0, *(offset for offset in found if text[:offset].strip() and text[offset:].strip())]


def first_tokens(text: str, offsets: Sequence[int], tokenizer: Any, encoding: Any) -> NDArray[np.int64]:
    """Position of the first token of every document, ascending; the first is 0.

    A tokenizer without offsets (one that is not "fast") tokenizes every document by itself instead, which may be off
    by a token for each document.

    Args:
        offsets: of the documents in the text, see `arranged`.
        encoding: what the tokenizer made of the text.
    """
    if len(offsets) == 1:
        return np.zeros(1, dtype=np.int64)
    if getattr(tokenizer, "is_fast", False):
        begins = np.array([begin for begin, _ in encoding.encodings[0].offsets], dtype=np.int64)
        return np.searchsorted(begins, np.array(offsets), side="left").astype(np.int64)
    pieces = [text[a:b] for a, b in zip(offsets, [*offsets[1:], len(text)], strict=True)]
    lengths = [
        len(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]) for piece in pieces
    ]
    return np.cumsum([0, *lengths[:-1]], dtype=np.int64)
