"""llama.cpp's own quantizer for the tests that compare with it; they are skipped where llama-cpp-python is missing."""

import ctypes
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor


def dequantized(rows: np.ndarray, kind: str) -> Tensor:
    """What gguf-py reads in rows [O, bytes]."""
    return torch.from_numpy(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind]))


def llama_bytes(weight_OI: Tensor, kind: str) -> np.ndarray:
    """Rows [O, bytes] as `ggml_quantize_chunk` writes them, without an importance matrix."""
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        pytest.skip("llama_cpp is not installed: its quantizer is what this compares with")
    (library,) = sorted((Path(spec.origin).parent / "lib").glob("libggml-base.*"))[:1]
    quantize = ctypes.CDLL(str(library)).ggml_quantize_chunk
    int64, pointer = ctypes.c_int64, ctypes.c_void_p
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, pointer, pointer, int64, int64, int64, pointer]
    number = gguf.GGMLQuantizationType[kind]
    block_size, num_bytes = gguf.GGML_QUANT_SIZES[number]
    weights = np.ascontiguousarray(weight_OI.numpy(), dtype=np.float32)
    num_rows, width = weights.shape
    rows = np.zeros((num_rows, width // block_size * num_bytes), dtype=np.uint8)
    written = quantize(int(number), weights.ctypes.data, rows.ctypes.data, 0, num_rows, width, None)
    assert written == rows.size
    return rows
