"""How much of a text occurs in the data that models are scored on: shares of its 13-grams of words.

Words are runs of letters and digits in lower case. The text's 13-grams are kept, the evaluation data, which is many
times as long, is streamed past them.
"""

import re
from collections.abc import Iterable, Iterator

from quantlab.data.sources import plain_text, shipped

__all__ = ["LENGTH", "ngrams", "overlaps", "share_in"]

LENGTH = 13
"""Words of an n-gram, as in GPT-3's contamination study (arXiv:2005.14165, appendix C)."""

_WORD = re.compile(r"[^\W_]+")


def overlaps(texts: Iterable[str]) -> dict[str, float]:
    """Share of the texts' 13-grams that occur in each evaluation data set that ships."""
    held = {gram for text in texts for gram in ngrams(text)}
    return {
        "HellaSwag validation": share_in(held, _hellaswag()),
        "WikiText-2 test": share_in(held, [plain_text(shipped("wiki.test.raw.xz"), "wikitext-2-raw test")]),
    }


def share_in(held: set[str], others: Iterable[str]) -> float:
    """Share of the n-grams that occur in some of the other texts; 0 of none."""
    found = {gram for text in others for gram in ngrams(text) if gram in held} if held else set()
    return len(found) / max(len(held), 1)


def ngrams(text: str) -> Iterator[str]:
    """Every run of 13 words."""
    words = _WORD.findall(text.lower())
    for start in range(len(words) - LENGTH + 1):
        yield " ".join(words[start : start + LENGTH])


def _hellaswag() -> Iterator[str]:
    """Each context with each of its endings."""
    from quantlab.data.hellaswag import load_documents

    for document in load_documents():
        for ending in document.endings:
            yield f"{document.query} {ending}"
