"""How the weights of a checkpoint are stored, and so what its "16 bits" are. No torch.

A checkpoint that was quantized once keeps that rounding when it is loaded in floats: its baseline is labelled
"dequantized Q4_1", and `source_scheme` is the scheme of the same bits and groups. That scheme is evidence of nothing:
what it changes comes of rounding a second time onto much the same grid, which says nothing about a checkpoint that was
never quantized.
"""

from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from quantlab.errors import CheckpointError
from quantlab.inspection.compressed import check_scales, source_of_quantized
from quantlab.inspection.gguf_header import GgufTensor
from quantlab.inspection.safetensors_header import StoredTensor

GGUF_SCHEMES = {"Q4_0": "w4g32", "Q4_1": "w4g32z", "Q5_0": "w5g32", "Q5_1": "w5g32z", "Q8_0": "w8g32"}
"""ggml type -> the scheme of the same bits and groups.

The grids are not the same. Only Q8_0's is its scheme's, but for the rounding of its scale to float16; Q4_0 and Q5_0
put the largest magnitude at -8 and -16, and Q4_1 and Q5_1 hold a real minimum where a scheme has an integer zero-point.
"""

_DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

Source = tuple[str, str | None]
"""(source_precision, source_scheme)."""


def source_of_gguf(tensors: Mapping[str, GgufTensor]) -> Source:
    """The type of most weights of the decoder layers, by number of elements."""
    kind = _most_common(
        {name: (t.type.name, t.shape) for name, t in tensors.items() if name.startswith("blk.")}
    )
    if kind in _DTYPE_NAMES:
        return _DTYPE_NAMES[kind], None
    return f"dequantized {kind}", GGUF_SCHEMES.get(kind)


def source_of_folder(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor], path: Path) -> Source:
    """The dtype of most weights, or what a quantized checkpoint's config says of itself.

    Raises:
        CheckpointError: quantized by a method whose checkpoints quantlab does not load.
    """
    quantization = config.get("quantization_config")
    if quantization:
        source = source_of_quantized(quantization, path)
        if quantization["quant_method"] == "compressed-tensors":
            check_scales(quantization, tensors, path)
        return source
    kind = _most_common({name: (t.dtype, t.shape) for name, t in tensors.items()})
    if kind not in _DTYPE_NAMES:
        raise CheckpointError(
            f"weights must be floats of 16 bits or more, or say how they were quantized: most of {path} is {kind} "
            f"and its config.json has no quantization_config."
        )
    for name, tensor in tensors.items():
        # Buffers, such as masks and position ids, may be integers.
        if name.endswith(".weight") and tensor.dtype not in _DTYPE_NAMES:
            raise CheckpointError(
                f"weights must be floats of 16 bits or more, or say how they were quantized: {path} holds {name!r} as "
                f"{tensor.dtype} and its config.json has no quantization_config."
            )
    return _DTYPE_NAMES[kind], None


def stored_precision(loaded: str, source_precision: str) -> str:
    """Dtype in which a quantized copy stores scales and kept tensors.

    The source's own where the model was loaded in float32 from 16 bits, else the loaded one.
    """
    halves = ("bfloat16", "float16")
    return source_precision if loaded == "float32" and source_precision in halves else loaded


def _most_common(stored: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    """The type that holds most elements."""
    elements: Counter[str] = Counter()
    for kind, shape in stored.values():
        elements[kind] += prod(shape)
    return elements.most_common(1)[0][0] if elements else "nothing"
