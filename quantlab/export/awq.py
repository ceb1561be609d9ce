"""The awq format, GEMM layout: what gptqmodel, transformers through gptqmodel, and vLLM load.

Letters: O output features, I input features, G = I / group_size scales of an output. A linear keeps its bias; its
`weight` is replaced as follows. All integers are little-endian. O is a multiple of 8.

    qweight    int32 [I, O / 8]. Word w of row i holds the codes of input i for outputs 8 w .. 8 w + 7, four bits each:
               bits 4 n .. 4 n + 3 are those of output 8 w + (0, 2, 4, 6, 1, 3, 5, 7)[n], lowest bits first. Codes are
               0 .. 15; those of a symmetric grid are stored plus 8.
    qzeros     int32 [G, O / 8]: the zero points of a group, as they are, packed as a row of codes.
    scales     float16 [G, O], whatever the dtype of the rest. Scales are rounded to it before codes are chosen.

A value is (code - zero point) * scale. Readers always read `qzeros`, so a symmetric grid has zero points of 8 and
`zero_point` is true for every folder; `meta` says in `sym` which of the two it is.

config.json's `quantization_config` names the layout (`version` gemm) and, in `modules_to_not_convert`, every linear
that keeps its precision; gptqmodel goes by `dynamic` for that. The folder holds the same as `quant_config.json`, the
file that autoawq wrote.
Sources: gptqmodel 7.7.0 and transformers 5.23, which read these folders in the tests; autoawq's GEMM packing.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn

import quantlab
from quantlab.export.compressed_tensors import pack_rows
from quantlab.export.gptq import unsigned
from quantlab.export.job import ExportJob
from quantlab.export.linears import both_names, kept_linears, separate_linears
from quantlab.export.shards import Layout, Part, TensorType
from quantlab.export.tensors import exactly
from quantlab.methods.solved import Quantized
from quantlab.schemes import TensorSpec

__all__ = ["layout", "pack_outputs"]

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Output of each four bits of a word, lowest first."""
BITS = 4


def layout(job: ExportJob) -> Layout:
    """How the linears of the job are stored; its scheme and linears are such as the format's checks accept."""
    spec = job.scheme.weights
    assert isinstance(spec, TensorSpec) and spec.group_size, (
        "the format's check lets no other weights through"
    )
    linears = separate_linears(job)
    config = _quantization_config(job, spec)
    return Layout(
        linears={name: _part(job, name, linear, spec.group_size) for name, linear in linears.items()},
        quantization_config=config,
        name="gemm",
        num_codes=sum(linear.weight.numel() for linear in linears.values()),
        files={"quant_config.json": config},
    )


def pack_outputs(codes: Tensor) -> Tensor:
    """Codes [N, O], uint8 below 16, as words [N, O / 8], int32."""
    return pack_rows(codes.unflatten(1, (-1, len(ORDER)))[..., list(ORDER)].flatten(1), BITS)


def _part(job: ExportJob, name: str, linear: nn.Linear, group_size: int) -> Part:
    """The tensors that stand for a linear's weight; they are computed when the part is built."""
    rows, width = linear.weight.shape
    tensors = {
        "qweight": TensorType(torch.int32, (width, rows // len(ORDER))),
        "qzeros": TensorType(torch.int32, (width // group_size, rows // len(ORDER))),
        "scales": TensorType(torch.float16, (width // group_size, rows)),
    }
    return Part(tensors, lambda: _tensors(job.codes(name)), num_linears=1)


def _tensors(quantized: Quantized) -> dict[str, Tensor]:
    codes_OI, zeros_OG = unsigned(quantized)
    return {
        "qweight": pack_outputs(codes_OI.t().contiguous()),
        "qzeros": pack_outputs(zeros_OG.t().contiguous()),
        "scales": exactly(quantized.scale, torch.float16).t().contiguous(),
    }


def _quantization_config(job: ExportJob, spec: TensorSpec) -> dict[str, Any]:
    config: dict[str, Any] = {
        "quant_method": "awq",
        "bits": BITS,
        "group_size": spec.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
        "meta": {"quantizer": [f"quantlab:{quantlab.__version__}"], "sym": spec.symmetric},
    }
    if job.ready.skipped:
        config["modules_to_not_convert"] = kept_linears(job)
        config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in both_names(job, job.ready.skipped)}
    return config
