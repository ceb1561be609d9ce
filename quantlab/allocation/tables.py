"""An allocation as people read it."""

from collections.abc import Mapping
from typing import Any

from quantlab.tables import listing

__all__ = ["allocation_table"]


def allocation_table(allocation: Mapping[str, Any]) -> Any:
    """An allocation for people: all but the width of every linear, which stand in the recipe."""
    sums = {"chosen": allocation} | {f"{width} alone": taken for width, taken in allocation["alone"].items()}
    said = {
        name: f"{taken['average_storage_bits']:.4f} bits a weight, {taken['weights_bytes'] / 1e6:.3f} MB, "
        f"divergence {taken['divergence']:.4g} nats a token"
        for name, taken in sums.items()
    }
    linears = ", ".join(f"{count} x {width}" for width, count in allocation["num_linears"].items())
    places = {name: str(allocation[name]) for name in ("scheme", "recipe", "sensitivity")}
    return listing("allocate", said | {"linears": linears} | places)
