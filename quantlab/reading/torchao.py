"""torchao, decoded: Int8Tensor and IntxUnpackedToInt8Tensor of weights alone. No torch.

    _weight_qdata       int8 [O, I]: the code minus 2^(b-1)
    _weight_scale       float [O, G]; a group is I / G neighbours
    _weight_zero_point  int8 [O, G]: the zero point minus 2^(b-1); 0 where the grid is symmetric

config.json's `quant_type.default` says b and the kind of grid: Int8WeightOnlyConfig is 8 bits, symmetric;
IntxWeightOnlyConfig has a `weight_dtype` (int2 .. int8) and a `mapping_type`.
Source: torchao 0.18, `prototype/safetensors` and `quantization/quantize_/workflows`. O outputs, I inputs, b bits.
"""

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantlab.errors import CheckpointError
from quantlab.reading.decoded import Decoded
from quantlab.reading.raw import RawFolder

__all__ = ["decode", "linears"]


def linears(raw: RawFolder) -> list[str]:
    """Names of the linears in low bits."""
    return raw.modules("_weight_qdata")


def decode(raw: RawFolder, name: str) -> Decoded:
    """Codes and scales of one linear.

    Raises:
        CheckpointError: a kind of weights, shape or dtype that is not the format's.
    """
    bits, symmetric = _grid(raw)
    half = 2 ** (bits - 1)
    qdata, scale = raw.array(f"{name}._weight_qdata", "I8"), raw.floats(f"{name}._weight_scale")
    zeros = raw.array(f"{name}._weight_zero_point", "I8", scale.shape)
    if qdata.ndim != 2 or scale.ndim != 2 or len(scale) != len(qdata) or not scale.size:
        raise CheckpointError(
            f"codes and scales must be matrices of equal height: {name!r} of {raw.path} has others."
        )
    if qdata.shape[1] % scale.shape[1] or (symmetric and zeros.any()):
        raise CheckpointError(
            f"scales must split a row evenly, zero points of a symmetric grid be 0: those of {name!r} of {raw.path} do "
            "not."
        )
    codes = _counted(raw, name, qdata, half)
    if symmetric:
        return Decoded(codes, bits, scale)
    return Decoded(codes, bits, scale, zero_OG=_counted(raw, name, zeros, half).astype(np.float32))


def _counted(raw: RawFolder, name: str, values: NDArray[np.int8], half: int) -> NDArray[np.uint8]:
    """Signed values of a grid as they count from 0."""
    if values.size and (values.min() < -half or values.max() >= half):
        raise CheckpointError(
            f"codes must lie within {-half} .. {half - 1}: those of {name!r} of {raw.path} do not."
        )
    return (values.astype(np.int16) + half).astype(np.uint8)


def _grid(raw: RawFolder) -> tuple[int, bool]:
    """(bits, whether the grid is symmetric) of all weights."""
    found = _nested(raw.quantization, "quant_type", "default")
    data = _nested(found, "_data")
    if _nested(found).get("_type") == "Int8WeightOnlyConfig":
        return 8, True
    width = re.fullmatch("int([2-8])", str(_nested(data, "weight_dtype").get("_data")))
    mapping = _nested(data, "mapping_type").get("_data")
    if (
        _nested(found).get("_type") == "IntxWeightOnlyConfig"
        and width
        and mapping in ("SYMMETRIC", "ASYMMETRIC")
    ):
        return int(width[1]), mapping == "SYMMETRIC"
    raise CheckpointError(
        f"torchao is read with weights alone, as Int8WeightOnlyConfig or IntxWeightOnlyConfig: the quant_type of "
        f"{raw.path} is {str(_nested(found).get('_type'))!r:.100}."
    )


def _nested(body: Any, *keys: str) -> dict[str, Any]:
    """An object inside objects; empty where there is none."""
    for key in keys:
        body = body.get(key) if isinstance(body, dict) else None
    return body if isinstance(body, dict) else {}
