"""The GEMM layout of AWQ read with numpy. No torch.

What is read is specified in the docstring of `quantlab.export.awq`. O outputs, I inputs, G groups.
"""

import numpy as np
from numpy.typing import NDArray

from quantlab.errors import CheckpointError
from quantlab.reading.decoded import Decoded
from quantlab.reading.raw import RawFolder

__all__ = ["decode", "linears"]

_SHIFT_OF_OUTPUT = (0, 16, 4, 20, 8, 24, 12, 28)
"""Where the code of each of a word's eight outputs begins."""


def linears(raw: RawFolder) -> list[str]:
    """Names of the linears in low bits."""
    return raw.modules("qweight")


def decode(raw: RawFolder, name: str) -> Decoded:
    """Codes, scales and zero points of one linear; no zero points where the folder says that grids are symmetric.

    Raises:
        CheckpointError: config or tensors are not of this layout.
    """
    group_size = _group_size(raw)
    shape = raw.array(f"{name}.qweight", "I32").shape
    if len(shape) != 2 or 0 in shape or shape[0] % group_size:
        raise CheckpointError(
            f"a packed matrix has two dimensions and whole groups of {group_size} rows: '{name}.qweight' of {raw.path} "
            f"is {list(shape)}."
        )
    num_inputs, words = shape
    groups = num_inputs // group_size
    codes_IO = _unpack(raw.array(f"{name}.qweight", "I32", shape))
    zeros_GO = _unpack(raw.array(f"{name}.qzeros", "I32", (groups, words)))
    scales_GO = raw.array(f"{name}.scales", "F16", (groups, 8 * words)).astype(np.float32)
    meta = raw.quantization.get("meta")
    symmetric = isinstance(meta, dict) and meta.get("sym") is True
    if symmetric and (zeros_GO != 8).any():
        raise CheckpointError(
            f"zero points of a symmetric grid must be 8: '{name}.qzeros' of {raw.path} holds others."
        )
    return Decoded(
        np.ascontiguousarray(codes_IO.T),
        4,
        np.ascontiguousarray(scales_GO.T),
        None if symmetric else np.ascontiguousarray(zeros_GO.T).astype(np.float32),
    )


def _unpack(words: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Words [N, W] as the codes of 8 W outputs [N, 8 W]."""
    unsigned = words.view(np.uint32)
    codes = np.empty((*words.shape, 8), dtype=np.uint8)
    for output, shift in enumerate(_SHIFT_OF_OUTPUT):
        codes[..., output] = (unsigned >> np.uint32(shift)) & np.uint32(15)
    return codes.reshape(len(words), -1)


def _group_size(raw: RawFolder) -> int:
    """The group_size of config.json, whose other settings must be those of this layout."""
    config = raw.quantization
    bits, version, group_size = config.get("bits"), config.get("version"), config.get("group_size")
    if (
        bits != 4
        or str(version).lower() != "gemm"
        or type(group_size) is not int
        or not 0 < group_size < 2**31
    ):
        raise CheckpointError(
            f"awq is read with bits 4, version gemm and a positive group_size: config.json of {raw.path} has {bits!r}, "
            f"{version!r} and {group_size!r}."
        )
    return group_size
