"""A folder of safetensors as numpy arrays on the files themselves: headers checked first, nothing copied. No torch."""

from collections.abc import Mapping
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantlab.errors import CheckpointError
from quantlab.inspection.folder import open_folder
from quantlab.inspection.safetensors_header import StoredTensor

__all__ = ["RawFolder", "as_floats"]

_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1",
    "U16": "<u2", "U32": "<u4", "U64": "<u8", "BOOL": "u1",
    "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1",
}  # fmt: skip
"""Dtype of a file -> dtype of its bytes in numpy; what numpy lacks comes as unsigned integers."""


class RawFolder:
    """Config and tensors of a folder that passed `open_folder`.

    Raises:
        CheckpointError: what is missing, damaged or unsafe, when the folder is opened; a tensor or a dtype that is not
            what a format asks for, when it is read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        folder = open_folder(path)
        self.config: Mapping[str, Any] = folder.config
        self.tensors: Mapping[str, StoredTensor] = folder.tensors

    @property
    def quantization(self) -> Mapping[str, Any]:
        """`quantization_config` of config.json."""
        found = self.config.get("quantization_config")
        if not isinstance(found, dict):
            raise CheckpointError(
                f"config.json must say how weights are quantized: that of {self.path} does not."
            )
        return found

    def modules(self, leaf: str) -> list[str]:
        """Modules that hold a tensor of this last name, in the order of their names."""
        return sorted(name.removesuffix(f".{leaf}") for name in self.tensors if name.endswith(f".{leaf}"))

    def array(
        self, name: str, dtype: str | None = None, shape: tuple[int, ...] | None = None
    ) -> NDArray[Any]:
        """One tensor, read-only and mapped from its file; BF16 and small floats as the integers that hold their bits.

        Args:
            dtype: the dtype that the format asks for, as the file names it.
            shape: the shape that it asks for.
        """
        stored = self.tensors.get(name)
        if stored is None:
            raise CheckpointError(f"checkpoint lacks a tensor of its format: {self.path} has no {name!r}.")
        if dtype not in (None, stored.dtype) or shape not in (None, stored.shape):
            raise CheckpointError(
                f"a tensor must be as its format has it: {name!r} of {self.path} is {stored.dtype} "
                f"{list(stored.shape)}, not {dtype or stored.dtype} {list(stored.shape if shape is None else shape)}."
            )
        kind = np.dtype(_DTYPES[stored.dtype])
        begin = stored.begin
        flat = self._bytes(stored.file)[begin : begin + prod(stored.shape) * kind.itemsize]
        return flat.view(kind).reshape(stored.shape)

    def floats(self, name: str, shape: tuple[int, ...] | None = None) -> NDArray[np.float32]:
        """A tensor of F64, F32, F16 or BF16 as float32."""
        array = self.array(name, shape=shape)
        return as_floats(array, self.tensors[name].dtype, name, self.path)

    def _bytes(self, file: Path) -> NDArray[np.uint8]:
        if file not in self._mapped:
            mapped = (
                np.memmap(file, mode="r", dtype=np.uint8) if file.stat().st_size else np.zeros(0, np.uint8)
            )
            # A plain array: slices of a memory map carry its bookkeeping and are slow.
            self._mapped[file] = np.asarray(mapped)
        return self._mapped[file]

    @cached_property
    def _mapped(self) -> dict[Path, NDArray[np.uint8]]:
        return {}


def as_floats(array: NDArray[Any], dtype: str, name: str, path: Path) -> NDArray[np.float32]:
    """Stored floats as float32; BF16 is the upper half of one."""
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    if dtype not in ("F64", "F32", "F16"):
        raise CheckpointError(f"a tensor of floats was expected: {name!r} of {path} is {dtype}.")
    # Beyond float32 is infinite, which its reader refuses.
    with np.errstate(over="ignore"):
        return array.astype(np.float32)
