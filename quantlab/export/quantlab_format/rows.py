"""Rows of bits: how unsigned codes are packed. R rows, N codes of each."""

from math import ceil

import torch
from torch import Tensor, nn

from quantlab.export.shards import TensorType
from quantlab.numerics.packing import pack

__all__ = ["pack_rows", "packed"]


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes [R, N] as rows of bits: uint8 [R, ceil(N * bits / 8)].

    Eight codes are exactly `bits` bytes: padded to that, all rows are one stream, and every row begins with a byte.
    """
    rows, width = codes.shape
    stream = pack(nn.functional.pad(codes, (0, -width % 8)), bits).view(rows, -1)
    return stream[:, : ceil(width * bits / 8)].contiguous()


def packed(rows: int, width: int, bits: int) -> TensorType:
    """What `pack_rows` makes of codes [rows, width]."""
    return TensorType(torch.uint8, (rows, ceil(width * bits / 8)))
