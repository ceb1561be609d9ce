"""The bitsandbytes format: nf4, fp4, both with double quantization, and int8 (LLM.int8()), as transformers loads them.

Letters: O output features, I input features, G = O * I / 64 blocks of the matrix in row order. A linear keeps its bias.
All integers and floats are little-endian. The names below follow the linear's, as in `...q_proj.weight.absmax`.

`nf4`, `fp4`:

    weight              uint8 [O * I / 2, 1]. Codes c_0, c_1, ... of the matrix in row order, two a byte: byte n is
                        16 * c_2n + c_2n+1.
    weight.absmax       float32 [G]: block k, of codes 64 k .. 64 k + 63, has the scale absmax[k].
    weight.quant_map    float32 [16]: what a code stands for; code * scale is quant_map[c] * absmax.
    weight.quant_state.bitsandbytes__nf4 (__fp4)
                        uint8: JSON in UTF-8: quant_type "nf4" or "fp4", blocksize 64, dtype of the weights that it
                        dequantizes to, shape [O, I].

`nf4_dq`, `fp4_dq` store the scales in 8 bits (H = ceil(G / 256)); the other tensors are the same:

    weight.absmax            uint8 [G]: codes d_k of the scales.
    weight.nested_quant_map  float32 [256]
    weight.nested_absmax     float32 [H]. Scale k is nested_quant_map[d_k] * nested_absmax[k // 256] + nested_offset,
                             each step rounded to float32.
    weight.quant_state...    JSON has nested_blocksize 256, nested_dtype "float32" and nested_offset too. Blanks fill it
                             up to one length for all offsets, which JSON allows.

`int8` (scheme llm_int8):

    weight           int8 [O, I]: codes; a weight is code * SCB / 127.
    SCB              float32 [O]: the largest magnitude of each output.
    weight_format    uint8 []: 0, rows as they are.

Written from the codes themselves, which avoids a fault of bitsandbytes 0.50.2: a 4-bit model that was saved after a
forward pass on a CPU with AVX512-BF16 stores its scales transposed and in bfloat16, and loads as another model.

config.json gets the `quantization_config` of transformers' BitsAndBytesConfig; `llm_int8_skip_modules` holds the full
name of every linear that is stored as it was. Tested with transformers 5.23 and bitsandbytes 0.50.2.
"""

import json
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from quantlab.export.job import ExportJob
from quantlab.export.linears import kept_linears, separate_linears
from quantlab.export.shards import Layout, Part, TensorType
from quantlab.export.tensors import dtype_name
from quantlab.methods.codebooks import BLOCK_SIZE, NESTED_SIZE
from quantlab.methods.solved import Quantized
from quantlab.numerics.codebook import CodebookTensor, NestedScales

__all__ = ["layout", "pack_nibbles"]

_OFFSET_CHARACTERS = 24
"""A double in decimal takes no more: -1.7976931348623157e+308."""


def layout(job: ExportJob) -> Layout:
    """How the linears of the job are stored; its scheme and linears are such as the format's checks accept."""
    assert job.scheme.format is not None, "the format's check lets no other weights through"
    linears = separate_linears(job)
    part = _part8 if job.scheme.format == "llm_int8" else _part4
    return Layout(
        linears={name: part(job, name, linear) for name, linear in linears.items()},
        quantization_config=_quantization_config(job, job.scheme.format),
        name="int8" if job.scheme.format == "llm_int8" else job.scheme.format,
        num_codes=sum(linear.weight.numel() for linear in linears.values()),
    )


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes below 16 in row order, uint8 of even number, as bytes [N / 2, 1]: the first of a pair is the high half."""
    pairs = codes.flatten().view(-1, 2)
    return (pairs[:, 0] << 4 | pairs[:, 1]).unsqueeze(1)


def _part4(job: ExportJob, name: str, linear: nn.Linear) -> Part:
    """A linear of nf4 or fp4; its tensors are computed when the part is built."""
    assert job.scheme.format is not None
    kind, _, nested = job.scheme.format.partition("_")
    rows, width = linear.weight.shape
    scales = rows * width // BLOCK_SIZE
    tensors = {
        "weight": TensorType(torch.uint8, (rows * width // 2, 1)),
        "weight.absmax": TensorType(torch.uint8 if nested else torch.float32, (scales,)),
        "weight.quant_map": TensorType(torch.float32, (16,)),
    }
    if nested:
        tensors["weight.nested_absmax"] = TensorType(torch.float32, (ceil(scales / NESTED_SIZE),))
        tensors["weight.nested_quant_map"] = TensorType(torch.float32, (256,))
    state = {
        "quant_type": kind,
        "blocksize": BLOCK_SIZE,
        "dtype": dtype_name(job.dtype),
        "shape": [rows, width],
    }
    longest = len(_state_bytes(state | _nested_state(None) if nested else state, 0))
    key = f"weight.quant_state.bitsandbytes__{kind}"
    tensors[key] = TensorType(torch.uint8, (longest,))
    return Part(tensors, lambda: _tensors4(job.codes(name), state, key, longest), num_linears=1)


def _tensors4(quantized: Quantized, state: dict[str, Any], key: str, length: int) -> dict[str, Tensor]:
    assert isinstance(quantized, CodebookTensor), "the format's check lets no other codes through"
    tensors = {"weight": pack_nibbles(quantized.codes), "weight.quant_map": quantized.values}
    nested = quantized.nested
    if nested is None:
        tensors["weight.absmax"] = quantized.scale.flatten()
    else:
        tensors["weight.absmax"] = nested.codes
        tensors["weight.nested_absmax"] = nested.absmax
        tensors["weight.nested_quant_map"] = nested.values
        state = state | _nested_state(nested)
    tensors[key] = torch.frombuffer(_state_bytes(state, length), dtype=torch.uint8)
    # A copy, since the tables are one tensor for all linears and tensors of a file may not share memory.
    return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _nested_state(nested: NestedScales | None) -> dict[str, Any]:
    """What the JSON says of double quantization; of None, at its longest."""
    offset = "0" * (_OFFSET_CHARACTERS - 2) if nested is None else nested.offset.item()
    return {"nested_blocksize": NESTED_SIZE, "nested_dtype": "float32", "nested_offset": offset}


def _state_bytes(state: dict[str, Any], length: int) -> bytearray:
    """JSON with blanks behind it up to the length."""
    return bytearray(json.dumps(state).encode().ljust(length))


def _part8(job: ExportJob, name: str, linear: nn.Linear) -> Part:
    """A linear of int8; its tensors are computed when the part is built."""
    rows, width = linear.weight.shape
    tensors = {
        "weight": TensorType(torch.int8, (rows, width)),
        "SCB": TensorType(torch.float32, (rows,)),
        "weight_format": TensorType(torch.uint8, ()),
    }
    return Part(tensors, lambda: _tensors8(job.codes(name)), num_linears=1)


def _tensors8(quantized: Quantized) -> dict[str, Tensor]:
    assert isinstance(quantized, CodebookTensor), "the format's check lets no other codes through"
    return {
        "weight": quantized.codes.cpu().view(torch.int8).contiguous(),
        "SCB": quantized.scale.flatten().cpu(),
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def _quantization_config(job: ExportJob, form: str) -> dict[str, Any]:
    in_8_bits = form == "llm_int8"
    kind, _, nested = form.partition("_")
    return {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": not in_8_bits,
        "_load_in_8bit": in_8_bits,
        "load_in_4bit": not in_8_bits,
        "load_in_8bit": in_8_bits,
        "bnb_4bit_compute_dtype": "float32" if in_8_bits else dtype_name(job.dtype),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "fp4" if in_8_bits else kind,
        "bnb_4bit_use_double_quant": bool(nested) and not in_8_bits,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": kept_linears(job),
        "llm_int8_threshold": 6.0,
    }
