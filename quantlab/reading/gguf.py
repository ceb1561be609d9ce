"""gguf: codes of a GGUF file's blocks, in the order of the model's matrices. No torch.

The file's header is bounded by `quantlab.inspection.gguf_header` before anything of it is read; the layout of files is
specified in `quantlab.export.gguf`, that of blocks in `quantlab.export.gguf_blocks`. O outputs, I inputs.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantlab.errors import CheckpointError, nearest
from quantlab.inspection.gguf_header import GgufHeader, GgufTensor, read_gguf
from quantlab.inspection.gguf_names import Stored, architecture_of, config_of, hf_name
from quantlab.reading.decoded import Decoded
from quantlab.reading.gguf_blocks import KINDS, unpack

__all__ = ["decode", "linears"]


def linears(path: Path) -> list[str]:
    """Names in transformers of the matrices of decoder layers that are in low bits, sorted.

    Raises:
        CheckpointError: the file is damaged, or of an architecture that has no names here.
    """
    return sorted(_low_bits(path, read_gguf(path)))


def decode(path: Path, name: str) -> Decoded:
    """Codes and scales of one of them, [O, I] as the quantizer has it.

    Raises:
        CheckpointError: as `linears`, there is no such matrix, or its blocks hold a scale that is not finite.
    """
    header = read_gguf(path)
    found = _low_bits(path, header)
    if name not in found:
        raise CheckpointError(
            f"matrix must be in low bits to be decoded: {path} has no {name!r}.{nearest(name, found)}"
        )
    own, stored = found[name]
    tensor = header.tensors[own]
    return unpack(tensor.type.name, _rows(path, header, own, tensor, stored))


def _low_bits(path: Path, header: GgufHeader) -> dict[str, tuple[str, Stored | None]]:
    """Name in transformers -> name in the file, and how its rows were changed."""
    architecture, found = architecture_of(header, path), {}
    for own, tensor in header.tensors.items():
        if own.startswith("blk.") and len(tensor.shape) == 2 and tensor.type.name in KINDS:
            name, stored = hf_name(own, architecture, path)
            found[name.removesuffix(".weight")] = own, stored
    return found


def _rows(
    path: Path, header: GgufHeader, own: str, tensor: GgufTensor, stored: Stored | None
) -> NDArray[np.uint8]:
    """Blocks of each row, [O, bytes]; rows of a head from (pair, half) back to (half, pair)."""
    num_rows = tensor.shape[0]
    rows = np.memmap(path, mode="r", dtype=np.uint8)[tensor.begin : tensor.end].reshape(num_rows, -1)
    # Matrices that go by "transposed" are [O, I] in the file, which is what codes are.
    if stored != "permuted":
        return np.array(rows)
    config = config_of(header, path)
    num_heads = config.get("num_attention_heads", 0)
    if ".attn_k." in own:
        num_heads = config.get("num_key_value_heads", num_heads)
    if type(num_heads) is not int or num_heads < 1 or num_rows % (2 * num_heads):
        raise CheckpointError(
            f"heads must divide the rows of {own!r}: {path} has {num_rows} rows, {num_heads} heads."
        )
    place = np.arange(num_rows).reshape(num_heads, -1, 2).swapaxes(1, 2).reshape(-1)
    return np.array(rows[place])
