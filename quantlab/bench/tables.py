"""A bench as people read it."""

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from quantlab.bench.results import BenchResult, Side

__all__ = ["bench_table"]


def bench_table(result: BenchResult) -> Group:
    """One row a side: medians, and least and largest in brackets; below, what that says of each engine."""
    columns = ("", "new tokens/s", "prompt tokens/s", "first token ms", "peak MB", "load s", "weights MB")
    table = Table(*columns, box=None, pad_edge=False)
    if result.parent is not None and not result.parent.error:
        table.add_row(*_row(result.parent, result.parent_weights_bytes))
    for side in result.sides:
        if not side.error:
            table.add_row(*_row(side, result.weights_bytes))
    sides = filter(None, (result.parent, *result.sides))
    lines = [f"{side.name} computes in {side.arithmetic}" for side in sides if not side.error]
    lines += [one.sentence for one in result.comparisons]
    lines += [f"{side.name} did not run: {side.error}" for side in result.sides if side.error]
    settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in result.settings)
    return Group(
        table, *map(escape, (*lines, *result.notes, f"{result.folder}: {settings}, on {result.cpu}"))
    )


def _row(side: Side, weights_bytes: int) -> list[str]:
    return [
        escape(side.name),
        _cell(side, "decode_rate", 1, 1),
        _cell(side, "prefill_rate", 1, 0),
        _cell(side, "first_token_s", 1e3, 0),
        _cell(side, "peak_bytes", 1e-6, 0),
        _cell(side, "load_s", 1, 1),
        f"{weights_bytes / 1e6:.1f}",
    ]


def _cell(side: Side, measure: str, factor: float, digits: int) -> str:
    """Median [least, largest]."""
    middle, least, most = (value * factor for value in side.spread(measure))
    return escape(f"{middle:.{digits}f} [{least:.{digits}f}, {most:.{digits}f}]")
