"""quantlab's own format, decoded with numpy: the layout stands in `docs/quantlab-format.md`. No torch.

Whatever config.json says of a linear is checked, and held against the stored tensors, before memory is taken for it.
O outputs, I inputs, G scales in a row, S blocks in a row, R rows and N codes of a packed matrix.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantlab.errors import CheckpointError
from quantlab.reading.decoded import Decoded, Floats
from quantlab.reading.raw import RawFolder

__all__ = [
    "KINDS",
    "LEAVES",
    "Entry",
    "array",
    "decode",
    "described",
    "entries",
    "linears",
    "rotation",
    "shapes",
]

KINDS = ("affine", "table", "block", "float", "same")
"""What a linear can be; the first three hold codes."""
LEAVES = (
    *("codes", "scale", "zero_point", "matrix_scale", "d", "dmin", "sub_scales", "sub_mins"),
    *("corrected_bias", "input_low", "input_high"),
)
"""Tensors of a linear that the architecture does not know."""
VERSION = 1
LARGEST = 2**31
"""Of a dimension."""
MOST = 200_000
"""Linears of a model."""

BLOCKS: Mapping[str, tuple[int, int, int]] = {
    "Q8_0": (8, 32, 1),
    "Q5_1": (5, 32, 1),
    "Q5_0": (5, 32, 1),
    "Q4_1": (4, 32, 1),
    "Q4_0": (4, 32, 1),
    "Q6_K": (6, 256, 16),
    "Q5_K": (5, 256, 8),
    "Q4_K": (4, 256, 8),
    "Q3_K": (3, 256, 16),
}
"""ggml's type -> bits of a code, weights of a block, scales of a block."""
WITH_MINIMA = ("Q4_1", "Q5_1", "Q4_K", "Q5_K")
"""Types that store a minimum, or the scale of minima."""
SUB_SCALES: Mapping[str, tuple[int, int]] = {
    "Q6_K": (8, 128),
    "Q5_K": (6, 0),
    "Q4_K": (6, 0),
    "Q3_K": (6, 32),
}
"""K type -> bits of a sub-scale as it is packed, and what was added to it."""


@dataclass(frozen=True)
class Entry:
    """One linear, as config.json describes it; every number is within its bounds."""

    name: str
    kind: str
    shape: tuple[int, int]
    """(O, I)."""
    body: Mapping[str, Any]

    @property
    def holds_codes(self) -> bool:
        """Whether codes are stored under its own name."""
        return self.kind in KINDS[:3]


def linears(raw: RawFolder) -> list[str]:
    """Names of the linears that hold codes of their own."""
    return sorted(entry.name for entry in described(raw).values() if entry.holds_codes)


def shapes(quantization: Mapping[str, Any], where: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of `weight` as the architecture keeps it, of every linear described."""
    return {
        name: entry.shape[::-1] if entry.body.get("transposed") is True else entry.shape
        for name, entry in entries(quantization, where).items()
    }


def entries(quantization: Mapping[str, Any], where: str) -> dict[str, Entry]:
    """Every linear that a quantization_config describes.

    Raises:
        CheckpointError: another version, or an entry that is not one.
    """
    if quantization.get("version") != VERSION or isinstance(quantization.get("version"), bool):
        raise CheckpointError(
            f"quantlab's format is read in version {VERSION}: {where} has {_cut(quantization.get('version'))}. "
            "Update quantlab, or export again."
        )
    found = quantization.get("linears")
    if not isinstance(found, dict) or not 0 < len(found) <= MOST:
        raise CheckpointError(
            f"quantization_config must describe 1 to {MOST} linears: that of {where} does not."
        )
    read = {name: _entry(name, body, where) for name, body in found.items()}
    for entry in read.values():
        if entry.kind == "same":
            _check_same(entry, read, where)
    return read


def described(raw: RawFolder) -> dict[str, Entry]:
    """Every linear that a folder describes, held against its tensors; checked once. Raises as `entries`."""
    known: dict[str, Entry] | None = raw.__dict__.get("_quantlab_entries")
    if known is None:
        known = raw.__dict__["_quantlab_entries"] = entries(raw.quantization, str(raw.path))
        for entry in known.values():
            _check_leaves(raw, entry)
    return known


def decode(raw: RawFolder, name: str) -> Decoded:
    """Codes and scales of one linear.

    Raises:
        CheckpointError: what is missing, or not as the format has it.
    """
    entry = described(raw).get(name)
    if entry is None or not entry.holds_codes:
        raise CheckpointError(f"a linear must hold codes to be decoded: {_cut(name)} of {raw.path} does not.")
    read = {"affine": _affine, "table": _table, "block": _block}[entry.kind]
    # What is not finite is refused below, in one sentence.
    with np.errstate(all="ignore"):
        decoded = read(raw, entry)
    for values in (decoded.scale_OG, decoded.zero_OG, decoded.offset_OG):
        if values is not None and not np.isfinite(values).all():
            raise CheckpointError(f"scales must be finite: those of {name!r} of {raw.path} are not.")
    return decoded


def array(found: Any, what: str, where: str, most: int = 2**24) -> Floats:
    """Numbers of config.json: {"shape": [..], "float32": hexadecimal bytes}, of at most `most` values."""
    shape = found.get("shape") if isinstance(found, dict) else None
    text = found.get("float32") if isinstance(found, dict) else None
    if not isinstance(shape, list) or not isinstance(text, str) or len(shape) > 2:
        raise _odd(what, where, "must have a shape and float32 bytes")
    if not all(type(size) is int and 0 < size <= most for size in shape):
        raise _odd(what, where, f"must have a shape of 1 to {most} each")
    count = int(np.prod(shape, dtype=np.int64)) if shape else 1
    if count > most or len(text) != 8 * count:
        raise _odd(what, where, f"must hold 8 hexadecimal digits for each of {shape}")
    try:
        data = bytes.fromhex(text)
    except ValueError:
        raise _odd(what, where, "must be hexadecimal") from None
    if len(data) != 4 * count:
        raise _odd(what, where, "must be hexadecimal")
    return np.frombuffer(data, "<f4").astype(np.float32).reshape(shape)


def rotation(quantization: Mapping[str, Any], size: int, where: str) -> list[Floats]:
    """The factors of the rotation of a size: orthogonal matrices whose sizes multiply to it."""
    known = quantization.get("rotations")
    found = known.get(str(size)) if isinstance(known, dict) else None
    if not isinstance(found, list) or not 0 < len(found) <= 32:
        raise _odd(f"rotations[{size}]", where, "must be a list of factors")
    factors = [array(each, f"rotations[{size}]", where) for each in found]
    product = 1
    for factor in factors:
        if factor.ndim != 2 or factor.shape[0] != factor.shape[1]:
            raise _odd(f"rotations[{size}]", where, "must have square factors")
        # Beyond 2, or not a number, is no entry of an orthogonal matrix.
        small = bool((np.abs(factor) < 2).all())
        if not small or np.abs(factor.astype(np.float64) @ factor.T - np.eye(len(factor))).max() >= 1e-4:
            raise _odd(f"rotations[{size}]", where, "must have orthogonal factors")
        product *= len(factor)
    if product != size:
        raise _odd(f"rotations[{size}]", where, "must have factors that multiply to its size")
    return factors


def _check_leaves(raw: RawFolder, entry: Entry) -> None:
    """No tensor stands beside a linear that its entry does not speak of: left out, it would change the matrix."""
    body, leaves = entry.body, {"codes", "scale"} if entry.kind in ("affine", "table") else set()
    if entry.kind == "affine" and body.get("zero_point") is not None:
        leaves.add("zero_point")
    if entry.kind == "table" and body.get("scale_type") == "e4m3":
        leaves.add("matrix_scale")
    if entry.kind == "block":
        leaves = {"codes", "d"} | ({"dmin"} if body["block"] in WITH_MINIMA else set())
        leaves |= {"sub_scales"} if body["block"] in SUB_SCALES else set()
        leaves |= {"sub_mins"} if body["block"] in ("Q4_K", "Q5_K") else set()
    if body.get("corrected_bias") is True:
        leaves.add("corrected_bias")
    if body.get("inputs") == "static":
        leaves |= {"input_low", "input_high"}
    for leaf in LEAVES:
        if leaf not in leaves and f"{entry.name}.{leaf}" in raw.tensors:
            raise _odd(entry.name, str(raw.path), f"must speak of its {leaf}, which is stored")


def _entry(name: str, body: Any, where: str) -> Entry:
    if not name or len(name) > 1000 or not name.isprintable():
        raise CheckpointError(
            f"a linear must have a printable name of 1 to 1000 letters: {where} has {_cut(name)}."
        )
    if not isinstance(body, dict) or body.get("kind") not in KINDS:
        raise _odd(name, where, f"must be one of {', '.join(KINDS)}")
    shape = _sizes(body.get("shape"), name, where, "shape")
    entry = Entry(name, body["kind"], shape, body)
    if entry.holds_codes:
        bits = body.get("bits")
        if type(bits) is not int or not 2 <= bits <= 8:
            raise _odd(name, where, f"must have 2 to 8 bits, not {_cut(bits)}")
        _check_scales(entry, _sizes(body.get("scale"), name, where, "scale"), where)
    return entry


def _check_scales(entry: Entry, scales: tuple[int, int], where: str) -> None:
    (rows, width), (of_rows, groups) = entry.shape, scales
    whole = scales == (1, 1)
    if not whole and (of_rows != rows or width % groups):
        raise _odd(entry.name, where, f"must have scales that divide {list(entry.shape)}, not {list(scales)}")
    if entry.kind != "block":
        return
    kind = entry.body.get("block")
    if not isinstance(kind, str) or kind not in BLOCKS:
        raise _odd(entry.name, where, f"must name a block of {', '.join(BLOCKS)}, not {_cut(kind)}")
    bits, size, num_scales = BLOCKS[kind]
    if entry.body["bits"] != bits or width % size or scales != (rows, width // size * num_scales):
        raise _odd(entry.name, where, f"must have the bits and scales of {kind}")


def _check_same(entry: Entry, read: Mapping[str, Entry], where: str) -> None:
    other = entry.body.get("as")
    of = read.get(other) if isinstance(other, str) else None
    if of is None or of.kind == "same" or of.shape != entry.shape:
        raise _odd(entry.name, where, f"must be the same as a linear of its shape, not {_cut(other)}")


def _sizes(found: Any, name: str, where: str, what: str) -> tuple[int, int]:
    good = isinstance(found, list) and len(found) == 2
    if not good or not all(type(size) is int and 0 < size < LARGEST for size in found):
        raise _odd(name, where, f"must have a {what} of two sizes, not {_cut(found)}")
    return found[0], found[1]


def _affine(raw: RawFolder, entry: Entry) -> Decoded:
    bits, scales = entry.body["bits"], tuple(entry.body["scale"])
    codes = _packed(raw, f"{entry.name}.codes", entry.shape, bits)
    scale = raw.floats(f"{entry.name}.scale", scales)
    kind = entry.body.get("zero_point")
    if kind not in (None, "whole", "real"):
        raise _odd(
            entry.name, str(raw.path), f"must have zero points that are whole or real, not {_cut(kind)}"
        )
    zero = None
    if kind == "real":
        zero = raw.floats(f"{entry.name}.zero_point", scales)
    elif kind == "whole":
        zero = _packed(raw, f"{entry.name}.zero_point", scales, bits).astype(np.float32)
    return Decoded(codes, bits, scale, zero_OG=zero)


def _table(raw: RawFolder, entry: Entry) -> Decoded:
    bits, scales, where = entry.body["bits"], tuple(entry.body["scale"]), str(raw.path)
    tables, name = raw.quantization.get("tables"), entry.body.get("table")
    if not isinstance(tables, dict) or not isinstance(name, str) or name not in tables:
        raise _odd(entry.name, where, f"must name a table, not {_cut(name)}")
    table = array(tables[name], f"tables[{name!r}]", where, 256)
    if table.shape != (2**bits,):
        raise _odd(entry.name, where, f"must have a table of {2**bits} values, not {list(table.shape)}")
    codes = _packed(raw, f"{entry.name}.codes", entry.shape, bits)
    return Decoded(codes, bits, _table_scale(raw, entry, scales), table=table)


def _table_scale(raw: RawFolder, entry: Entry, scales: tuple[int, ...]) -> Floats:
    kind, name = entry.body.get("scale_type"), f"{entry.name}.scale"
    if kind == "float":
        return raw.floats(name, scales)
    if kind not in ("e8m0", "e4m3"):
        raise _odd(entry.name, str(raw.path), f"must have scales of float, e8m0 or e4m3, not {_cut(kind)}")
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
    codes = _packed(raw, f"{entry.name}.codes", entry.shape, bits)
    scale = _spread(_halves(raw, f"{entry.name}.d", blocks), groups)
    if kind in SUB_SCALES:
        width, shift = SUB_SCALES[kind]
        sub = _packed(raw, f"{entry.name}.sub_scales", (rows, groups), width).astype(np.float32)
        scale = scale * (sub - np.float32(shift))
    if kind not in WITH_MINIMA:
        return Decoded(codes, bits, scale)
    offset = _spread(_halves(raw, f"{entry.name}.dmin", blocks), groups)
    if kind in ("Q4_K", "Q5_K"):
        offset = -(offset * _packed(raw, f"{entry.name}.sub_mins", (rows, groups), 6).astype(np.float32))
    return Decoded(codes, bits, scale, offset_OG=offset)


def _halves(raw: RawFolder, name: str, shape: tuple[int, int]) -> Floats:
    return raw.array(name, "F16", shape).astype(np.float32)


def _spread(of_blocks: Floats, groups: int) -> Floats:
    """What a block has, for each of its groups."""
    return np.repeat(of_blocks, groups // of_blocks.shape[1], axis=1)


def _packed(raw: RawFolder, name: str, shape: tuple[int, ...], bits: int) -> NDArray[np.uint8]:
    """Codes [R, N] of rows of bits, uint8."""
    rows, width = shape
    stream = raw.array(name, "U8", (rows, (width * bits + 7) // 8))
    codes = np.empty((rows, width), np.uint8)
    step = max(1, 2**20 // max(width, 1))
    for start in range(0, rows, step):
        lines = np.unpackbits(stream[start : start + step], axis=1, count=width * bits, bitorder="little")
        weights = (1 << np.arange(bits)).astype(np.uint8)
        codes[start : start + step] = lines.reshape(-1, width, bits) @ weights
    return codes


def _odd(name: str, where: str, must: str) -> CheckpointError:
    return CheckpointError(f"quantization_config of {where}: {_cut(name)} {must}. Export again.")


def _cut(found: Any) -> str:
    """A value as a message shows it."""
    text = repr(found)
    return text if len(text) <= 80 else f"{text[:77]}..."
