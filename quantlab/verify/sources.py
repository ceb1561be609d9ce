"""Where the codes of a folder are, whatever its format: names of its linears, their codes, their bytes. No torch."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

from quantlab.errors import CheckpointError
from quantlab.inspection.gguf_header import GgufTensor
from quantlab.reading import gguf
from quantlab.reading.decoded import Decoded
from quantlab.reading.raw import RawFolder
from quantlab.reading.readers import decoder_of

__all__ = ["GGUF", "Source", "source_of"]

GGUF = "model.gguf"


class Source(Protocol):
    """Codes of one folder, read without the code that wrote them."""

    def linears(self) -> list[str]:
        """Names of the linears in low bits."""

    def decode(self, name: str) -> Decoded:
        """Codes and scales of one of them."""

    def stored_as(self, name: str) -> str:
        """The type that a linear is stored in, where a format has several: `Q5_0`; else empty."""

    def num_bytes(self) -> int:
        """Bytes of the tensors that stand for weights in low bits."""

    def rounded_inputs(self) -> dict[str, int]:
        """Linears whose inputs llama.cpp rounds -> how many share a scale."""


class _RawSource:
    """A folder of safetensors."""

    def __init__(self, folder: Path) -> None:
        self._raw = RawFolder(folder)
        self._decoder = decoder_of(self._raw)
        for key in ("attn_implementation", "_attn_implementation"):
            # quantlab names its own when it loads; engines do as the config says.
            if not re.fullmatch(r"\w{0,40}", str(self._raw.config.get(key, ""))):
                raise CheckpointError(
                    f"config.json must not set {key!r} to what engines fetch and run: that of {folder} does."
                )

    def linears(self) -> list[str]:
        """Names of the linears in low bits."""
        return self._decoder.linears(self._raw)

    def decode(self, name: str) -> Decoded:
        """Codes and scales of one of them."""
        return self._decoder.decode(self._raw, name)

    def stored_as(self, name: str) -> str:
        """Empty: every linear is stored alike."""
        return ""

    def num_bytes(self) -> int:
        """Bytes of the tensors that stand for weights in low bits."""
        return sum(self._raw.tensors[name].end - self._raw.tensors[name].begin for name in self._coded())

    def rounded_inputs(self) -> dict[str, int]:
        """None: llama.cpp does not read it."""
        return {}

    def _coded(self) -> set[str]:
        """Names of the tensors that stand for weights in low bits: all of a linear's but its bias."""
        linears = self.linears()
        prefixes = tuple(f"{linear}." for linear in linears)
        biases = {f"{linear}.bias" for linear in linears}
        return {name for name in self._raw.tensors if name.startswith(prefixes) and name not in biases}


class _GgufSource:
    def __init__(self, file: Path, skip: Sequence[str]) -> None:
        self._file, self._skip = gguf.GgufFile(file), skip

    def linears(self) -> list[str]:
        # What was skipped keeps the source's own blocks, where that is a GGUF file.
        return [
            name
            for name in gguf.linears(self._file)
            if not any(fnmatchcase(name, pattern) for pattern in self._skip)
        ]

    def decode(self, name: str) -> Decoded:
        return gguf.decode(self._file, name)

    def stored_as(self, name: str) -> str:
        return self._file.header.tensors[self._file.low_bits[name]].type.name

    def num_bytes(self) -> int:
        tensors = [self._file.header.tensors[self._file.low_bits[name]] for name in self.linears()]
        return sum(tensor.end - tensor.begin for tensor in tensors)

    def rounded_inputs(self) -> dict[str, int]:
        # llama.cpp's `vec_dot_type`: K types are multiplied with blocks of 256, the others with blocks of 32.
        tensors = self._file.header.tensors
        sizes = {
            self._file.names[own][0].removesuffix(".weight"): _block(tensor)
            for own, tensor in tensors.items()
            if _block(tensor)
        }
        embedding = tensors.get("token_embd.weight")
        if embedding is not None and _block(embedding) and "output.weight" not in tensors:
            sizes["lm_head"] = _block(embedding)  # tied
        return sizes


def _block(tensor: GgufTensor) -> int:
    """Inputs that llama.cpp rounds together before it multiplies with such a tensor; 0 where it rounds none."""
    kind = tensor.type.name
    return 256 if kind.endswith("_K") else 32 if kind.startswith("Q") else 0


def source_of(folder: Path, skip: Sequence[str] = ()) -> Source:
    """The codes of a folder.

    Args:
        skip: patterns of linears that keep what they were.

    Raises:
        CheckpointError: it is damaged, or in no format that is read here.
    """
    file = folder / GGUF
    return _GgufSource(file, skip) if file.exists() else _RawSource(folder)
