"""Numbers that stand in config.json itself: tables, ranges and rotations."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from quantlab.reading.decoded import Floats
from quantlab.reading.quantlab_format.faults import odd

__all__ = ["array", "rotation"]


def array(found: Any, what: str, where: str, most: int = 2**24) -> Floats:
    """Numbers of config.json: {"shape": [..], "float32": hexadecimal bytes}, of at most `most` values."""
    shape = found.get("shape") if isinstance(found, dict) else None
    text = found.get("float32") if isinstance(found, dict) else None
    if not isinstance(shape, list) or not isinstance(text, str) or len(shape) > 2:
        raise odd(what, where, "must have a shape and float32 bytes")
    if not all(type(size) is int and 0 < size <= most for size in shape):
        raise odd(what, where, f"must have a shape of 1 to {most} each")
    count = int(np.prod(shape, dtype=np.int64)) if shape else 1
    if count > most or len(text) != 8 * count:
        raise odd(what, where, f"must hold 8 hexadecimal digits for each of {shape}")
    try:
        data = bytes.fromhex(text)
    except ValueError:
        raise odd(what, where, "must be hexadecimal") from None
    if len(data) != 4 * count:
        raise odd(what, where, "must be hexadecimal")
    return np.frombuffer(data, "<f4").astype(np.float32).reshape(shape)


def rotation(quantization: Mapping[str, Any], size: int, where: str) -> list[Floats]:
    """The factors of the rotation of a size: orthogonal matrices whose sizes multiply to it."""
    known = quantization.get("rotations")
    found = known.get(str(size)) if isinstance(known, dict) else None
    if not isinstance(found, list) or not 0 < len(found) <= 32:
        raise odd(f"rotations[{size}]", where, "must be a list of factors")
    factors = [array(each, f"rotations[{size}]", where) for each in found]
    product = 1
    for factor in factors:
        if factor.ndim != 2 or factor.shape[0] != factor.shape[1]:
            raise odd(f"rotations[{size}]", where, "must have square factors")
        # Beyond 2, or not a number, is no entry of an orthogonal matrix.
        small = bool((np.abs(factor) < 2).all())
        if not small or np.abs(factor.astype(np.float64) @ factor.T - np.eye(len(factor))).max() >= 1e-4:
            raise odd(f"rotations[{size}]", where, "must have orthogonal factors")
        product *= len(factor)
    if product != size:
        raise odd(f"rotations[{size}]", where, "must have factors that multiply to its size")
    return factors
