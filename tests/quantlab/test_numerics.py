"""Grids, scales, codes and packed bits: properties that hold for every width and granularity.

u = 2^-24 is the unit roundoff of float32.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantlab.errors import SchemeError
from quantlab.methods.rtn import quantize_weight
from quantlab.numerics.affine import choose_qparams, dequantize, fake_quantize, quantize
from quantlab.numerics.dynamic import dynamic_qparams, dynamic_range
from quantlab.numerics.granularity import group_view, spanned_dims
from quantlab.numerics.packing import pack, packed_bytes, unpack
from quantlab.numerics.qtype import QType
from quantlab.numerics.ranges import absmax, min_max, mse_clip, percentile
from quantlab.schemes import Scheme, TensorSpec

U = 2.0**-24
BITS = st.integers(2, 8)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights(name: str) -> TensorSpec:
    spec = Scheme.parse(name).weights
    assert spec is not None
    return spec


def half_step(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Half a step, and what float32 adds: scale, x / scale and the product each round once, on up to 2^bits steps."""
    bound: Tensor = scale / 2 + 4 * U * (x.abs() + scale * 2**bits)
    return bound


def test_a_real_zero_point_shifts_before_rounding() -> None:
    """(code - z) scale with z = 2.4: 0.35 / 0.5 + 2.4 = 3.1 is code 3, which stands for 0.3."""
    x, scale, zero_point = torch.tensor([0.35, -9.0]), torch.tensor(0.5), torch.tensor(2.4)
    codes = quantize(x, scale, zero_point, QType(4, symmetric=False))
    assert codes.tolist() == [3, 0]
    assert torch.allclose(dequantize(codes, scale, zero_point), torch.tensor([0.3, -1.2]))


@given(BITS, st.booleans(), st.sampled_from([-20.0, -1.0, 0.0, 0.3, 50.0]), st.integers(0, 99))
@settings(deadline=None)
def test_error_is_at_most_half_a_step(bits: int, symmetric: bool, shift: float, seed: int) -> None:
    x = randn(5, 33, seed=seed) + shift
    qtype = QType(bits, symmetric)
    low, high = absmax(x, (-1,)) if symmetric else min_max(x, (-1,))
    scale, zero_point = choose_qparams(low, high, qtype)
    codes = quantize(x, scale, zero_point, qtype)
    error = (dequantize(codes, scale, zero_point) - x).abs()
    bound = half_step(x, scale, bits)
    assert (error <= bound).all(), f"worst excess {(error - bound).max():.3e}"
    assert codes.dtype == qtype.dtype
    assert qtype.qmin <= int(codes.min()) and int(codes.max()) <= qtype.qmax


@pytest.mark.parametrize("bits", range(2, 9))
def test_grids(bits: int) -> None:
    spec = TensorSpec(bits, "tensor")
    assert (QType.of_activations(spec).qmin, QType.of_activations(spec).qmax) == (
        1 - 2 ** (bits - 1),
        2 ** (bits - 1) - 1,
    )
    assert QType.of_weights(spec).qmin == -(2 ** (bits - 1))
    zero = TensorSpec(bits, "tensor", symmetric=False)
    assert (QType.of_weights(zero).qmin, QType.of_weights(zero).qmax) == (0, 2**bits - 1)
    scale, _ = choose_qparams(torch.tensor([-3.0]), torch.tensor([2.0]), QType.of_weights(spec))
    assert scale.item() == pytest.approx(3.0 / (2 ** (bits - 1) - 1), rel=2 * U)


@given(BITS, st.booleans(), st.floats(0.5, 40.0), st.booleans())
@settings(deadline=None)
def test_zero_stays_zero(bits: int, symmetric: bool, distance: float, negative: bool) -> None:
    """Also where every other value lies to one side of it: the interval is widened."""
    x = (randn(4, 16).abs() + distance) * (-1 if negative else 1)
    low, high = absmax(x, (-1,)) if symmetric else min_max(x, (-1,))
    qtype = QType(bits, symmetric)
    scale, zero_point = choose_qparams(low, high, qtype)
    assert torch.equal(fake_quantize(torch.zeros(4, 1), scale, zero_point, qtype), torch.zeros(4, 1))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_tensor_of_zeros_has_scale_one(symmetric: bool) -> None:
    zeros = torch.zeros(3, 1)
    scale, zero_point = choose_qparams(zeros, zeros, QType(4, symmetric))
    assert torch.equal(scale, torch.ones(3, 1))
    assert torch.equal(fake_quantize(zeros, scale, zero_point, QType(4, symmetric)), zeros)


@given(BITS, st.booleans(), st.integers(0, 99))
@settings(deadline=None)
def test_fake_quantize_is_the_round_trip_bit_for_bit(bits: int, symmetric: bool, seed: int) -> None:
    x, qtype = randn(7, 19, seed=seed), QType(bits, symmetric)
    scale, zero_point = choose_qparams(*min_max(x, (-1,)), qtype)
    trip = dequantize(quantize(x, scale, zero_point, qtype), scale, zero_point)
    assert torch.equal(fake_quantize(x, scale, zero_point, qtype), trip)


def test_what_is_not_finite_is_never_hidden() -> None:
    for bad in (math.nan, math.inf):
        x = torch.tensor([[1.0, bad, 2.0]])
        scale, _ = choose_qparams(*absmax(x, (-1,)), QType(8))
        assert not fake_quantize(x, scale, None, QType(8)).isfinite().all()


@pytest.mark.parametrize("name", ["w4", "w4t", "w4g8", "w3g8z", "w8z", "w2g4", "w5tz", "w6g16"])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_to_nearest(name: str, scale_dtype: torch.dtype) -> None:
    spec, w = weights(name), randn(12, 32)
    quantized = quantize_weight(w, spec, scale_dtype=scale_dtype)
    groups = 32 // (spec.group_size or 32)
    assert quantized.codes.shape == w.shape
    assert quantized.scale.shape == ((1, 1) if spec.granularity == "tensor" else (12, groups))
    assert torch.equal(quantized.scale.to(scale_dtype).float(), quantized.scale)
    scale = quantized.scale.expand(12, groups).repeat_interleave(32 // groups, dim=1)
    rounded = torch.finfo(scale_dtype).eps / 2 if scale_dtype != torch.float32 else 0.0
    bound = half_step(w, scale, spec.bits) + rounded * scale * 2**spec.bits
    assert ((quantized.dequantize() - w).abs() <= bound).all()
    # Codes come from the scale as it is stored: no other code is nearer.
    zero = (
        0
        if quantized.zero_point is None
        else quantized.zero_point.expand(12, groups).repeat_interleave(32 // groups, dim=1)
    )
    nearest = (w / scale).round() + zero
    assert torch.equal(quantized.codes.float(), nearest.clamp(quantized.qtype.qmin, quantized.qtype.qmax))


def test_a_scale_that_its_dtype_cannot_hold_is_refused() -> None:
    with pytest.raises(SchemeError, match=r"scales must fit torch\.float16: found 1e"):
        quantize_weight(torch.full((2, 4), 1.27e7), weights("w8"), scale_dtype=torch.float16)


@pytest.mark.parametrize("name", ["w4", "w4z", "w8g8", "w3g8z", "w2t"])
@pytest.mark.parametrize("size", [1e-4, 1e-6, 1e-8, 1e-11])
def test_scales_too_small_for_their_dtype_lose_no_weight_by_more_than_their_rounding(
    name: str, size: float
) -> None:
    """float16 numbers below 2^-14 lie 2^-24 apart, so a scale there may be half of that too small; none becomes 0."""
    spec, w = weights(name), randn(6, 32) * size
    quantized = quantize_weight(w, spec, scale_dtype=torch.float16)
    scale = quantized.scale.expand(6, 32 // (spec.group_size or 32)).repeat_interleave(
        spec.group_size or 32, 1
    )
    assert (scale <= 2**-24 + w.abs().max()).all(), "a scale of 1 stands for zeros only"
    rounded = torch.maximum(scale * 2**-11, torch.tensor(2.0**-25))
    bound = half_step(w, scale, spec.bits) + rounded * 2**spec.bits
    error = (quantized.dequantize() - w).abs()
    assert (error <= bound).all(), f"worst excess {(error - bound).max():.3e}"


def test_storage_counts_scales_and_zero_points() -> None:
    w = randn(8, 64)
    assert quantize_weight(w, weights("w4")).storage_bits(16) == 8 * 64 * 4 + 8 * 16
    assert quantize_weight(w, weights("w4g32")).storage_bits(32) == 8 * 64 * 4 + 16 * 32
    assert quantize_weight(w, weights("w4g32z")).storage_bits(16) == 8 * 64 * 4 + 16 * (16 + 4)
    assert quantize_weight(w, weights("w3t")).storage_bits(16) == 8 * 64 * 3 + 16


INPUTS = {"a8": (3, 5, 1), "a8t": (3, 1, 1), "a8c": (3, 1, 8), "a8g4": (3, 5, 2, 1)}
MAPS = {"l8t": (3, 1, 1, 1), "l8h": (3, 2, 1, 1), "l8r": (3, 2, 5, 1)}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", [*INPUTS, *MAPS])
def test_a_scale_never_spans_the_batch(name: str, symmetric: bool) -> None:
    """Shapes as the table says, and a sequence's scale is the same beside a far larger one."""
    scheme = Scheme.parse(name if symmetric else f"{name}z")
    kind, spec = ("inputs", scheme.activations) if scheme.activations else ("map", scheme.logits)
    assert spec is not None
    x = randn(3, 5, 8) if kind == "inputs" else randn(3, 2, 5, 7)
    x[1] *= 1000
    low, high = dynamic_range(x, kind, spec)  # type: ignore[arg-type]
    assert low.shape == high.shape == (INPUTS | MAPS)[name]
    for i in range(3):
        alone = dynamic_range(x[i : i + 1], kind, spec)  # type: ignore[arg-type]
        assert torch.equal(low[i : i + 1], alone[0]) and torch.equal(high[i : i + 1], alone[1])


def test_hidden_values_have_no_say() -> None:
    spec = Scheme.parse("l8tz").logits
    assert spec is not None
    x = randn(2, 1, 3, 4)
    visible = torch.ones(3, 4).tril().bool()
    poisoned = x.masked_fill(~visible, math.inf)
    poisoned[0, 0, 0, 3] = math.nan
    low, high = dynamic_range(poisoned, "map", spec, visible)
    assert torch.equal(high, x.masked_fill(~visible, 0).amax((1, 2, 3), keepdim=True))
    assert torch.equal(low, x.masked_fill(~visible, 0).amin((1, 2, 3), keepdim=True))
    blind = dynamic_range(poisoned, "map", spec, torch.zeros(3, 4, dtype=torch.bool))
    assert not blind[0].any() and not blind[1].any()


def test_a_group_that_does_not_divide_is_refused() -> None:
    with pytest.raises(SchemeError, match=r"must divide the last dimension: found 30, group_size=8"):
        group_view(randn(2, 30), weights("w4g8"))
    assert group_view(randn(2, 32), weights("w4g8")).shape == (2, 4, 8)
    assert group_view(randn(0, 32), weights("w4g8")).shape == (0, 4, 8)
    assert spanned_dims("weight", weights("w4g8")) == (-1,)


def test_dynamic_scales_of_tokens() -> None:
    spec = Scheme.parse("a8").activations
    assert spec is not None
    x = randn(2, 5, 16)
    scale, zero_point = dynamic_qparams(x, spec)
    assert zero_point is None
    assert torch.equal(scale, x.abs().amax(-1, keepdim=True) / 127)


@given(BITS, st.lists(st.integers(0, 7), min_size=0, max_size=4), st.booleans(), st.integers(0, 99))
@settings(deadline=None)
def test_packing_round_trips_exactly(bits: int, shape: list[int], signed: bool, seed: int) -> None:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    dtype = torch.int8 if signed else torch.uint8
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(low, high, tuple(shape), generator=generator).to(dtype)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (packed_bytes(codes.numel(), bits),)
    assert torch.equal(unpack(packed, bits, tuple(shape), dtype), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_stream_is_the_documented_one(bits: int) -> None:
    """Python's integers as the reference: code i at bit i * bits, low bit first, little-endian bytes."""
    codes = torch.randint(
        -(2 ** (bits - 1)), 2 ** (bits - 1), (29,), generator=torch.Generator().manual_seed(1)
    )
    number = sum((int(code) % 2**bits) << (i * bits) for i, code in enumerate(codes))
    assert bytes(pack(codes, bits).tolist()) == number.to_bytes(packed_bytes(29, bits), "little")


def test_codes_that_do_not_fit_are_our_mistake() -> None:
    with pytest.raises(AssertionError, match=r"codes must fit 3 bits, found 0\.\.8"):
        pack(torch.tensor([0, 8]), 3)
    with pytest.raises(AssertionError, match="stream of 2 bytes"):
        unpack(torch.zeros(2, dtype=torch.uint8), 3, (4, 4))


@pytest.mark.parametrize("percent", [99.0, 99.9, 90.0, 75.0, 100.0])
def test_percentile_leaves_out_the_tails(percent: float) -> None:
    x = randn(3, 4, 250)
    low, high = percentile(x, (-2, -1), percent)
    out = math.floor(1000 * (100 - percent) / 100 + 1e-9)
    for i in range(3):
        assert int((x[i] < low[i]).sum()) == int((x[i] > high[i]).sum()) == out
    assert low.shape == (3, 1, 1)
    if percent == 100:
        assert torch.equal(low, min_max(x, (-2, -1))[0])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mse_clip_is_never_worse_than_the_full_range(bits: int, symmetric: bool) -> None:
    x = randn(6, 128)
    qtype = QType(bits, symmetric)

    def squared_error(limits: tuple[Tensor, Tensor]) -> Tensor:
        scale, zero_point = choose_qparams(*limits, qtype)
        return (fake_quantize(x, scale, zero_point, qtype) - x).square().sum(-1)

    full, clipped = (absmax if symmetric else min_max)(x, (-1,)), mse_clip(x, (-1,), qtype)
    assert (squared_error(clipped) <= squared_error(full)).all()
    # At few bits a normal tail is not worth its steps.
    assert bits > 3 or squared_error(clipped).sum() < 0.9 * squared_error(full).sum()
    assert clipped[0].shape == (6, 1)


@pytest.mark.parametrize("dims", [(-1,), (-2, -1)])
def test_a_range_is_searched_as_if_its_row_were_alone(dims: tuple[int, ...]) -> None:
    """A matrix of more rows than are searched at a time; a range that spans rows is of all of them."""
    x = torch.randn(9000, 32, generator=torch.Generator().manual_seed(0))
    qtype = QType(3, full_range=True)
    low, high = mse_clip(x, dims, qtype, num_steps=5)
    if dims == (-1,):
        rows = [0, 8191, 8192, 8999]
        alone = [mse_clip(x[row : row + 1], dims, qtype, num_steps=5)[1] for row in rows]
        assert torch.equal(high[rows], torch.cat(alone)) and high.shape == (9000, 1)
    else:
        assert high.shape == (1, 1) and float(high) <= float(x.abs().max()) and torch.equal(low, -high)


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_fit_from_the_lowest_signed_to_the_highest_unsigned(bits: int) -> None:
    low, high = -(2 ** (bits - 1)), 2**bits - 1
    for code in (low, high):
        assert len(pack(torch.tensor([code, 0]), bits)) == packed_bytes(2, bits)
    for code in (low - 1, high + 1):
        with pytest.raises(AssertionError, match=f"codes must fit {bits} bits"):
            pack(torch.tensor([code, 0]), bits)
