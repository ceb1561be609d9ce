"""Codes and scales of one linear, by the kind of its entry."""

import numpy as np

from quantlab.errors import CheckpointError
from quantlab.reading.decoded import Decoded, Floats
from quantlab.reading.quantlab_format.block_types import BLOCKS, SUB_SCALES, WITH_MINIMA, WITH_SUB_MINIMA
from quantlab.reading.quantlab_format.entry import Entry
from quantlab.reading.quantlab_format.faults import cut, odd
from quantlab.reading.quantlab_format.leaves import described
from quantlab.reading.quantlab_format.numbers import array
from quantlab.reading.quantlab_format.rows import packed
from quantlab.reading.raw import RawFolder

__all__ = ["decode"]


def decode(raw: RawFolder, name: str) -> Decoded:
    """Codes and scales of one linear.

    Raises:
        CheckpointError: what is missing, or not as the format has it.
    """
    entry = described(raw).get(name)
    if entry is None or not entry.holds_codes:
        raise CheckpointError(f"a linear must hold codes to be decoded: {cut(name)} of {raw.path} does not.")
    read = {"affine": _affine, "table": _table, "block": _block}[entry.kind]
    # What is not finite is refused below, in one sentence.
    with np.errstate(all="ignore"):
        decoded = read(raw, entry)
    for values in (decoded.scale_OG, decoded.zero_OG, decoded.offset_OG):
        if values is not None and not np.isfinite(values).all():
            raise CheckpointError(f"scales must be finite: those of {name!r} of {raw.path} are not.")
    return decoded


def _affine(raw: RawFolder, entry: Entry) -> Decoded:
    bits, scales = entry.body["bits"], tuple(entry.body["scale"])
    codes = packed(raw, f"{entry.name}.codes", entry.shape, bits)
    scale = raw.floats(f"{entry.name}.scale", scales)
    kind = entry.body.get("zero_point")
    if kind not in (None, "whole", "real"):
        raise odd(entry.name, str(raw.path), f"must have zero points that are whole or real, not {cut(kind)}")
    zero = None
    if kind == "real":
        zero = raw.floats(f"{entry.name}.zero_point", scales)
    elif kind == "whole":
        zero = packed(raw, f"{entry.name}.zero_point", scales, bits).astype(np.float32)
    return Decoded(codes, bits, scale, zero_OG=zero)


def _table(raw: RawFolder, entry: Entry) -> Decoded:
    bits, scales, where = entry.body["bits"], tuple(entry.body["scale"]), str(raw.path)
    tables, name = raw.quantization.get("tables"), entry.body.get("table")
    if not isinstance(tables, dict) or not isinstance(name, str) or name not in tables:
        raise odd(entry.name, where, f"must name a table, not {cut(name)}")
    table = array(tables[name], f"tables[{name!r}]", where, 256)
    if table.shape != (2**bits,):
        raise odd(entry.name, where, f"must have a table of {2**bits} values, not {list(table.shape)}")
    codes = packed(raw, f"{entry.name}.codes", entry.shape, bits)
    return Decoded(codes, bits, _table_scale(raw, entry, scales), table=table)


def _table_scale(raw: RawFolder, entry: Entry, scales: tuple[int, ...]) -> Floats:
    kind, name = entry.body.get("scale_type"), f"{entry.name}.scale"
    if kind == "float":
        return raw.floats(name, scales)
    if kind not in ("e8m0", "e4m3"):
        raise odd(entry.name, str(raw.path), f"must have scales of float, e8m0 or e4m3, not {cut(kind)}")
    codes = raw.array(name, "U8", scales)
    if kind == "e8m0":
        return np.ldexp(np.float32(1), codes.astype(np.int32) - 127).astype(np.float32)
    small = _e4m3()[codes]
    return np.asarray(small * raw.floats(f"{entry.name}.matrix_scale", (1,)), np.float32)


def _e4m3() -> Floats:
    """[256]: 1 sign, 4 exponent and 3 mantissa bits, bias 7; 127 and 255 are NaN. OCP FP8 v1.0."""
    code = np.arange(128)
    exponent, mantissa = code >> 3, (code & 7) / 8
    positive = np.ldexp(np.where(exponent > 0, 1 + mantissa, mantissa), np.maximum(exponent, 1) - 7)
    positive[127] = np.nan
    return np.concatenate([positive, -positive]).astype(np.float32)


def _block(raw: RawFolder, entry: Entry) -> Decoded:
    kind, bits, (rows, groups) = entry.body["block"], entry.body["bits"], entry.body["scale"]
    blocks = (rows, groups // BLOCKS[kind][2])
    codes = packed(raw, f"{entry.name}.codes", entry.shape, bits)
    scale = _spread(_halves(raw, f"{entry.name}.d", blocks), groups)
    if kind in SUB_SCALES:
        width, shift = SUB_SCALES[kind]
        sub = packed(raw, f"{entry.name}.sub_scales", (rows, groups), width).astype(np.float32)
        scale = scale * (sub - np.float32(shift))
    if kind not in WITH_MINIMA:
        return Decoded(codes, bits, scale)
    offset = _spread(_halves(raw, f"{entry.name}.dmin", blocks), groups)
    if kind in WITH_SUB_MINIMA:
        offset = -(offset * packed(raw, f"{entry.name}.sub_mins", (rows, groups), 6).astype(np.float32))
    return Decoded(codes, bits, scale, offset_OG=offset)


def _halves(raw: RawFolder, name: str, shape: tuple[int, int]) -> Floats:
    return raw.array(name, "F16", shape).astype(np.float32)


def _spread(of_blocks: Floats, groups: int) -> Floats:
    """What a block has, for each of its groups."""
    return np.repeat(of_blocks, groups // of_blocks.shape[1], axis=1)
