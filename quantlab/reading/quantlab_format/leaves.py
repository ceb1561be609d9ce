"""The tensors beside a linear, held against its entry."""

from quantlab.reading.quantlab_format.block_types import SUB_SCALES, WITH_MINIMA, WITH_SUB_MINIMA
from quantlab.reading.quantlab_format.entry import Entry, entries
from quantlab.reading.quantlab_format.faults import odd
from quantlab.reading.raw import RawFolder

__all__ = ["LEAVES", "described", "linears"]

LEAVES = (
    *("codes", "scale", "zero_point", "matrix_scale", "d", "dmin", "sub_scales", "sub_mins"),
    *("corrected_bias", "input_low", "input_high"),
)
"""Tensors of a linear that the architecture does not know."""


def linears(raw: RawFolder) -> list[str]:
    """Names of the linears that hold codes of their own."""
    return sorted(entry.name for entry in described(raw).values() if entry.holds_codes)


def described(raw: RawFolder) -> dict[str, Entry]:
    """Every linear that a folder describes, held against its tensors; checked once. Raises as `entries`."""
    known: dict[str, Entry] | None = raw.__dict__.get("_quantlab_entries")
    if known is None:
        known = raw.__dict__["_quantlab_entries"] = entries(raw.quantization, str(raw.path))
        for entry in known.values():
            _check_leaves(raw, entry)
    return known


def _check_leaves(raw: RawFolder, entry: Entry) -> None:
    """No tensor stands beside a linear that its entry does not speak of: left out, it would change the matrix."""
    spoken_of = _of_matrix(entry)
    if entry.body.get("corrected_bias") is True:
        spoken_of.add("corrected_bias")
    if entry.body.get("inputs") == "static":
        spoken_of |= {"input_low", "input_high"}
    for leaf in LEAVES:
        if leaf not in spoken_of and f"{entry.name}.{leaf}" in raw.tensors:
            raise odd(entry.name, str(raw.path), f"must speak of its {leaf}, which is stored")


def _of_matrix(entry: Entry) -> set[str]:
    """Tensors that stand for the weight of a linear."""
    body = entry.body
    if entry.kind == "affine":
        return {"codes", "scale"} | ({"zero_point"} if body.get("zero_point") is not None else set())
    if entry.kind == "table":
        return {"codes", "scale"} | ({"matrix_scale"} if body.get("scale_type") == "e4m3" else set())
    if entry.kind != "block":
        return set()
    kind, leaves = body["block"], {"codes", "d"}
    for leaf, kinds in (("dmin", WITH_MINIMA), ("sub_scales", SUB_SCALES), ("sub_mins", WITH_SUB_MINIMA)):
        if kind in kinds:
            leaves.add(leaf)
    return leaves
