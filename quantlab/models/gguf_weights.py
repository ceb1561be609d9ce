"""A GGUF file's weights as float tensors, under transformers' names and in transformers' layout.

The header was read and bounded by `gguf_header`; the blocks are unpacked by the gguf package, tensor by tensor, so
that only one of them exists in float32 at a time. transformers reads the same files to the same tensors; it parses the
tokenizer's strings twice on the way, which takes longer than all the weights.
"""

from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from quantlab.inspection.gguf_header import GgufHeader, GgufTensor
from quantlab.inspection.gguf_names import Stored, architecture_of, config_of, hf_name

__all__ = ["dequantized", "read_weights"]


def read_weights(path: Path, header: GgufHeader, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor of the file, dequantized to float32 and then rounded to `dtype`, by its name in transformers."""
    architecture, config = architecture_of(header, path), config_of(header, path)
    heads = {
        "attn_q": config.get("num_attention_heads"),
        "attn_k": config.get("num_key_value_heads", config.get("num_attention_heads")),
    }
    data = np.memmap(path, mode="r", dtype=np.uint8)
    weights = {}
    for stored_name, tensor in header.tensors.items():
        name, stored = hf_name(stored_name, architecture, path)
        values = dequantized(data, tensor)
        module = stored_name.split(".")[-2]
        weights[name] = torch.from_numpy(_restored(values, stored, heads.get(module))).to(dtype)
    return weights


def dequantized(data: np.ndarray, tensor: GgufTensor) -> np.ndarray:
    """The tensor in float32, in its own shape."""
    kind = tensor.type
    # A plain array: slices of a memory map carry its bookkeeping and are slow.
    blocks = np.asarray(data[tensor.begin : tensor.end])
    rows = blocks.reshape(*tensor.shape[:-1], tensor.shape[-1] // kind.block_size * kind.block_bytes)
    values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind.name])
    return np.ascontiguousarray(values.reshape(tensor.shape), dtype=np.float32)


def _restored(values: np.ndarray, stored: Stored | None, num_heads: int | None) -> np.ndarray:
    """Undo what llama.cpp's converter did to the layout."""
    if stored == "transposed":
        return np.ascontiguousarray(values.T)
    if stored == "permuted":
        assert num_heads is not None
        # Rows of a head go (pair, half) in the file: neighbours rotate together. transformers wants (half, pair).
        heads = values.reshape(num_heads, values.shape[0] // num_heads // 2, 2, *values.shape[1:])
        return np.ascontiguousarray(heads.swapaxes(1, 2).reshape(values.shape))
    # A copy: F32 tensors would otherwise be views of a read-only file.
    return values.copy()
