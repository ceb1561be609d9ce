"""compressed-tensors, decoded: `pack-quantized`, `int-quantized` and `float-quantized`. No torch.

    pack-quantized    weight_packed int32 [O, ceil(I * b / 32)]: code c(o, i), unsigned, is in bits i * b ..
                      i * b + b - 1 of row o, lowest first; bit n of a row is bit n % 32 of its word n // 32.
                      weight_shape int64 [2]: O, I.
    int-quantized     weight int8 [O, I]: the code minus 128.
    float-quantized   weight F8_E4M3 [O, I]: the code is the byte, a float of 4 exponent and 3 mantissa bits, bias 7.

    weight_scale      float [O, G]; a group is I / G neighbours.

Sources: compressed-tensors 0.20, `compressors/pack_quantized` and `naive_quantized`; OCP FP8 v1.0, arXiv:2209.05433.
O outputs, I inputs, G scales in a row, b bits, W words in a row.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantlab.errors import CheckpointError
from quantlab.reading.decoded import Decoded
from quantlab.reading.raw import RawFolder

__all__ = ["decode", "linears"]


def linears(raw: RawFolder) -> list[str]:
    """Names of the linears in low bits: those that have a scale."""
    return raw.modules("weight_scale")


def decode(raw: RawFolder, name: str) -> Decoded:
    """Codes and scales of one linear.

    Raises:
        CheckpointError: a width, layout, shape or dtype that is not the format's.
    """
    kind, bits = _grid(raw)
    if kind == "pack-quantized":
        codes = _unpacked(raw, name, bits)
    elif kind == "int-quantized" and bits == 8:
        # uint8 wraps around: -128 + 128 is 0.
        codes = raw.array(f"{name}.weight", "I8").view(np.uint8) + np.uint8(128)
    elif kind == "float-quantized" and bits == 8:
        codes = raw.array(f"{name}.weight", "F8_E4M3")
    else:
        raise CheckpointError(
            f"compressed-tensors is read as pack-quantized, int-quantized or float-quantized: {raw.path} is {kind!r} "
            f"of {bits} bits."
        )
    beside = (f"{name}.{leaf}" for leaf in ("weight_zero_point", "weight_g_idx", "weight_global_scale"))
    if codes.ndim != 2 or any(leaf in raw.tensors for leaf in beside):
        raise CheckpointError(
            f"linear must be a symmetric matrix with neighbours in its groups: {name!r} of {raw.path} is not."
        )
    table = _e4m3() if kind == "float-quantized" else None
    return Decoded(np.asarray(codes), bits, _scale(raw, name, codes.shape), table=table)


def _grid(raw: RawFolder) -> tuple[str, int]:
    """(layout, bits) of the only group of config.json."""
    quantization = raw.quantization
    groups = quantization.get("config_groups")
    group = next(iter(groups.values())) if isinstance(groups, dict) and len(groups) == 1 else None
    weights: Mapping[str, Any] | None = group.get("weights") if isinstance(group, dict) else None
    bits = weights.get("num_bits") if isinstance(weights, dict) else None
    if type(bits) is not int or not 1 <= bits <= 8 or not isinstance(group, dict):
        raise CheckpointError(
            f"quantization_config must have one group of weights of 1 to 8 bits: that of {raw.path} has not."
        )
    return str(group.get("format") or quantization.get("format")), bits


def _unpacked(raw: RawFolder, name: str, bits: int) -> NDArray[np.uint8]:
    """Unsigned codes [O, I] of rows of words; the unused bits of a row must be 0."""
    rows, width = (int(size) for size in raw.array(f"{name}.weight_shape", "I64", (2,)))
    # The size of the file bounds the words, and the words bound what is made of them.
    words = raw.array(f"{name}.weight_packed", "I32")
    if rows < 1 or width < 1 or words.shape != (rows, -(-width * bits // 32)):
        raise CheckpointError(
            f"packed words must fit the shape of their matrix: {name!r} of {raw.path} has {list(words.shape)} words "
            f"for [{rows}, {width}] codes of {bits} bits."
        )
    stream_OB = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    if stream_OB[:, width * bits :].any():
        raise CheckpointError(
            f"unused bits of packed words must be 0: those of {name!r} of {raw.path} are not."
        )
    bits_OIb = stream_OB[:, : width * bits].reshape(rows, width, bits)
    return np.packbits(bits_OIb, axis=2, bitorder="little")[:, :, 0]


def _scale(raw: RawFolder, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    scale_OG = raw.floats(f"{name}.weight_scale")
    rows, width = shape
    if scale_OG.ndim != 2 or len(scale_OG) != rows or not scale_OG.size or width % scale_OG.shape[1]:
        raise CheckpointError(
            f"scales must be one a row or one a group: {name!r} of {raw.path} has {list(scale_OG.shape)} for "
            f"{list(shape)} codes."
        )
    return scale_OG


def _e4m3() -> NDArray[np.float32]:
    """[256]: what each byte means; 0x7f and 0xff are NaN, and there is no infinity."""
    exponent, mantissa = np.divmod(np.arange(128), 8)
    fraction = (exponent > 0) + mantissa / 8
    values = (fraction * 2.0 ** (np.maximum(exponent, 1) - 7)).astype(np.float32)
    values[127] = np.nan
    return np.concatenate([values, -values])
