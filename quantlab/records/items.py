"""Per-item results: columns by task in one Parquet file, whose bytes follow from the columns alone."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas
    import pyarrow

__all__ = ["Columns", "frame_of", "parquet_of"]

Columns = Mapping[str, NDArray[Any]]
"""Name -> values of one task, all of one length."""


def parquet_of(items: Mapping[str, Columns]) -> bytes:
    """One Parquet file of all tasks' rows; the same columns give the same bytes (no time, no host in them)."""
    import pyarrow
    import pyarrow.parquet

    tables = [_table(task, columns) for task, columns in items.items()]
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.concat_tables(tables, promote_options="permissive")
    pyarrow.parquet.write_table(table, sink, compression="zstd")
    content: bytes = sink.getvalue().to_pybytes()
    return content


def frame_of(content: bytes, task: str | None = None) -> "pandas.DataFrame":
    """The rows of a Parquet file: all of them, or a task's with its own columns, in their own types."""
    import pyarrow
    import pyarrow.compute
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(pyarrow.BufferReader(content), use_threads=False)
    if task is not None:
        table = table.filter(pyarrow.compute.equal(table["task"], task))
        table = table.select([name for name in table.column_names if table[name].null_count == 0])
    frame: pandas.DataFrame = table.to_pandas(use_threads=False)
    return frame


def _table(task: str, columns: Columns) -> "pyarrow.Table":
    import pyarrow

    lengths = {len(column) for column in columns.values()}
    assert len(lengths) == 1 and "task" not in columns, f"{task}: columns of lengths {sorted(lengths)}"
    tasks = pyarrow.array([task] * lengths.pop(), pyarrow.string())
    arrays = {name: pyarrow.array(column) for name, column in columns.items()}
    return pyarrow.table({"task": tasks} | arrays)
