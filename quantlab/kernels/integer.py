"""Integer products: codes times codes in int8, summed exactly in int32, scaled once at the end.

With real values  x = s_x (q + d_x)  and  w = s_w (c + d_w), where q and c are int8 and the offsets d hold what is
left of the zero points, one group of inputs contributes  s_x s_w (q.c + d_x sum(c) + d_w (sum(q) + K d_x)).
Codes 0 .. 255 shift by 128 to fit int8. The bracket is an integer, so it is the same for any batch, order, thread
count, device and backend of `product`; every float operation after it rounds one element by itself. Hence
bit-identical outputs for bit-identical inputs, which no float product promises.

Grouped weights need one product and one scaling per group, in tiles of rows that keep the sums in cache. Whether
that beats one float product of fake-quantized values was measured with `python benchmarks/integer_linear.py` (CPU
time, one thread): w4g256a8 1.4 to 1.8 times faster; w4g128a8 0.9 to 1.1 at M=1024, 2048x2048, and 1.1 to 1.2 at
M=160, 1536x1536, the size of an evaluation's forward; w4g64a8 0.6 to 0.8, and 0.7 to 1.0.
`INTEGER_GROUP_SIZE` is the line drawn.

M tokens, K inputs, N outputs, G groups of g inputs.
"""

import torch
from torch import Tensor, nn

from quantlab.kernels.product import exact_product
from quantlab.numerics.affine import QuantizedTensor, quantize
from quantlab.numerics.dynamic import dynamic_qparams
from quantlab.numerics.qtype import QType
from quantlab.numerics.static import Fixed
from quantlab.schemes import TensorSpec

__all__ = ["INTEGER_GROUP_SIZE", "Int8Weight", "largest_code", "linear", "max_in_features"]

INTEGER_GROUP_SIZE = 128
"""Smallest group of weights for which the integer product is the faster path on a CPU."""

_TILE = 64
"""Rows of a tile of grouped products: 64 x 2048 sums are half a megabyte."""


def max_in_features(weights: QType, inputs: QType) -> int:
    """The most inputs whose products cannot overflow int32, whatever the codes."""
    return int((2**31 - 1) // (_largest(weights) * _largest(inputs)))


def largest_code(qtype: QType) -> int:
    """The largest magnitude of a code as it enters a product: 128 for all grids of 8 bits but the mirrored one."""
    shift = _shift(qtype)
    return max(qtype.qmax - shift, shift - qtype.qmin)


class Int8Weight(nn.Module):
    """A quantized matrix laid out for `linear`: int8 codes by group, and what undoes their offsets."""

    codes: Tensor
    """[G, N, g] int8, contiguous: a transposed view of a group is what the product takes fastest."""
    scale: Tensor
    """[G, 1, N] float32."""
    offset: Tensor | None
    """[G, 1, N] int32: code + offset = code of the grid less its zero point. None where it is 0."""
    code_sums: Tensor
    """[G, 1, N] int32: sum of the codes of a group."""

    def __init__(self, weight: QuantizedTensor) -> None:
        super().__init__()
        num_outputs, num_groups = weight.codes.shape[0], weight.scale.shape[-1]
        shift = _shift(weight.qtype)
        self.largest = largest_code(weight.qtype)
        codes = (weight.codes.to(torch.int16) - shift).to(torch.int8)
        by_group = codes.view(num_outputs, num_groups, -1).transpose(0, 1).contiguous()
        self.register_buffer("codes", by_group, persistent=False)
        self.register_buffer("scale", _by_group(weight.scale, num_outputs), persistent=False)
        offset = None if weight.zero_point is None else _by_group(shift - weight.zero_point, num_outputs)
        self.register_buffer("offset", offset, persistent=False)
        self.register_buffer("code_sums", by_group.sum(-1, dtype=torch.int32).unsqueeze(1), persistent=False)

    def dequantize(self) -> Tensor:
        """The real matrix [N, K], float32."""
        codes = self.codes.transpose(1, 2).float()
        real = (codes if self.offset is None else codes + self.offset) * self.scale
        return real.flatten(0, 1).t()


def linear(
    x: Tensor, weight: Int8Weight, bias: Tensor | None, inputs: TensorSpec, fixed: Fixed | None = None
) -> Tensor:
    """x [.., T, K] times the weights, as integers; [.., T, N] in x's dtype. `fixed`: a static range, [1, 1] each.

    Error bound: against exact arithmetic on the same codes, one rounding each for the conversion of the sum, the
    two scales, every further group's addition, the bias and the result's dtype; no error grows with K.
    """
    qtype = QType.of_activations(inputs)
    scale, zero_point = dynamic_qparams(x, inputs, fixed)
    shift = _shift(qtype)
    codes = quantize(x, scale, zero_point, qtype)
    if shift:
        codes = codes.to(torch.int16).sub_(shift).to(torch.int8)
    rows = (*x.shape[:-1], 1)
    offset = None if zero_point is None else (shift - zero_point).expand(rows).reshape(-1, 1)
    out = _scaled_sums(codes.view(torch.int8).reshape(-1, x.shape[-1]), offset, weight, largest_code(qtype))
    out.mul_(scale.expand(rows).reshape(-1, 1))
    if bias is not None:
        out.add_(bias)
    return out.reshape(*x.shape[:-1], out.shape[-1]).to(x.dtype)


def _scaled_sums(codes_MK: Tensor, offset_M1: Tensor | None, weight: Int8Weight, largest: int) -> Tensor:
    """sum over groups of s_w times the exact integer sum, [M, N] float32. `largest`: magnitude of the inputs' codes."""
    num_groups, num_outputs = weight.codes.shape[:2]
    if num_groups == 1:
        return _group_sums(codes_MK, offset_M1, weight, largest, 0).float().mul_(weight.scale[0])
    out = codes_MK.new_empty(codes_MK.shape[0], num_outputs, dtype=torch.float32)
    integers = codes_MK.new_empty(_TILE, num_outputs, dtype=torch.int32)
    floats = out.new_empty(_TILE, num_outputs)
    for start in range(0, codes_MK.shape[0], _TILE):
        rows = slice(start, start + _TILE)
        total = out[rows]
        offset = None if offset_M1 is None else offset_M1[rows]
        for group, columns in enumerate(codes_MK[rows].chunk(num_groups, dim=1)):
            sums = _group_sums(columns, offset, weight, largest, group, integers[: len(total)])
            term = floats[: len(total)].copy_(sums).mul_(weight.scale[group])
            # Not addcmul: whether it rounds once or twice depends on where in memory an element lies.
            total = total.add_(term) if group else total.copy_(term)
    return out


def _group_sums(
    codes_Mg: Tensor,
    offset_M1: Tensor | None,
    weight: Int8Weight,
    largest: int,
    group: int,
    out: Tensor | None = None,
) -> Tensor:
    """One group's exact sums with all offsets, [M, N] int32. Intermediates may wrap; the sum itself fits."""
    sums = exact_product(codes_Mg, weight.codes[group], (largest, weight.largest), out)
    if offset_M1 is not None:
        sums.add_(offset_M1 * weight.code_sums[group])
    if weight.offset is not None:
        inputs = codes_Mg.sum(-1, keepdim=True, dtype=torch.int32)
        if offset_M1 is not None:
            inputs.add_(offset_M1 * codes_Mg.shape[-1])
        sums.add_(inputs * weight.offset[group])
    return sums


def _by_group(values: Tensor, num_outputs: int) -> Tensor:
    """[O, G], [O, 1] or [1, 1] as [G, 1, N], contiguous."""
    return values.expand(num_outputs, -1).t().unsqueeze(1).contiguous()


def _shift(qtype: QType) -> int:
    """What codes lose to fit int8: only 8-bit codes around a zero point need it."""
    return 128 if qtype.qmax > 127 else 0


def _largest(qtype: QType) -> int:
    """The largest magnitude of code - zero_point."""
    return max(qtype.qmax, -qtype.qmin)
