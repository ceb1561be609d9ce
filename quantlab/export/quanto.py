"""The quanto format: qint8, qint4 and qint2 weights, as optimum-quanto 0.2.7 saves and loads them.

Letters: O output features, I input features, b bits, g inputs of a group, R = O * I / g rows of the grouped matrix. A
linear keeps its bias; its `weight` is replaced as follows, named from the linear. All numbers are little-endian.

`qint8`, symmetric, per channel:

    weight._data         int8 [O, I]: codes.
    weight._scale        [O, 1] in the stored dtype.

`qint4`, `qint2`: quanto itself chooses g from I: the first of 128, 96, 64 and 32 that divides I; I where I is at most
128 or none of them divides it. The matrix in row order is cut into R rows of g.

    weight._data._data   uint8 [D, g], D = ceil(R * b / 8). With k = 8 / b: byte [r, j] holds code [r + i * D, j] of the
                         grouped matrix in bits i * b .. i * b + b - 1, for i = 0 .. k - 1; 0 where r + i * D >= R.
                         Codes count from 0.
    weight._scale        [R, 1] in the stored dtype. Where a scheme's group is a multiple of g its scale is repeated.
    weight._shift        uint8 [R, 1]: the zero point; 2^(b-1) on a symmetric grid. A weight is (code - shift) * scale.

With 4 bits, g = 128 < I and scales in bfloat16 quanto takes another tensor, which wants `_shift` in bfloat16 and in
units of weights, and loses what does not fit there: 8 * scale of a symmetric grid fits, and is stored so; zero points
are refused.

Both kinds have `input_scale` and `output_scale`, [] in the stored dtype: 1, since activations are not quantized.

quanto_qmap.json says for each linear: {"weights": "qint<b>", "activations": "none"}.

config.json gets a `quantization_config`, which quanto's loader does not look at: quant_method "quanto", weights
"qint<b>", `group_size` of the scheme (null: I), `symmetric`, and `shapes`: [O, I] of every linear, which nothing else
in the folder tells. transformers cannot load what quanto saved: without this entry it would take random weights and
only log so; it stops at "qint<b>", which it knows as "int<b>".
"""

from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from quantlab.errors import SchemeError
from quantlab.export.codes import unsigned_codes
from quantlab.export.job import ExportJob
from quantlab.export.linear_shapes import quanto_group
from quantlab.export.linears import kept_linears, separate_linears
from quantlab.export.shards import Layout, Part, TensorType
from quantlab.export.tensors import exactly
from quantlab.methods.solved import Quantized
from quantlab.numerics.affine import QuantizedTensor
from quantlab.schemes import TensorSpec

__all__ = ["layout", "pack_planes"]


def layout(job: ExportJob) -> Layout:
    """How the linears of the job are stored; its scheme is one that the format's check accepts.

    Raises:
        SchemeError: a linear has zero points that quanto would round.
    """
    spec = job.scheme.weights
    assert isinstance(spec, TensorSpec), "the format's check lets no other weights through"
    linears = separate_linears(job)
    kind = f"qint{spec.bits}"
    return Layout(
        linears={name: _part(job, name, linear, spec) for name, linear in linears.items()},
        quantization_config=_quantization_config(job, linears, spec),
        name=kind,
        num_codes=sum(linear.weight.numel() for linear in linears.values()),
        files={
            "quanto_qmap.json": {
                name: {"weights": kind, "activations": "none"} for name in map(job.names.module, linears)
            }
        },
    )


def pack_planes(codes: Tensor, bits: int) -> Tensor:
    """Codes [R, g], uint8 below 2^bits, as bytes [ceil(R * bits / 8), g]: the first rows lowest."""
    per_byte = 8 // bits
    height = ceil(len(codes) / per_byte)
    padded = nn.functional.pad(codes, (0, 0, 0, height * per_byte - len(codes)))
    packed = torch.zeros(height, codes.shape[1], dtype=torch.uint8)
    for place, plane in enumerate(padded.split(height)):
        packed |= plane << bits * place
    return packed


def _part(job: ExportJob, name: str, linear: nn.Linear, spec: TensorSpec) -> Part:
    """The tensors that stand for a linear's weight; they are computed when the part is built."""
    rows, width = linear.weight.shape
    beside = {f"{end}_scale": TensorType(job.dtype, ()) for end in ("input", "output")}
    if spec.bits == 8:
        tensors = {
            "weight._data": TensorType(torch.int8, (rows, width)),
            "weight._scale": TensorType(job.dtype, (rows, 1)),
        }
        return Part(tensors | beside, lambda: _tensors8(job.codes(name), job.dtype), num_linears=1)
    size = quanto_group(width)
    _check_zeros(job, name, width, spec)
    count = rows * width // size
    in_floats = _is_tinygemm(job, spec, size, width)
    tensors = {
        "weight._data._data": TensorType(torch.uint8, (ceil(count * spec.bits / 8), size)),
        "weight._scale": TensorType(job.dtype, (count, 1)),
        "weight._shift": TensorType(job.dtype if in_floats else torch.uint8, (count, 1)),
    }
    return Part(
        tensors | beside,
        lambda: _tensors4(job.codes(name), job.dtype, size, in_floats=in_floats),
        num_linears=1,
    )


def _is_tinygemm(job: ExportJob, spec: TensorSpec, size: int, width: int) -> bool:
    """Whether quanto takes the tensor whose shift is in units of weights: its groups are 128 as it notes them."""
    return spec.bits == 4 and job.dtype == torch.bfloat16 and size == 128 and width > 128


def _check_zeros(job: ExportJob, name: str, width: int, spec: TensorSpec) -> None:
    leaf = name.rpartition(".")[2]
    if not spec.symmetric and _is_tinygemm(job, spec, quanto_group(width), width):
        raise SchemeError(
            f"format quanto rounds 4-bit zero points in groups of 128 to bfloat16: {name} is cut so. Use a symmetric "
            f'grid, a float16 or float32 checkpoint, or add "*.{leaf}" to skip.'
        )


def _tensors8(quantized: Quantized, dtype: torch.dtype) -> dict[str, Tensor]:
    assert isinstance(quantized, QuantizedTensor) and quantized.zero_point is None
    data = quantized.codes.cpu().contiguous()
    return {"weight._data": data, "weight._scale": exactly(quantized.scale, dtype)} | _ones(dtype)


def _tensors4(quantized: Quantized, dtype: torch.dtype, size: int, *, in_floats: bool) -> dict[str, Tensor]:
    assert isinstance(quantized, QuantizedTensor), "the format's check lets no other codes through"
    codes, half = unsigned_codes(quantized), 2 ** (quantized.qtype.bits - 1)
    zero = quantized.zero_point
    zeros = torch.full(quantized.scale.shape, half) if zero is None else zero.cpu()
    times = codes.shape[1] // size // quantized.scale.shape[1]
    scale = exactly(quantized.scale, dtype)
    shift = scale * half if in_floats else zeros.to(torch.uint8)
    return {
        "weight._data._data": pack_planes(codes.reshape(-1, size), quantized.qtype.bits),
        "weight._scale": scale.repeat_interleave(times, dim=1).reshape(-1, 1),
        "weight._shift": shift.repeat_interleave(times, dim=1).reshape(-1, 1),
    } | _ones(dtype)


def _ones(dtype: torch.dtype) -> dict[str, Tensor]:
    return {f"{end}_scale": torch.ones((), dtype=dtype) for end in ("input", "output")}


def _quantization_config(job: ExportJob, linears: dict[str, nn.Linear], spec: TensorSpec) -> dict[str, Any]:
    return {
        "quant_method": "quanto",
        "weights": f"qint{spec.bits}",
        "activations": None,
        "modules_to_not_convert": kept_linears(job),
        "group_size": spec.group_size,
        "symmetric": spec.symmetric,
        "shapes": {job.names.module(name): list(linear.weight.shape) for name, linear in linears.items()},
    }
