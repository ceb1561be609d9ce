"""4-bit weights that stay packed in memory, times bf16 inputs, through torch's packed int4 product on a CPU.

With a scale s and a zero z for every group of inputs, both bfloat16, the product sees

    w = (code - 8) s + z        code 0 .. 15

A symmetric grid of codes c = -8 .. 7 is code = c + 8, s = bf16(scale), z = 0. A grid of b bits with zero points p has
its middle m = 2^(b-1) put at 8: code = c - m + 8, s = bf16(scale), z = bf16((m - p) scale), as (c - p) scale asks for.
With u = 2^-8, the relative rounding of bfloat16, a weight is therefore off by at most

    |w - (c - p) scale| <= u scale (|c - m| + |m - p|)          m = p = 0 on a symmetric grid

On a symmetric grid that is u |w|, the rounding of any bfloat16 weight, and 0 where scales are bfloat16 already, as an
export stores them. With zero points it is at most 16 u = 1/16 of a step, and 1/32 where scales are bfloat16. A real
zero point (HQQ's) may lie outside the codes: by up to one code it is taken, which adds u; further out it is refused,
since z would be too coarse. Grids of 2 and 3 bits fit too, and take the room of 4.

Few tokens go through `aten._weight_int4pack_mm_for_cpu`: it forms w in float32, sums in float32 and rounds once, to
bfloat16. Its time grows with every token, so from `FEWEST_FOR_GEMM` tokens on the weights are unpacked, a tile at a
time, into bfloat16 (one more rounding, u |w|, as any bf16 linear has) and multiplied by the bf16 product. Which is
the faster is measured by `python benchmarks/packed_linear.py`.

Inputs in float32 take a path inside the op that is some 60 times slower, so inputs are always rounded to bfloat16
first. A kernel by this name computes in bfloat16 whatever the dtype of its inputs, and answers in that dtype.

M tokens, K inputs, N outputs, G groups of g inputs. Packed layout, read from torch's int4mm_kernel.cpp and checked by
`block_size`: outputs in blocks of B (64 with AVX-512, 32 without), a block [K, B / 2] bytes; of byte j of a whole block
the low half is output j and the high half output j + B / 2; of a last, shorter block the low half is output 2j and the
high half 2j + 1.
"""

from functools import cache

import torch
from torch import Tensor, nn

from quantlab.errors import SchemeError
from quantlab.numerics.affine import QuantizedTensor

__all__ = [
    "FEWEST_FOR_GEMM",
    "GROUP_SIZES",
    "MAX_BITS",
    "Int4Weight",
    "block_size",
    "linear",
    "op_group_size",
    "why_not",
]

FEWEST_FOR_GEMM = 56
"""Tokens from which unpacking and a bf16 product are the faster path; `python benchmarks/packed_linear.py`."""

GROUP_SIZES = (256, 128, 64, 32)
"""Inputs that share a scale in the op."""

MAX_BITS = 4

_OUTPUTS = 16
"""The op wants a multiple of these."""

_BLOCKS = 4
"""Blocks of a tile that is unpacked at once: 4096 x 256 weights are 2 MiB."""


def op_group_size(size: int) -> int | None:
    """The largest group of the op that divides groups of `size` inputs; None where there is none."""
    return next((group for group in GROUP_SIZES if size % group == 0), None)


def why_not(bits: int, group_size: int | None, shape: tuple[int, int]) -> str | None:
    """What of a matrix [N, K] on such a grid the op cannot take, or None. `group_size` None: a scale per output."""
    num_outputs, num_inputs = shape
    if bits > MAX_BITS:
        return f"codes of at most {MAX_BITS} bits: it has {bits}"
    if op_group_size(group_size or num_inputs) is None:
        return f"a scale per multiple of {GROUP_SIZES[-1]} inputs: it has one per {group_size or num_inputs}"
    if num_outputs % _OUTPUTS:
        return f"a multiple of {_OUTPUTS} outputs: it has {num_outputs}"
    return None


class Int4Weight(nn.Module):
    """A quantized matrix packed for `linear`: 4 bits a weight, and 4 bytes a group."""

    packed: Tensor
    """[N, K / 2] uint8, in the order that this machine's op reads."""
    scales_and_zeros: Tensor
    """[G, N, 2] bfloat16."""

    def __init__(self, weight: QuantizedTensor, name: str = "the matrix") -> None:
        """Pack a grid of 2 to 4 bits, symmetric or with zero points, on the CPU. `name` is for messages.

        Raises:
            SchemeError: the op cannot take the matrix, a zero point lies far outside the codes, or the op orders bytes
                in a way that is not known.
        """
        super().__init__()
        shape = (weight.codes.shape[0], weight.codes.shape[1])
        size = shape[1] // weight.scale.shape[-1]
        reason = why_not(weight.qtype.bits, size, shape)
        if reason is not None:
            raise SchemeError(f"int4_packed needs {reason}, in {name}. Use kernel=integer.")
        _check_zeros(weight, name)
        block_size()
        group_size = op_group_size(size)
        assert group_size is not None
        self.shape, self.group_size = shape, group_size
        self.has_zeros = weight.zero_point is not None
        middle = 1 << weight.qtype.bits - 1 if self.has_zeros else 0
        packed = _pack(weight.codes.to(torch.int32) + (8 - middle))
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scales_and_zeros", self._scales_and_zeros(weight), persistent=False)

    def _scales_and_zeros(self, weight: QuantizedTensor) -> Tensor:
        """[G, N, 2] bfloat16; a scale that spans several groups of the op is repeated."""
        zero = torch.zeros_like(weight.scale)
        if weight.zero_point is not None:
            zero = ((1 << weight.qtype.bits - 1) - weight.zero_point) * weight.scale
        both_NG2 = torch.stack([weight.scale, zero], -1)
        num_outputs, num_inputs = self.shape
        repeats = num_inputs // self.group_size // both_NG2.shape[1]
        both_NG2 = both_NG2.expand(num_outputs, -1, -1).repeat_interleave(repeats, 1)
        return both_NG2.transpose(0, 1).to(torch.bfloat16).contiguous()

    def dequantize(self) -> Tensor:
        """The real matrix [N, K] that is multiplied by, float32."""
        num_outputs, num_inputs = self.shape
        codes = unpack(self.packed).float().view(num_outputs, num_inputs // self.group_size, self.group_size)
        scale, zero = self.scales_and_zeros.float().transpose(0, 1).unsqueeze(2).unbind(-1)
        return codes.sub_(8).mul_(scale).add_(zero).flatten(1)


def _check_zeros(weight: QuantizedTensor, name: str) -> None:
    """Refuse zero points that bfloat16 would hold too coarsely."""
    if weight.zero_point is None:
        return
    outside = torch.maximum(-weight.zero_point, weight.zero_point - weight.qtype.qmax)
    if float(outside.max()) > 1:
        far = float(weight.zero_point.flatten()[outside.argmax()])
        raise SchemeError(
            f"int4_packed needs zero points within the codes 0 to {weight.qtype.qmax}, or one code beyond: {name} has "
            f"one at {far:.4g}, where the weights of a group have one sign. Use kernel=integer."
        )


def linear(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    """x [.., K] in bfloat16 times the packed weights; [.., N] in x's dtype. NaN and inf stay what they are.

    Error bound, with v = 2^-24 and S the sum of the K magnitudes |x w|: the op (K + 2) v S and one rounding u |y|;
    unpacked, u S more; the bias, added in bfloat16, one rounding; inputs of another dtype u S more.
    """
    rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()
    out: Tensor
    if 0 < len(rows) < FEWEST_FOR_GEMM:
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows, weight.packed, weight.group_size, weight.scales_and_zeros
        )
    else:
        out = unpacked_linear(rows, weight)
    if bias is not None:
        out.add_(bias)
    return out.view(*x.shape[:-1], weight.shape[0]).to(x.dtype)


def unpacked_linear(x_MK: Tensor, weight: Int4Weight) -> Tensor:
    """x times the weights, unpacked to bfloat16 in tiles of outputs; [M, N] bfloat16."""
    out = x_MK.new_empty(len(x_MK), weight.shape[0])
    block = block_size()
    whole = weight.shape[0] // block * block
    for start in range(0, whole, _BLOCKS * block):
        stop = min(start + _BLOCKS * block, whole)
        _tile(x_MK, weight, start, stop, block, out[:, start:stop])
    if whole < weight.shape[0]:
        _tile(x_MK, weight, whole, weight.shape[0], 0, out[:, whole:])
    return out


def _tile(x_MK: Tensor, weight: Int4Weight, start: int, stop: int, block: int, out_MT: Tensor) -> None:
    """Outputs `start` to `stop`; `block` 0 is a last block, whose neighbours share a byte.

    A byte is looked up as its pair of codes, so columns stand in the order of the packed halves until the product is
    done.
    """
    num_inputs, group = weight.shape[1], weight.group_size
    width = block or stop - start
    halves = (2, width // 2) if block else (width // 2, 2)
    blocks = (stop - start) // width
    scale, zero = weight.scales_and_zeros[:, start:stop].unflatten(1, (blocks, *halves)).unbind(-1)
    scale, zero = (
        (both.transpose(2, 3) if block else both).flatten(2).unsqueeze(1).contiguous()
        for both in (scale, zero)
    )
    tile = x_MK.new_empty(num_inputs // group, group, blocks, width)
    bytes_BJ = weight.packed[start:stop].view(blocks, -1)
    pairs = torch.empty(bytes_BJ.shape[1], dtype=torch.int32)
    for i in range(blocks):
        torch.index_select(_pairs(), 0, bytes_BJ[i].to(torch.int32), out=pairs)
        codes = pairs.view(torch.bfloat16).view(-1, group, width)
        if weight.has_zeros:
            torch.addcmul(zero[:, :, i], codes, scale[:, :, i], out=tile[:, :, i])
        else:
            torch.mul(codes, scale[:, :, i], out=tile[:, :, i])
    product = (x_MK @ tile.view(num_inputs, -1)).view(len(x_MK), blocks, width // 2, 2)
    out_MT.unflatten(1, (blocks, *halves)).copy_(product.transpose(2, 3) if block else product)


@cache
def _pairs() -> Tensor:
    """[256] int32: of every byte the bfloat16 pair (low half - 8, high half - 8), in memory's order."""
    byte = torch.arange(256)
    return torch.stack([(byte & 15) - 8, (byte >> 4) - 8], -1).to(torch.bfloat16).view(torch.int32).flatten()


def _pack(codes: Tensor) -> Tensor:
    """Codes [N, K] int32, 0 .. 15, as this machine's op reads them."""
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return packed


def unpack(packed: Tensor) -> Tensor:
    """Codes [N, K] uint8 of packed [N, K / 2]."""
    return _unpack(packed, block_size())


def _unpack(packed: Tensor, block: int) -> Tensor:
    """`unpack` where blocks have `block` outputs."""
    num_outputs, num_inputs = len(packed), 2 * packed.shape[1]
    whole = num_outputs // block * block
    blocks = packed[:whole].reshape(whole // block, num_inputs, block // 2)
    codes = torch.cat([blocks & 15, blocks >> 4], -1).transpose(1, 2).reshape(whole, num_inputs)
    last = packed[whole:].reshape(num_inputs, (num_outputs - whole) // 2)
    return torch.cat([codes, torch.stack([last & 15, last >> 4], -1).flatten(1).t()])


@cache
def block_size() -> int:
    """Outputs of a block in this machine's packed layout, found by packing known codes.

    Raises:
        SchemeError: the op is missing, or its layout is none that is known.
    """
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (112, 64), generator=generator, dtype=torch.int32)
    try:
        packed = _pack(codes)
    except (AttributeError, RuntimeError, NotImplementedError):
        packed = None
    for block in (64, 32):
        if packed is not None and torch.equal(_unpack(packed, block).int(), codes):
            return block
    raise SchemeError(
        "packed int4 weights need torch's CPU op in the byte order of AVX-512 or AVX2: this machine has another. "
        "Use kernel=integer."
    )
