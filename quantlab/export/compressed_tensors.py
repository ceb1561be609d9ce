"""The compressed-tensors format: what transformers and vLLM load without quantlab.

Letters: O output features, I input features, b bits, G scales in a row (1 per channel, I / group_size per group).
A linear keeps its bias; its `weight` is replaced as follows. All integers are little-endian.

`pack-quantized`, weights of b = 2..8 bits, activations untouched:

    weight_packed   int32 [O, ceil(I * b / 32)]. Row o is one stream of bits. Code c(o, i), signed, is stored as the
                    unsigned number c + 2^(b-1) in bits i * b .. i * b + b - 1 of the row, lowest bit first; bit n of
                    the row is bit n % 32 of its word n // 32. Nothing lies between codes: with 3, 5, 6 or 7 bits a
                    code may begin in one word and end in the next. Unused bits of the last word are 0.
    weight_scale    [O, G] in the stored dtype.
    weight_shape    int64 [2]: O, I.

`int-quantized`, 8-bit weights per channel with 8-bit activations per token:

    weight          int8 [O, I], the codes.
    weight_scale    [O, 1] in the stored dtype.

`float-quantized`, 8-bit floats per channel (fp8), activations untouched:

    weight          float8_e4m3fn [O, I]: the code is the float's own byte.
    weight_scale    [O, 1] in the stored dtype.

With any of these, a cache of 8 bits whose scales come from calibration (kv8ts), one pair for each attention layer:

    self_attn.k_scale, self_attn.v_scale    [1] float32: absmax / 127 of keys, after rotary embedding,
                                            and of values.

A reader's weight is code * scale, computed in the dtype of the scale: the dtype that the model is loaded in. Scales
are rounded to the stored dtype before the codes are chosen. compressed-tensors also defines packed zero points;
transformers 5.23 with compressed-tensors 0.20 refuses to load them (it expects them unpacked), so they are not
written. 4-bit, 2-bit and 8-bit codes are packed alike by every version of the format; for the other widths this is
the layout of 0.20, the oldest reader it was tested with.

config.json gets a `quantization_config`: one group that targets "Linear", and in `ignore` the full name of every
linear that is stored as it was, in memory and, where transformers renames while it loads, in the files too.
"""

import sys
from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from quantlab.export.codes import unsigned_codes
from quantlab.export.job import ExportJob
from quantlab.export.linears import kept_linears, separate_linears
from quantlab.export.shards import Layout, Part, TensorType
from quantlab.export.tensors import exactly
from quantlab.methods.solved import Quantized
from quantlab.numerics.affine import QuantizedTensor
from quantlab.numerics.packing import pack
from quantlab.numerics.qtype import QType
from quantlab.numerics.static import static_range
from quantlab.schemes import Scheme, TensorSpec

__all__ = ["layout", "pack_rows"]

VERSION = "0.20.0"
"""The release of compressed-tensors whose reader this layout was written for and tested with."""


def layout(job: ExportJob) -> Layout:
    """How the linears of the job are stored; its scheme and linears are such as the format's checks accept."""
    linears = separate_linears(job)
    return Layout(
        linears={name: _part(job, name, linear) for name, linear in linears.items()},
        quantization_config=_quantization_config(job.scheme, kept_linears(job)),
        name=_layout_name(job.scheme),
        num_codes=sum(linear.weight.numel() for linear in linears.values()),
        extra=_cache_scales(job),
    )


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes [O, I], uint8 below 2^bits, as rows of bits: int32 [O, ceil(I * bits / 32)].

    32 codes are exactly `bits` words: padded to that, all rows are one stream, and every row begins with a word.
    """
    assert sys.byteorder == "little", "bytes are viewed as little-endian words"
    rows, width = codes.shape
    stream = pack(nn.functional.pad(codes, (0, -width % 32)), bits)
    words = stream.view(torch.int32).view(rows, ceil(width / 32) * bits)
    return words[:, : ceil(width * bits / 32)].contiguous()


def _part(job: ExportJob, name: str, linear: nn.Linear) -> Part:
    """The tensors that stand for a linear's weight; they are computed when the part is built."""
    rows, width = linear.weight.shape
    spec, kind = job.scheme.weights, _layout_name(job.scheme)
    assert spec is not None, "the format's check lets no other weights through"
    tensors = {"weight_scale": TensorType(job.dtype, (rows, width // (spec.group_size or width)))}
    if kind == "pack-quantized":
        tensors["weight_packed"] = TensorType(torch.int32, (rows, ceil(width * spec.bits / 32)))
        tensors["weight_shape"] = TensorType(torch.int64, (2,))
    else:
        dtype = torch.int8 if kind == "int-quantized" else torch.float8_e4m3fn
        tensors["weight"] = TensorType(dtype, (rows, width))
    return Part(tensors, lambda: _tensors(job.codes(name), job.dtype, kind), num_linears=1)


def _tensors(quantized: Quantized, dtype: torch.dtype, kind: str) -> dict[str, Tensor]:
    codes, scale = quantized.codes.cpu().contiguous(), exactly(quantized.scale, dtype)
    if kind == "float-quantized":
        return {"weight": codes.view(torch.float8_e4m3fn), "weight_scale": scale}
    assert isinstance(quantized, QuantizedTensor) and quantized.zero_point is None
    if kind == "int-quantized":
        return {"weight": codes, "weight_scale": scale}
    packed = pack_rows(unsigned_codes(quantized), quantized.qtype.bits)
    shape = torch.tensor(codes.shape, dtype=torch.int64)
    return {"weight_packed": packed, "weight_scale": scale, "weight_shape": shape}


def _cache_scales(job: ExportJob) -> list[Part]:
    """Scales of keys and values of every attention layer, where the scheme quantizes the cache."""
    spec = job.scheme.cache
    if spec is None:
        return []
    steps = QType.of_activations(spec).qmax
    scales = {
        f"{job.names.module(name)}.{kind}_scale": (
            static_range(spec, ranges.minimum_HC, ranges.maximum_HC)[1] / steps
        ).reshape(1)
        for name, stats in job.ready.attention.items()
        for kind, ranges in (("k", stats.key), ("v", stats.value))
    }
    return [_scalar(name, scale.cpu()) for name, scale in scales.items()]


def _scalar(name: str, value: Tensor) -> Part:
    return Part({name: TensorType(value.dtype, tuple(value.shape))}, lambda: {name: value})


def _layout_name(scheme: Scheme) -> str:
    if scheme.format == "fp8":
        return "float-quantized"
    return "pack-quantized" if scheme.activations is None else "int-quantized"


def _quantization_config(scheme: Scheme, ignored: Sequence[str]) -> dict[str, Any]:
    name, weights, inputs = _layout_name(scheme), scheme.weights, scheme.activations
    on_grid = TensorSpec(8, "channel") if not isinstance(weights, TensorSpec) else weights
    kind = "float" if name == "float-quantized" else "int"
    group = {
        "targets": ["Linear"],
        "format": name,
        "weights": _arguments(on_grid, dynamic=False) | {"type": kind},
        "input_activations": None if inputs is None else _arguments(inputs, dynamic=True),
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "format": name,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignored),
        "kv_cache_scheme": None if scheme.cache is None else _arguments(scheme.cache, dynamic=False),
        "global_compression_ratio": None,
    }


_STRATEGIES: Mapping[str, str] = {"channel": "channel", "group": "group", "row": "token", "tensor": "tensor"}


def _arguments(spec: TensorSpec, *, dynamic: bool) -> dict[str, Any]:
    """One tensor's grid in the format's words."""
    return {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": _STRATEGIES[spec.granularity],
        "group_size": spec.group_size,
        "dynamic": dynamic,
    }
