"""Rows of bits: codes as packed matrices hold them. R rows, N codes of each."""

import numpy as np
from numpy.typing import NDArray

from quantlab.reading.raw import RawFolder

__all__ = ["packed"]


def packed(raw: RawFolder, name: str, shape: tuple[int, ...], bits: int) -> NDArray[np.uint8]:
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
