"""Kind `block`: ggml's block types, whose scales are of blocks and of groups in them."""

import torch
from torch import Tensor

from quantlab.export.quantlab_format.plan import Plan
from quantlab.export.quantlab_format.rows import pack_rows, packed
from quantlab.export.shards import TensorType
from quantlab.methods.k_quants import FALLBACKS, SUPERBLOCK
from quantlab.methods.solved import Quantized
from quantlab.numerics.block import BLOCK_TYPES, BlockTensor
from quantlab.schemes import WeightFormat

__all__ = ["block_plan"]

_SUB_SCALES = {"Q6_K": (8, 128), "Q5_K": (6, 0), "Q4_K": (6, 0), "Q3_K": (6, 32)}
"""K type -> bits of a sub-scale, and what is added to it before it is packed."""


def block_plan(shape: tuple[int, ...], form: WeightFormat) -> Plan:
    """How a matrix of this shape is stored; K types fall back where 256 does not divide its inputs."""
    (rows, width), kind = shape, form.name.upper()
    if width % SUPERBLOCK:
        kind = FALLBACKS.get(kind, kind)
    size = BLOCK_TYPES[kind]
    blocks = width // size.block_size
    groups = blocks * size.num_scales
    of_blocks = TensorType(torch.float16, (rows, blocks))
    entry = {"kind": "block", "bits": size.bits, "scale": [rows, groups], "block": kind}
    tensors = {"codes": packed(rows, width, size.bits), "d": of_blocks}
    if kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K"):
        tensors["dmin"] = of_blocks
    if kind in _SUB_SCALES:
        tensors["sub_scales"] = packed(rows, groups, _SUB_SCALES[kind][0])
    if kind in ("Q4_K", "Q5_K"):
        tensors["sub_mins"] = packed(rows, groups, 6)

    def build(quantized: Quantized) -> dict[str, Tensor]:
        assert isinstance(quantized, BlockTensor) and quantized.kind == kind
        made = {"codes": pack_rows(quantized.codes, size.bits), "d": quantized.d.contiguous()}
        if quantized.dmin is not None:
            made["dmin"] = quantized.dmin.contiguous()
        if quantized.sub_scales is not None:
            bits, shift = _SUB_SCALES[kind]
            made["sub_scales"] = pack_rows((quantized.sub_scales + shift).to(torch.uint8), bits)
        if quantized.sub_mins is not None:
            made["sub_mins"] = pack_rows(quantized.sub_mins.to(torch.uint8), 6)
        return made

    return Plan(entry, tensors, build)
