"""quanto, decoded: qint8, qint4 and qint2 weights. No torch.

    qint8    weight._data int8 [O, I], weight._scale [O, 1]: weight = code * scale.
    qint4    weight._data._data uint8 [D, g], D = ceil(R * b / 8): the matrix, cut in row order into R = O * I / g rows
    qint2    of g; byte [r, j] holds code [r + i * D, j] in bits i * b .. i * b + b - 1.
             weight._scale [R, 1]. weight._shift [R, 1]: where it is of integers, weight = (code - shift) * scale; where
             it is of floats, weight = code * scale - shift.

quanto_qmap.json says b of each linear. R and g do not tell O and I apart; `quantization_config` of config.json does, in
`shapes`, and `group_size` and `symmetric` say what the scheme was: scales of a larger group are repeated, and a
symmetric grid has zero points of 2^(b-1). A folder that quanto wrote itself has none of these: its qint8 is read all
the same.

Source: optimum-quanto 0.2.7, `tensor/weights` and `tensor/packed.py`. O outputs, I inputs, G groups in a row, b bits.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantlab.errors import CheckpointError
from quantlab.inspection.folder import inside, read_object
from quantlab.reading.decoded import Decoded
from quantlab.reading.raw import RawFolder

__all__ = ["QMAP", "decode", "linears"]

QMAP = "quanto_qmap.json"
"""Beside config.json in every folder of quanto's."""
_BITS = {"qint8": 8, "qint4": 4, "qint2": 2}


def linears(raw: RawFolder) -> list[str]:
    """Names of the linears in low bits."""
    return raw.modules("weight._scale")


def decode(raw: RawFolder, name: str) -> Decoded:
    """Codes and scales of one linear.

    Raises:
        CheckpointError: a kind of weights, shape or dtype that is not the format's.
    """
    bits = _bits(raw, name)
    if bits == 8:
        codes = raw.array(f"{name}.weight._data", "I8")
        if codes.ndim != 2:
            raise CheckpointError(f"codes must be a matrix: {name!r} of {raw.path} has {list(codes.shape)}.")
        scale = raw.floats(f"{name}.weight._scale", (len(codes), 1))
        # uint8 wraps around: -128 + 128 is 0.
        return Decoded(codes.view(np.uint8) + np.uint8(128), 8, scale)
    facts = _facts(raw)
    rows, width = _shape(raw, name, facts)
    codes, size = _unpacked(raw, name, bits, rows * width)
    if width % size:
        raise CheckpointError(
            f"groups must divide a row: {name!r} of {raw.path} has {size} in rows of {width}."
        )
    groups = (rows, width // size)
    scale = raw.floats(f"{name}.weight._scale", (rows * groups[1], 1)).reshape(groups)
    zero, offset = _zeros(raw, name, bits, scale)
    own = _own_groups(raw, name, facts, width, size)
    parts = {"scale_OG": scale, "zero_OG": zero, "offset_OG": offset}
    merged = {key: None if part is None else _merged(raw, name, part, own) for key, part in parts.items()}
    if facts.get("symmetric"):
        merged |= {"zero_OG": None, "offset_OG": None}
        _check_symmetric(raw, name, 2 ** (bits - 1), scale, zero, offset)
    return Decoded(codes.reshape(rows, width), bits, **merged)  # type: ignore[arg-type]


def _unpacked(raw: RawFolder, name: str, bits: int, count: int) -> tuple[NDArray[np.uint8], int]:
    """Codes [R, g] of the grouped matrix, and g."""
    packed = raw.array(f"{name}.weight._data._data", "U8")
    per_byte = 8 // bits
    # The size of the file bounds what is made of it.
    size = packed.shape[1] if packed.ndim == 2 else 0
    if size < 1 or count % size or len(packed) != -(-count // size // per_byte):
        raise CheckpointError(
            f"packed codes must fill their matrix: {name!r} of {raw.path} has {list(packed.shape)} bytes for {count} "
            f"codes of {bits} bits."
        )
    planes = [(packed >> np.uint8(bits * place)) & np.uint8(2**bits - 1) for place in range(per_byte)]
    return np.concatenate(planes)[: count // size], size


def _zeros(
    raw: RawFolder, name: str, bits: int, scale: NDArray[np.float32]
) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]:
    """(zero points, offsets) [O, G]: one of the two."""
    shape = (scale.size, 1)
    key = f"{name}.weight._shift"
    stored = raw.array(key, None, shape)
    if raw.tensors[key].dtype not in ("U8", "I8"):
        return None, -raw.floats(key, shape).reshape(scale.shape)
    if stored.min() < 0 or stored.max() >= 2**bits:
        raise CheckpointError(
            f"zero points must lie within 0 .. {2**bits - 1}: those of {name!r} of {raw.path} do not."
        )
    return stored.astype(np.float32).reshape(scale.shape), None


def _check_symmetric(
    raw: RawFolder,
    name: str,
    half: int,
    scale: NDArray[np.float32],
    zero: NDArray[np.float32] | None,
    offset: NDArray[np.float32] | None,
) -> None:
    fits = (zero == half).all() if zero is not None else np.array_equal(-scale * np.float32(half), offset)  # type: ignore[arg-type]
    if not fits:
        raise CheckpointError(
            f"zero points of a symmetric grid must be {half}: those of {name!r} of {raw.path} are not."
        )


def _own_groups(raw: RawFolder, name: str, facts: Mapping[str, Any], width: int, size: int) -> int:
    """quanto's groups in one of the scheme's."""
    own = facts.get("group_size", size) or width
    if type(own) is not int or own < 1 or own % size or width % own:
        raise CheckpointError(
            f"group_size must hold whole groups of {size}: that of {name!r} of {raw.path} is {own!r:.100}."
        )
    return own // size


def _merged(raw: RawFolder, name: str, values: NDArray[np.float32], times: int) -> NDArray[np.float32]:
    """One of every `times` equal neighbours in a row."""
    apart = values.reshape(len(values), -1, times)
    if not (apart == apart[:, :, :1]).all():
        raise CheckpointError(f"scales of one group must be equal: those of {name!r} of {raw.path} are not.")
    return np.ascontiguousarray(apart[:, :, 0])


def _bits(raw: RawFolder, name: str) -> int:
    entry = read_object(inside(raw.path / QMAP)).get(name)
    kind, activations = (
        (entry.get("weights"), entry.get("activations")) if isinstance(entry, dict) else (None, None)
    )
    if not isinstance(kind, str) or kind not in _BITS or activations != "none":
        raise CheckpointError(
            f"quanto is read as qint8, qint4 or qint2 of weights alone: {QMAP} of {raw.path} has {entry!r:.100} for "
            f"{name!r}."
        )
    return _BITS[kind]


def _facts(raw: RawFolder) -> Mapping[str, Any]:
    found = raw.config.get("quantization_config")
    return found if isinstance(found, dict) else {}


def _shape(raw: RawFolder, name: str, facts: Mapping[str, Any]) -> tuple[int, int]:
    shapes = facts.get("shapes")
    shape = shapes.get(name) if isinstance(shapes, dict) else None
    if not isinstance(shape, list) or len(shape) != 2 or any(type(n) is not int or n < 1 for n in shape):
        raise CheckpointError(
            f"qint4 and qint2 need the shapes of their matrices, as quantlab writes them into config.json: {raw.path} "
            f"has {shape!r:.100} for {name!r}."
        )
    return shape[0], shape[1]
