"""Results of `quantlab calibrate` as tables for people."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from quantlab.tables import listing

__all__ = ["calibration_table", "check_table"]


def calibration_table(result: Mapping[str, Any]) -> Group:
    """What was calibrated, and where it is."""
    text = result["text"]
    lines = {
        "text": f"{text['source']}: {text['num_sequences']} sequences of {text['sequence_length']} tokens",
        "linears": str(result["linears"]),
        "attention layers": str(result["attention_layers"]),
        "size": f"{result['bytes'] / 1e6:,.0f} MB",
        "stored in": result["calibration"],
    }
    return Group(listing("calibration", lines), *(escape(note) for note in result["notes"]))


def check_table(result: Mapping[str, Any]) -> Group:
    """How each input fared, and the verdict."""
    table = Table(
        "input of", "tokens", "inputs", "dead", "absmax ratio", "top-10 kept", "trace", "top eigenvalues",
        box=None, pad_edge=False,
    )  # fmt: skip
    for row in result["inputs"]:
        table.add_row(
            escape(row["name"]),
            f"{row['num_tokens']:,}",
            f"{row['in_features']:,}",
            str(row["num_dead"]),
            *(f"{row[name]:.2f}" for name in ("absmax_ratio", "top_overlap")),
            *(f"{row[name]:.1%}" for name in ("trace_difference", "eigenvalue_difference")),
        )
    overlaps = [f"13-grams of the text in {name}: {share:.2%}" for name, share in result["overlap"].items()]
    return Group(table, *map(escape, overlaps), escape(result["verdict"]))
