"""The gptq format: what gptqmodel, transformers with optimum, vLLM and, where zero points are v1, auto-gptq 0.7.1 load.

Letters: O output features, I input features, b bits, G scales of an output (1 per channel, I / group_size per group).
A linear keeps its bias; its `weight` is replaced as follows. All integers are little-endian. O and I are multiples of
32: every reader packs 32 codes into b words.

    qweight    int32 [I * b / 32, O]. Column o holds the codes of output o, packed along the inputs. Codes are unsigned:
               0 .. 2^b - 1; those of a symmetric grid are stored plus 2^(b-1).
    qzeros     int32 [G, O * b / 32]. Row g holds the zero points of group g, packed along the outputs.
    scales     float16 [G, O], whatever the dtype of the rest. Scales are rounded to it before codes are chosen.
    g_idx      int32 [I]: i // group_size, 0 per channel. GPTQ's act-order is with static groups here, so groups are
               whole and the order of columns is not stored (`desc_act` false). It is written all the same:
               transformers loads on an empty model, and a `g_idx` that is missing stays uninitialized memory.

Packing of b = 2, 3, 4, 8 bits: 32 codes are one stream of 32 b bits, code n in bits n * b .. n * b + b - 1, lowest bit
first; bit k of the stream is bit k % 32 of its word k // 32. With 3 bits codes 10 and 21 lie across two words.
Packing of b = 5, 6, 7 bits (`gptq_p`, gptqmodel's planar layout): a code is cut into planes, low bits first: 4 + 1,
4 + 2 and 4 + 2 + 1 bits. The words of 32 codes are those of their first plane, packed as above at the plane's width,
then those of the next.

A value is (code - zero point) * scale. What is stored for the zero point is named by `checkpoint_format`:

    gptq       v1: zero point - 1. A zero point of 0 has no such number (it would wrap to 2^b - 1): refused.
    gptq_v2    the zero point itself.
    gptq_p     the zero point itself.

Written is `gptq` where the grid is symmetric, whose zero points are all 2^(b-1), and `gptq_v2` where it is not, since
a group of positive weights has a zero point of 0; gptqmodel refuses v1 without symmetry in any case. 5, 6 and 7 bits
are `gptq_p`. `layout` takes another name when asked.

config.json says it twice, in `checkpoint_format` and in `format`, which transformers reads where the former is missing.
Linears that keep their precision are named for gptqmodel and vLLM in `dynamic`, and the others for transformers in
`modules_in_block_to_quantize`. auto-gptq 0.7.1 knows none of these keys: it would read v2 zero points one too high and
random weights for a linear that is not there, without a word. So `quantize_config.json`, without which it stops, is
written where it reads the folder rightly, and only there; it holds the same as config.json.
Sources: gptqmodel 7.7.0, optimum 2.3.0 and auto-gptq 0.7.1, which read these folders in the tests.
"""

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import quantlab
from quantlab.errors import SchemeError
from quantlab.export.codes import unsigned_codes
from quantlab.export.compressed_tensors import pack_rows
from quantlab.export.job import ExportJob
from quantlab.export.linears import both_names, separate_linears
from quantlab.export.shards import Layout, Part, TensorType
from quantlab.export.tensors import exactly
from quantlab.methods.solved import Quantized
from quantlab.numerics.affine import QuantizedTensor
from quantlab.schemes import TensorSpec

__all__ = ["layout", "pack_words", "stored_zeros", "unsigned"]

PLANES = {2: (2,), 3: (3,), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
"""Bits of a code -> widths of its planes, low bits first."""


def layout(job: ExportJob, checkpoint_format: str | None = None) -> Layout:
    """How the linears of the job are stored; its scheme is one that the format's check accepts.

    Args:
        checkpoint_format: gptq (v1), gptq_v2 or gptq_p; None chooses as the module's docstring says.

    Raises:
        SchemeError: when a part is built, a zero point of 0 where v1 was asked for.
    """
    spec = job.scheme.weights
    assert isinstance(spec, TensorSpec), "the format's check lets no other weights through"
    stored = checkpoint_format or _checkpoint_format(spec)
    linears = separate_linears(job)
    config = _quantization_config(job, spec, stored)
    return Layout(
        linears={name: _part(job, name, linear, spec, stored) for name, linear in linears.items()},
        quantization_config=config,
        name=stored,
        num_codes=sum(linear.weight.numel() for linear in linears.values()),
        files={"quantize_config.json": config} if stored == "gptq" and not job.ready.skipped else {},
    )


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes [N, 32 k], uint8 below 2^bits, as words [N, k * bits], int32: each 32 plane by plane."""
    shift, planes = 0, []
    for width in PLANES[bits]:
        plane = (codes >> shift) & (2**width - 1)
        planes.append(_plane(plane, width).unflatten(1, (-1, width)))
        shift += width
    return torch.cat(planes, -1).flatten(1)


def unsigned(quantized: Quantized) -> tuple[Tensor, Tensor]:
    """Codes [O, I] and zero points [O, G] as they count from 0, both uint8."""
    assert isinstance(quantized, QuantizedTensor), "the format's check lets no other codes through"
    half = 2 ** (quantized.qtype.bits - 1)
    zeros = quantized.zero_point
    if zeros is None:
        zeros = torch.full(quantized.scale.shape, half)
    return unsigned_codes(quantized), zeros.to("cpu", torch.uint8)


def stored_zeros(zeros: Tensor, checkpoint_format: str, name: str) -> Tensor:
    """Zero points as the layout stores them, same shape, uint8.

    Raises:
        SchemeError: a zero point of 0 in v1.
    """
    if checkpoint_format != "gptq":
        return zeros
    if bool((zeros == 0).any()):
        raise SchemeError(
            f"zero points must be at least 1 in checkpoint_format gptq (v1), which stores them less one: {name} has "
            f"{int((zeros == 0).sum())} of 0. Use gptq_v2, which stores them as they are."
        )
    return zeros - 1


def _checkpoint_format(spec: TensorSpec) -> str:
    if len(PLANES[spec.bits]) > 1:
        return "gptq_p"
    return "gptq" if spec.symmetric else "gptq_v2"


def _plane(codes: Tensor, width: int) -> Tensor:
    """Codes [N, 32 k] below 2^width as one stream of bits: int32 [N, k * width]."""
    if width > 1:
        return pack_rows(codes, width)
    bits = np.packbits(codes.contiguous().numpy(), axis=1, bitorder="little")
    return torch.from_numpy(bits).view(torch.int32)


def _part(job: ExportJob, name: str, linear: nn.Linear, spec: TensorSpec, stored: str) -> Part:
    """The tensors that stand for a linear's weight; they are computed when the part is built."""
    rows, width = linear.weight.shape
    groups = width // (spec.group_size or width)
    tensors = {
        "qweight": TensorType(torch.int32, (width * spec.bits // 32, rows)),
        "qzeros": TensorType(torch.int32, (groups, rows * spec.bits // 32)),
        "scales": TensorType(torch.float16, (groups, rows)),
        "g_idx": TensorType(torch.int32, (width,)),
    }
    return Part(tensors, lambda: _tensors(job.codes(name), name, stored), num_linears=1)


def _tensors(quantized: Quantized, name: str, stored: str) -> dict[str, Tensor]:
    codes_OI, zeros_OG = unsigned(quantized)
    bits, (width, groups) = quantized.qtype.bits, (codes_OI.shape[1], zeros_OG.shape[1])  # type: ignore[union-attr]
    zeros_GO = stored_zeros(zeros_OG, stored, name).t().contiguous()
    return {
        "qweight": pack_words(codes_OI, bits).t().contiguous(),
        "qzeros": pack_words(zeros_GO, bits),
        "scales": exactly(quantized.scale, torch.float16).t().contiguous(),
        "g_idx": torch.arange(width, dtype=torch.int32) // (width // groups),
    }


def _quantization_config(job: ExportJob, spec: TensorSpec, stored: str) -> dict[str, Any]:
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": spec.bits,
        "group_size": spec.group_size or -1,
        "sym": spec.symmetric,
        "desc_act": False,
        "checkpoint_format": stored,
        "format": stored,
        "pack_dtype": "int32",
        "lm_head": False,
        "meta": {"quantizer": [f"quantlab:{quantlab.__version__}"]},
    }
    if job.ready.skipped:
        config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in both_names(job, job.ready.skipped)}
        config["modules_in_block_to_quantize"] = [both_names(job, job.linears)]
    return config
