"""gguf: one file that llama.cpp runs and transformers reads.

    model.gguf                 the container is specified in `gguf_file`, byte by byte

Keys, in this order: `general.*` (architecture, name, what wrote it, file_type, quantization_version 2 where weights are
in low bits); `ARCHITECTURE.*`, the sizes; `tokenizer.*`. Tensors, in the model's order, under llama.cpp's names:

    linears in low bits        rows [O] of blocks (`gguf_blocks`), of the scheme's type; where I is no multiple of 256 a
                               K type gives way to llama.cpp's own fallback: Q3_K to Q4_0, Q4_K to Q5_0, Q5_K to Q5_1,
                               Q6_K to Q8_0
    vectors                    F32, which llama.cpp asks for
    other matrices             the first of F16, BF16, F32 that holds every value; of a GGUF source the bytes of the
                               source, where its values are still those
    output.weight              not there where it is tied to token_embd.weight

llama      rows of q and k, and their biases, go (head, pair, half) in the file; transformers has (head, half, pair)
gpt2       matrices are [O, I] in the file; transformers has [I, O]

Under the scheme w16 all matrices are as "other matrices" without the source's bytes. Read by quantlab.reading.gguf.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

import quantlab
from quantlab.errors import SchemeError
from quantlab.export.gguf_blocks import block_bytes
from quantlab.export.gguf_file import FileTensor, Value, key_bytes, write_file
from quantlab.export.gguf_sizes import architecture_name, note_of, size_keys
from quantlab.export.gguf_tokenizer import tokenizer_keys
from quantlab.export.job import ExportJob
from quantlab.export.shards import Layout, Part, TensorType
from quantlab.export.tensors import holds, tied_names
from quantlab.inspection.gguf_header import GgufHeader, GgufTensor, read_gguf
from quantlab.inspection.gguf_names import GGUF_ARCHITECTURES, GgufArchitecture, Stored, gguf_name
from quantlab.layers.targets import choose_targets
from quantlab.methods.k_quants import FALLBACKS, SUPERBLOCK
from quantlab.models.gguf_weights import dequantized
from quantlab.numerics.block import BlockTensor
from quantlab.schemes import WeightFormat

if TYPE_CHECKING:
    from quantlab.models.loading import Checkpoint

__all__ = ["FILE", "check", "write"]

FILE = "model.gguf"

Bytes = NDArray[np.uint8]

_FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q3_K": 11, "Q4_K": 14, "Q5_K": 16,
    "Q6_K": 18, "BF16": 32,
}  # fmt: skip
"""Type of most weights -> `general.file_type`, llama.cpp's `llama_ftype`; K types are its "small" ones."""
_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def check(checkpoint: "Checkpoint") -> None:
    """Refuse a model that no file holds, before anything is computed.

    Raises:
        SchemeError: llama.cpp has no architecture, no tensor or no tokenizer that does what this model's does.
    """
    model = checkpoint.model
    architecture = GGUF_ARCHITECTURES[architecture_name(model)]
    for name in model.state_dict():
        _own_name(name, model, architecture)
    tokenizer_keys(checkpoint.tokenizer, checkpoint.info, _num_tokens(model))


def write(job: ExportJob, folder: Path) -> Layout:
    """Write `model.gguf`; returns what the card and the summary say of it.

    Raises:
        SchemeError: as `check`, or two linears share a weight.
    """
    name, num_tokens = architecture_name(job.model), _num_tokens(job.model)
    tokenizer = tokenizer_keys(job.tokenizer, job.info, num_tokens)
    tensors = _Tensors(job, GGUF_ARCHITECTURES[name]).all()
    spec = job.scheme.weights
    main = spec.name.upper() if isinstance(spec, WeightFormat) else _most_common(tensors)
    keys = _general(job, name, main) | size_keys(job.model.config, name, num_tokens)
    written = [key_bytes(key, value) for key, value in keys.items()]
    write_file(folder / FILE, [*written, *tokenizer], list(tensors.values()))
    return _layout(job, tensors, main)


def _layout(job: ExportJob, tensors: Mapping[str, FileTensor], main: str) -> Layout:
    """Sizes of the linears; under w16, which has none in low bits, of those that other schemes would take."""
    names = job.linears or tuple(target.name for target in choose_targets(job.model, ()).chosen)
    stored = {name: tensors[f"{name}.weight"] for name in names}
    parts = {
        name: Part({"blocks": TensorType(torch.uint8, (tensor.num_bytes,))}, dict)
        for name, tensor in stored.items()
    }
    kept = [
        tensor.kind for name, tensor in tensors.items() if name.removesuffix(".weight") not in job.linears
    ]
    return Layout(
        linears=parts,
        quantization_config={},
        name=main,
        num_codes=sum(prod(tensor.shape) for tensor in stored.values()),
        kept_in=" and ".join(sorted(set(kept))),
        notes=tuple(filter(None, [note_of(job.model.config)])),
    )


def _general(job: ExportJob, name: str, main: str) -> dict[str, Value]:
    keys: dict[str, Value] = {
        "general.architecture": name,
        "general.type": "model",
        "general.name": job.info.name,
        "general.quantized_by": f"quantlab {quantlab.__version__}",
        "general.file_type": _FILE_TYPES[main],
    }
    return keys | ({} if main in _FLOATS else {"general.quantization_version": 2})


def _most_common(tensors: Mapping[str, FileTensor]) -> str:
    """The type that holds most values of matrices."""
    counts: Counter[str] = Counter()
    for tensor in tensors.values():
        counts[tensor.kind] += prod(tensor.shape) if len(tensor.shape) > 1 else 0
    return counts.most_common(1)[0][0]


@dataclass(frozen=True)
class _Tensors:
    """What becomes of every tensor of a model."""

    job: ExportJob
    architecture: GgufArchitecture

    def all(self) -> dict[str, FileTensor]:
        """Name in the model -> tensor of the file, in the model's order."""
        model, tensors = self.job.model, {}
        tied, linears = tied_names(model), {f"{name}.weight" for name in self.job.linears}
        for name, tensor in model.state_dict().items():
            if name in tied:
                continue
            make = self._in_low_bits if name in linears else self._kept
            tensors[name] = make(name, tensor, *_own_name(name, model, self.architecture))
        return tensors

    def _in_low_bits(self, name: str, tensor: Tensor, own: str, stored: Stored | None) -> FileTensor:
        spec, owner = self.job.scheme.weights, name.removesuffix(".weight")
        assert isinstance(spec, WeightFormat), "the format's check lets no other weights through"
        shape = tuple(tensor.shape[::-1] if stored == "transposed" else tensor.shape)
        asked = spec.name.upper()
        kind = FALLBACKS.get(asked, asked) if shape[1] % SUPERBLOCK else asked

        def build() -> Bytes:
            codes = self.job.codes(owner)
            assert isinstance(codes, BlockTensor) and codes.kind == kind, f"{owner} is not in {kind}"
            rows = torch.from_numpy(block_bytes(codes))
            self.job.advance(1)
            # Codes are those of [O, I] already.
            return _bytes(self._permuted(rows, own) if stored == "permuted" else rows)

        return FileTensor(own, kind, shape, build)

    def _kept(self, name: str, tensor: Tensor, own: str, stored: Stored | None) -> FileTensor:
        """A tensor with all its values: as the source has it, or in the smallest float type that holds them."""
        arranged = self._arranged(tensor.detach(), own, stored)
        shape = tuple(arranged.shape)
        if tensor.ndim > 1 and (at := self._in_source(arranged, own)):
            return FileTensor(own, at.type.name, shape, lambda: self._source[1][at.begin : at.end])
        fits = (kind for kind, dtype in _FLOATS.items() if tensor.ndim > 1 and holds(dtype, tensor))
        kind = next(fits, "F32")
        return FileTensor(
            own, kind, shape, lambda: _bytes(self._arranged(tensor.detach().to(_FLOATS[kind]), own, stored))
        )

    def _in_source(self, arranged: Tensor, own: str) -> GgufTensor | None:
        """Where the source's file has these very values."""
        header, data = self._source
        at = header.tensors.get(own) if header else None
        if at is None or self.job.scheme.weights is None or at.shape != tuple(arranged.shape):
            return None
        same = np.array_equal(dequantized(data, at), arranged.float().cpu().numpy())
        return at if same else None

    @cached_property
    def _source(self) -> tuple[GgufHeader | None, Bytes]:
        path = self.job.info.path
        if self.job.info.kind != "gguf":
            return None, np.zeros(0, np.uint8)
        # A plain array: slices of a memory map carry its bookkeeping and are slow.
        return read_gguf(path), np.asarray(np.memmap(path, mode="r", dtype=np.uint8))

    def _arranged(self, tensor: Tensor, own: str, stored: Stored | None) -> Tensor:
        """The tensor as llama.cpp's converter would have it."""
        if stored is None:
            return tensor
        return tensor.t() if stored == "transposed" else self._permuted(tensor, own)

    def _permuted(self, rows: Tensor, own: str) -> Tensor:
        """Rows of each head from (half, pair) to (pair, half)."""
        config = self.job.model.config
        heads = config.num_attention_heads if ".attn_q." in own else config.num_key_value_heads
        halves: Tensor = rows.unflatten(0, (heads, 2, -1))
        return halves.transpose(1, 2).flatten(0, 2)


def _own_name(name: str, model: PreTrainedModel, architecture: GgufArchitecture) -> tuple[str, Stored | None]:
    """A tensor's name in the file, and how its values change."""
    found = gguf_name(name, architecture)
    if found is None:
        raise SchemeError(
            f"every tensor must have a place in a GGUF file: {type(model).__name__} has {name!r}, which llama.cpp does "
            f"not know. Use --format quantlab."
        )
    return found


def _num_tokens(model: PreTrainedModel) -> int:
    """Rows of the embedding."""
    return int(model.get_input_embeddings().weight.shape[0])


def _bytes(tensor: Tensor) -> Bytes:
    contiguous: Bytes = tensor.cpu().contiguous().view(torch.uint8).numpy()
    return contiguous
