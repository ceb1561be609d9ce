"""HellaSwag: rows in, documents out, preprocessed exactly as lm-evaluation-harness 0.4.13 does.

A document is a context (the query) and four endings, one of which is right. Its position in the file, counted from 0,
is its name everywhere, since the data set's own `ind` is not unique.

Source: Zellers et al. 2019, arXiv:1905.07830; lm-evaluation-harness 0.4.13, lm_eval/tasks/hellaswag/utils.py.
"""

import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from quantlab.config import HellaSwagConfig
from quantlab.data.sources import decode, digest, read_bytes, seeded_order, shipped
from quantlab.errors import DataError

NUM_ENDINGS = 4
_SHIPPED = "hellaswag_val.jsonl.xz"


@dataclass(frozen=True, slots=True)
class Document:
    """A context and its four endings."""

    position: int
    """Place in the file, from 0."""
    query: str
    """The context."""
    endings: tuple[str, ...]
    """The continuations; each is scored after the query and one space."""
    label: int
    """Index of the right ending."""


@dataclass(frozen=True)
class HellaSwag:
    """A file of documents."""

    documents: tuple[Document, ...]
    sha256: str
    """Digest of the file's content, decompressed."""
    source: str
    """Name of the file."""


def load_hellaswag(path: Path | None = None) -> HellaSwag:
    """Every document of a `.jsonl`, `.jsonl.xz` or `.parquet` file; none means the shipped validation split.

    Raises:
        DataError: the file cannot be read, or a row is not a HellaSwag row (the row is named).
    """
    if path is None:
        return _shipped()
    name = path.name.removesuffix(".xz")
    if not name.endswith((".jsonl", ".parquet")):
        raise DataError(f"HellaSwag file must end in .jsonl, .jsonl.xz or .parquet, found {path}.")
    return _parse(read_bytes(path), path.name, str(path), parquet=name.endswith(".parquet"))


def read_rows(path: Path | None = None) -> bytes:
    """The decompressed bytes of a file of documents, or of the shipped validation split."""
    return shipped(_SHIPPED) if path is None else read_bytes(path)


def load_documents(path: Path | None = None) -> list[Document]:
    """The documents of `load_hellaswag`."""
    return list(load_hellaswag(path).documents)


def select(documents: Sequence[Document], config: HellaSwagConfig) -> list[Document]:
    """The documents that the configuration asks for, in the order of the file.

    Raises:
        DataError: `limit` or `items` reach beyond the file, or select nothing.
    """
    count = len(documents)
    if config.items is not None:
        first, last = _bounds(config.items, count)
        return list(documents[first:last])
    if config.limit is None:
        return list(documents)
    if config.limit > count:
        raise DataError(
            f"limit must be at most the number of documents: the file has {count}, limit is {config.limit}."
        )
    return [documents[place] for place in sorted(seeded_order(count, config.seed)[: config.limit])]


def preprocess(text: str) -> str:
    """The text without WikiHow's bracketed marks; a title becomes the end of a sentence.

    The order matters: blanks are stripped before the brackets go, so a text may begin or end with a blank.
    """
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


@cache
def _shipped() -> HellaSwag:
    return _parse(read_rows(), "HellaSwag validation", _SHIPPED, parquet=False)


def _parse(content: bytes, source: str, where: str, *, parquet: bool) -> HellaSwag:
    rows = _parquet_rows(content, where) if parquet else _json_rows(content, where)
    documents = tuple(_document(row, position, where) for position, row in enumerate(rows))
    if not documents:
        raise DataError(f"HellaSwag file must hold at least one document: {where} holds none.")
    return HellaSwag(documents, digest(content), source)


def _json_rows(content: bytes, where: str) -> Iterator[Any]:
    lines = decode(content, where).removesuffix("\n").split("\n") if content else []
    for number, line in enumerate(lines, start=1):
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _bad_row(number, where, f"is not JSON ({' '.join(str(error).split())})") from error


def _parquet_rows(content: bytes, where: str) -> list[Any]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows: list[Any] = parquet.read_table(io.BytesIO(content)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"file must be Parquet: {where}: {' '.join(str(error).split())}.") from error
    return rows


def _document(row: Any, position: int, where: str) -> Document:
    """The document of a row, or the error that names the row."""
    if fault := _fault(row):
        raise _bad_row(position + 1, where, fault)
    query = preprocess(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    endings = tuple(preprocess(ending) for ending in row["endings"])
    if "" in endings:
        raise _bad_row(
            position + 1, where, f"has nothing left of ending {endings.index('')} after preprocessing"
        )
    return Document(position, query, endings, int(row["label"]))


def _fault(row: Any) -> str:
    """What is wrong with a row, or "" when nothing is."""
    if not isinstance(row, dict):
        return f"must be an object, found {type(row).__name__}"
    for key in ("activity_label", "ctx_a", "ctx_b", "endings", "label"):
        if key not in row:
            return f"lacks the key {key!r}"
        if key not in ("endings", "label") and not isinstance(row[key], str):
            return f"must hold text under {key!r}, found {row[key]!r}"
    endings, label = row["endings"], row["label"]
    if not isinstance(endings, list) or len(endings) != NUM_ENDINGS:
        found = f"{len(endings)}" if isinstance(endings, list) else repr(endings)
        return f"must hold a list of {NUM_ENDINGS} endings, found {found}"
    if not all(isinstance(ending, str) for ending in endings):
        return "must hold text in every ending"
    if isinstance(label, bool) or str(label) not in {"0", "1", "2", "3"}:
        return f"must hold a label from 0 to {NUM_ENDINGS - 1}, found {label!r}"
    return ""


def _bad_row(number: int, where: str, fault: str) -> DataError:
    return DataError(f"HellaSwag row {number} of {where} {fault}. Rows are counted from 1.")


def _bounds(items: str, count: int) -> tuple[int, int]:
    """First and last position of `A:B`, B excluded."""
    begin, _, end = items.partition(":")
    first, last = int(begin or 0), int(end or count)
    if not first < last <= count:
        raise DataError(
            f"items must be A:B with A below B and B at most the number of documents: the file has {count}, "
            f"items is {items!r}."
        )
    return first, last
