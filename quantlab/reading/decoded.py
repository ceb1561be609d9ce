"""One low-bit matrix as codes and what they mean: what every decoder returns, whatever the format. No torch.

    value = (code - zero) * scale      zero None stands for 2^(bits - 1): a signed grid, stored unsigned
    value = code * scale + offset      where an offset is given (GGUF's minimum)
    value = table[code] * scale        where a table is given (nf4, fp8, ...)

in float32, each operation rounded by itself, in that order. O outputs, I inputs, G groups of I / G neighbours.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Decoded"]

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Decoded:
    """Codes of one matrix, and what they stand for."""

    codes_OI: NDArray[np.uint8]
    bits: int
    scale_OG: Floats
    """G = 1 for a scale per output; a scale per matrix is [1, 1]."""
    zero_OG: Floats | None = None
    offset_OG: Floats | None = None
    table: Floats | None = None
    """[2^bits]."""

    def real(self) -> Floats:
        """The real matrix, float32 [O, I]."""
        codes = self.codes_OI.reshape(len(self.codes_OI), self.scale_OG.shape[1], -1)
        scale = self.scale_OG[:, :, None]
        if self.table is not None:
            values = self.table[codes] * scale
        elif self.offset_OG is not None:
            values = codes.astype(np.float32) * scale + self.offset_OG[:, :, None]
        else:
            zero = np.float32(2 ** (self.bits - 1)) if self.zero_OG is None else self.zero_OG[:, :, None]
            values = (codes.astype(np.float32) - zero) * scale
        return np.asarray(values, dtype=np.float32).reshape(self.codes_OI.shape)

    def digests(self) -> dict[str, str]:
        """SHA-256 of the codes, and of scales with zeros, offsets and table: what the MANIFEST holds of a matrix.

        Codes go in as bytes, the rest as little-endian float32, each in C order behind its name and shape.
        """
        scales = {
            "scale": self.scale_OG,
            "zero": self.zero_OG,
            "offset": self.offset_OG,
            "table": self.table,
        }
        codes = {f"codes{self.bits}": self.codes_OI}
        return {
            "codes": _digest(codes),
            "scales": _digest({k: v for k, v in scales.items() if v is not None}),
        }


def _digest(arrays: "dict[str, NDArray[np.uint8]] | dict[str, Floats]") -> str:
    total = hashlib.sha256()
    for name, array in arrays.items():
        dtype = "u1" if array.dtype == np.uint8 else "<f4"
        total.update(f"{name} {list(array.shape)}\n".encode())
        total.update(np.ascontiguousarray(array, dtype=dtype).data)
    return total.hexdigest()
