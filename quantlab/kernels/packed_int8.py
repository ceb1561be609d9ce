"""8-bit weights that stay int8 in memory, times bf16 inputs, through torch's int8 weight-only product on a CPU.

    y = bf16(sum over K of x (code s))        code -128 .. 127, s = bf16(scale), one for an output

Symmetric grids of 2 to 8 bits with one scale per output, or per matrix; up to 4 bits `packed_int4` takes half the
memory. s differs from the grid's float32 scale by at most u = 2^-8 relative, and so does every weight: the bound that
rounding a weight to bfloat16 has.

Few tokens go through `aten._weight_int8pack_mm`; from `FEWEST_FOR_GEMM` on the codes are widened to bfloat16, exactly,
a tile at a time, and multiplied by the bf16 product. Inputs are always rounded to bfloat16 first, and the answer has
their dtype: the op's float32 path is many times slower. The op reads 16 inputs at a time from aligned addresses and
checks neither: other sizes read past the end or crash, so both are seen to here.

M tokens, K inputs, N outputs.
"""

import torch
from torch import Tensor, nn

from quantlab.errors import SchemeError
from quantlab.numerics.affine import QuantizedTensor

__all__ = ["FEWEST_FOR_GEMM", "PackedInt8Weight", "linear", "why_not"]

FEWEST_FOR_GEMM = 24
"""Tokens from which widening and a bf16 product are the faster path; `python benchmarks/packed_linear.py`."""

_INPUTS = 16
"""The op wants a multiple of these."""

_ALIGNMENT = 64
"""Bytes that an address must be a multiple of: a vector's width, twice what the op needs."""

_TILE = 256
"""Outputs widened at once: 4096 x 256 weights are 2 MiB."""


def why_not(symmetric: bool, group_size: int | None, shape: tuple[int, int]) -> str | None:
    """What of a matrix [N, K] on such a grid the op cannot take, or None. `group_size` None: a scale per output."""
    if group_size is not None and group_size != shape[1]:
        return f"one scale per output: it has one per {group_size} inputs"
    if not symmetric:
        return "a symmetric grid: it has zero points"
    if shape[1] % _INPUTS:
        return f"a multiple of {_INPUTS} inputs: it has {shape[1]}"
    return None


class PackedInt8Weight(nn.Module):
    """A quantized matrix as `linear` takes it: 8 bits a weight, and 2 bytes an output."""

    codes: Tensor
    """[N, K] int8."""
    scale: Tensor
    """[N] bfloat16."""

    def __init__(self, weight: QuantizedTensor, name: str = "the matrix") -> None:
        """Take a symmetric grid with one scale per output. `name` is for messages.

        Raises:
            SchemeError: the op cannot take the matrix.
        """
        super().__init__()
        shape = (weight.codes.shape[0], weight.codes.shape[1])
        reason = why_not(weight.zero_point is None, shape[1] // weight.scale.shape[-1], shape)
        if reason is not None:
            raise SchemeError(f"int8_packed needs {reason}, in {name}. Use kernel=integer.")
        self.register_buffer("codes", _aligned(weight.codes.contiguous()), persistent=False)
        scale = weight.scale.expand(shape[0], 1).flatten().to(torch.bfloat16)
        self.register_buffer("scale", scale, persistent=False)

    def dequantize(self) -> Tensor:
        """The real matrix [N, K] that is multiplied by, float32."""
        return self.codes.float() * self.scale.float().unsqueeze(1)


def linear(x: Tensor, weight: PackedInt8Weight, bias: Tensor | None = None) -> Tensor:
    """x [.., K] in bfloat16 times the weights; [.., N] in x's dtype. NaN and inf stay what they are.

    Error bound, with v = 2^-24 and S the sum of the K magnitudes |x w|: (K + 2) v S and two roundings
    u |y| (the op: one); the bias,
    added in bfloat16, one rounding; inputs of another dtype u S more.
    """
    rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()
    out: Tensor
    if 0 < len(rows) < FEWEST_FOR_GEMM:
        out = torch.ops.aten._weight_int8pack_mm(_aligned(rows), weight.codes, weight.scale)
    else:
        out = widened_linear(rows, weight)
    if bias is not None:
        out.add_(bias)
    return out.view(*x.shape[:-1], len(weight.codes)).to(x.dtype)


def widened_linear(x_MK: Tensor, weight: PackedInt8Weight) -> Tensor:
    """x times the codes, widened to bfloat16 in tiles of outputs, then scaled; [M, N] bfloat16."""
    out = x_MK.new_empty(len(x_MK), len(weight.codes))
    for start in range(0, len(weight.codes), _TILE):
        rows = slice(start, start + _TILE)
        torch.mul(x_MK @ weight.codes[rows].to(torch.bfloat16).t(), weight.scale[rows], out=out[:, rows])
    return out


def _aligned(contiguous: Tensor) -> Tensor:
    """The same values at an address that a vector may be read from; a view into other memory is copied."""
    return contiguous.clone() if contiguous.data_ptr() % _ALIGNMENT else contiguous
