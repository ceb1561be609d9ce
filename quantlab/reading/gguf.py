"""gguf: codes of a GGUF file's blocks, in the order of the model's matrices. No torch.

The file's header is bounded by `quantlab.inspection.gguf_header` before anything of it is read; the layout of files is
specified in `quantlab.export.gguf`, that of blocks in `quantlab.export.gguf_blocks`. O outputs, I inputs.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantlab.errors import CheckpointError, nearest
from quantlab.inspection.gguf_header import read_gguf
from quantlab.inspection.gguf_names import architecture_of, config_of, hf_name
from quantlab.reading.decoded import Decoded
from quantlab.reading.gguf_blocks import unpack

__all__ = ["GgufFile", "decode", "linears"]

_FLOATS = ("F16", "BF16", "F32", "F64")


class GgufFile:
    """A GGUF file whose header was read and bounded, once.

    Raises:
        CheckpointError: the file is damaged, or of an architecture that has no names here.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.header = path, read_gguf(path)
        architecture = architecture_of(self.header, path)
        self.names = {own: hf_name(own, architecture, path) for own in self.header.tensors}
        """Name in the file -> name in transformers, and how its rows were changed."""
        if len({name for name, _ in self.names.values()}) != len(self.names):
            raise CheckpointError(
                f"every tensor must have a place of its own: {path} holds two of one layer."
            )
        self.low_bits = {
            self.names[own][0].removesuffix(".weight"): own
            for own, tensor in self.header.tensors.items()
            if own.startswith("blk.") and len(tensor.shape) == 2 and tensor.type.name not in _FLOATS
        }
        """Name in transformers -> name in the file, of every matrix of decoder layers that is in low bits."""


def linears(file: GgufFile) -> list[str]:
    """Names in transformers of the matrices of decoder layers that are in low bits, sorted."""
    return sorted(file.low_bits)


def decode(file: GgufFile, name: str) -> Decoded:
    """Codes and scales of one of them, [O, I] as the quantizer has it.

    Raises:
        CheckpointError: there is no such matrix, its type is not read here, or its blocks hold a scale that is not
            finite.
    """
    if name not in file.low_bits:
        raise CheckpointError(
            f"matrix must be in low bits to be decoded: {file.path} has no {name!r}.{nearest(name, file.low_bits)}"
        )
    own = file.low_bits[name]
    return unpack(file.header.tensors[own].type.name, _rows(file, own))


def _rows(file: GgufFile, own: str) -> NDArray[np.uint8]:
    """Blocks of each row, [O, bytes]; rows of a head from (pair, half) back to (half, pair)."""
    tensor, (_, stored) = file.header.tensors[own], file.names[own]
    path, num_rows = file.path, tensor.shape[0]
    if num_rows == 0:
        raise CheckpointError(f"a matrix in low bits must have rows: {own!r} of {path} has none.")
    rows = np.memmap(path, mode="r", dtype=np.uint8)[tensor.begin : tensor.end].reshape(num_rows, -1)
    # Matrices that go by "transposed" are [O, I] in the file, which is what codes are.
    if stored != "permuted":
        return np.array(rows)
    config = config_of(file.header, path)
    num_heads = config.get("num_attention_heads", 0)
    if ".attn_k." in own:
        num_heads = config.get("num_key_value_heads", num_heads)
    if type(num_heads) is not int or num_heads < 1 or num_rows % (2 * num_heads):
        raise CheckpointError(
            f"heads must divide the rows of {own!r}: {path} has {num_rows} rows, {num_heads} heads."
        )
    place = np.arange(num_rows).reshape(num_heads, -1, 2).swapaxes(1, 2).reshape(-1)
    return np.array(rows[place])
