"""Small floats: exact value tables, rounding as torch's own dtypes, and scales as the standards say."""

import math

import pytest
import torch
from torch import Tensor

from quantlab.errors import SchemeError
from quantlab.methods.floats import fp8, fp8e5m2, mxfp4, mxfp6, mxfp6e3m2, nvfp4
from quantlab.methods.formats import FORMATS
from quantlab.numerics.codebook import float_codes
from quantlab.numerics.tables import E8M0, FLOATS

# OCP Microscaling Formats (MX) v1.0, tables of section 5.3: the values at or above zero, in the order of codes.
PUBLISHED = {
    "e2m1": [0, 0.5, 1, 1.5, 2, 3, 4, 6],
    "e2m3": [
        *(0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875),
        *(2, 2.25, 2.5, 2.75, 3, 3.25, 3.5, 3.75, 4, 4.5, 5, 5.5, 6, 6.5, 7, 7.5),
    ],
    "e3m2": [
        *(0, 0.0625, 0.125, 0.1875, 0.25, 0.3125, 0.375, 0.4375, 0.5, 0.625, 0.75, 0.875, 1, 1.25, 1.5, 1.75),
        *(2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28),
    ],
}
TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
PER_CHANNEL = {"fp8": (fp8, "e4m3"), "fp8e5m2": (fp8e5m2, "e5m2")}
POWER_OF_TWO = {"mxfp4": (mxfp4, "e2m1"), "mxfp6": (mxfp6, "e2m3"), "mxfp6e3m2": (mxfp6e3m2, "e3m2")}


def normal(seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(24, 64, generator=torch.Generator().manual_seed(seed)) * scale


def every_byte(dtype: torch.dtype) -> Tensor:
    return torch.arange(256).to(torch.uint8).view(dtype).float()


def same(left: Tensor, right: Tensor) -> bool:
    """Equal with the signs of zeros, NaN equal to NaN."""
    return torch.equal(left.nan_to_num(-1e30), right.nan_to_num(-1e30)) and torch.equal(
        left.signbit() & ~left.isnan(), right.signbit() & ~right.isnan()
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_tables_are_the_published_ones(name: str) -> None:
    positive = PUBLISHED[name]
    assert same(FLOATS[name].values(), torch.tensor([*positive, *(-float(value) for value in positive)]))
    assert FLOATS[name].largest == positive[-1]


@pytest.mark.parametrize("name", TORCH)
def test_tables_are_torchs_own(name: str) -> None:
    assert same(FLOATS[name].values(), every_byte(TORCH[name]))
    assert FLOATS[name].largest == torch.finfo(TORCH[name]).max


def test_scales_of_blocks_are_torchs_own() -> None:
    assert same(E8M0, every_byte(torch.float8_e8m0fnu))


@pytest.mark.parametrize(
    ("name", "exponent"), [("e2m1", 2), ("e2m3", 2), ("e3m2", 4), ("e4m3", 8), ("e5m2", 15)]
)
def test_largest_exponents_are_the_standards(name: str, exponent: int) -> None:
    assert FLOATS[name].max_exponent == exponent


def probes(name: str) -> Tensor:
    """Every value of a format, every midpoint, and the float32 neighbours of both; zeros of both signs."""
    values = FLOATS[name].magnitudes()
    points = torch.cat([values, (values[:-1] + values[1:]) / 2])
    inf = torch.tensor(float("inf"))
    points = torch.cat(
        [points, points.nextafter(inf), points.nextafter(-inf).clamp(min=0.0), normal().flatten().abs()]
    )
    points = points[points <= FLOATS[name].largest]
    return torch.cat([points, -points])


@pytest.mark.parametrize("name", TORCH)
def test_codes_are_those_of_torchs_cast(name: str) -> None:
    x = probes(name)
    assert torch.equal(float_codes(x, FLOATS[name]), x.to(TORCH[name]).view(torch.uint8))


@pytest.mark.parametrize("name", FLOATS)
def test_codes_round_to_nearest_half_to_even_and_saturate(name: str) -> None:
    fmt = FLOATS[name]
    x, magnitudes = probes(name), [float(value) for value in fmt.magnitudes()]
    beyond = torch.tensor([fmt.largest * 1.001, fmt.largest * 2])
    x = torch.cat([x, beyond, -beyond])

    def nearest(value: float) -> int:
        distance = [(abs(abs(value) - place), code % 2, code) for code, place in enumerate(magnitudes)]
        sign = math.copysign(1.0, value) < 0
        return min(distance)[2] + (sign << fmt.bits - 1)

    # Python's floats hold the distances exactly: they are differences of float32 numbers of like size.
    assert float_codes(x, fmt).tolist() == [nearest(float(value)) for value in x]
    assert fmt.values()[float_codes(torch.tensor([3e38, -3e38]), fmt).long()].tolist() == [
        fmt.largest,
        -fmt.largest,
    ]


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", PER_CHANNEL)
def test_fp8_is_torchs_cast_of_scaled_weights(name: str, scale_dtype: torch.dtype) -> None:
    quantize, element = PER_CHANNEL[name]
    largest = torch.finfo(TORCH[element]).max
    weight_OI = normal(1, 3.0)
    ours = quantize(weight_OI, "w", scale_dtype=scale_dtype)
    scale = (weight_OI.abs().amax(-1, keepdim=True) / largest).to(scale_dtype).float()
    codes = (weight_OI / scale).clamp(-largest, largest).to(TORCH[element])
    assert torch.equal(ours.scale, scale)
    assert torch.equal(ours.codes, codes.view(torch.uint8))
    assert torch.equal(ours.dequantize(), codes.float() * scale)
    assert ours.storage_bits(99) == 24 * 64 * 8 + 24 * torch.finfo(scale_dtype).bits


@pytest.mark.parametrize("name", PER_CHANNEL)
@pytest.mark.parametrize("magnitude", [1e-45, 1e-41, 1e-38, 1e-7, 1e38, 3.4e38])
def test_fp8_holds_any_finite_weight(name: str, magnitude: float) -> None:
    weight_OI = torch.linspace(-1, 1, 64).repeat(2, 1) * magnitude
    real = PER_CHANNEL[name][0](weight_OI, "w").dequantize()
    # Half the spacing below the largest value, 2^-(mantissa bits + 1) of the largest weight; the scale of subnormal
    # magnitudes is off by half of float32's smallest number, times the largest value of the format.
    fmt = FLOATS[PER_CHANNEL[name][1]]
    bound = magnitude * 2.0 ** -(fmt.mantissa_bits + 1) * (1 + 4 * 2.0**-24) + 2.0**-149 * fmt.largest
    assert ((real - weight_OI).abs() <= bound).all()


def test_fp8_scale_must_fit_its_dtype() -> None:
    with pytest.raises(
        SchemeError, match=r"scales must fit torch.float16: a\.b needs 2.23e\+35. Use a wider"
    ):
        fp8(torch.full((2, 8), 1e38), "a.b", scale_dtype=torch.float16)


def test_fp8_scale_that_would_vanish_is_the_smallest_of_its_dtype() -> None:
    weight_OI = torch.tensor([[2.0**-24, -(2.0**-27)], [0.0, 0.0]])
    ours = fp8(weight_OI, "w", scale_dtype=torch.float16)
    assert ours.scale.tolist() == [[2.0**-24], [1.0]]
    assert torch.equal(ours.dequantize(), weight_OI)


@pytest.mark.parametrize("name", POWER_OF_TWO)
@pytest.mark.parametrize("magnitude", [1e-45, 1e-40, 1e-37, 0.02, 1.0, 7.9, 8.0, 1e38, 3.4e38])
def test_mx_follows_the_standard(name: str, magnitude: float) -> None:
    quantize, element = POWER_OF_TWO[name]
    fmt, weight_OI = FLOATS[element], normal(2).clamp(-3, 3) / 3 * magnitude
    weight_OI[:, 40] = magnitude
    ours = quantize(weight_OI, "w")
    absmax = weight_OI.unflatten(-1, (-1, 32)).abs().amax(-1)
    for scale, largest in zip(ours.scale.flatten().tolist(), absmax.flatten().tolist(), strict=True):
        # frexp of a Python float is exact, and every float32 number is a normal float64.
        exponent = max(math.frexp(largest)[1] - 1 - int(math.log2(fmt.largest)), -127) if largest else 0
        assert scale == 2.0**exponent
    units = weight_OI.double() / ours.scale.double().repeat_interleave(32, -1)
    assert torch.equal(ours.codes, float_codes(units.float(), fmt))
    exact = fmt.values()[ours.codes.long()].double() * ours.scale.double().repeat_interleave(32, -1)
    assert torch.equal(ours.dequantize(), exact.float())
    assert ours.storage_bits(99) == 24 * 64 * ours.bits + 24 * 2 * 8


def test_mxfp4_of_a_block_worked_by_hand() -> None:
    weight_OI = torch.zeros(1, 32)
    # absmax 11: 2^3 <= 11 < 2^4, so the scale is 2^(3 - 2) = 2 and 11 / 2 = 5.5 goes to 6; 10 / 2 = 5 is half way
    # between 4 (even code 6) and 6; 15 / 2 would saturate.
    weight_OI[0, :6] = torch.tensor([11.0, 10.0, -0.5, 0.6, -3.0, 7.0])
    ours = mxfp4(weight_OI, "w")
    assert ours.scale.item() == 2.0
    assert ours.dequantize()[0, :6].tolist() == [12.0, 8.0, 0.0, 1.0, -3.0, 8.0]
    weight_OI[0, 0] = 15.0
    assert mxfp4(weight_OI, "w").dequantize()[0, 0] == 12.0


def test_nvfp4_scales_are_e4m3_times_one_float32() -> None:
    weight_OI = normal(3, 0.1)
    weight_OI[2, :16] = 0.0
    ours = nvfp4(weight_OI, "w")
    absmax = weight_OI.unflatten(-1, (-1, 16)).abs().amax(-1)
    of_matrix = weight_OI.abs().max() / (6 * 448)
    of_block = (absmax / 6 / of_matrix).to(torch.float8_e4m3fn).float()
    of_block[2, 0] = 2.0**-9  # a block of zeros has the smallest scale
    assert torch.equal(ours.scale, of_block * of_matrix)
    assert (of_block.max(), of_block[2, 0]) == (448.0, 2.0**-9)
    units = weight_OI / ours.scale.repeat_interleave(16, -1)
    assert torch.equal(ours.codes, float_codes(units, FLOATS["e2m1"]))
    assert ours.storage_bits(99) == 24 * 64 * 4 + 24 * 4 * 8 + 32


def test_nvfp4_keeps_a_small_block_beside_a_large_one() -> None:
    weight_OI = torch.ones(1, 32)
    weight_OI[0, 16:] = 2.0**-18
    ours = nvfp4(weight_OI, "w")
    # The small block's scale would be 2^-18 / 6 / t = 2^-18 * 448 = 2^-9.2, which E4M3 holds as 2^-9.
    step = 2.0**-9 / (6 * 448)
    assert ours.scale[0, 1] == pytest.approx(step, rel=2.0**-22)
    assert ours.dequantize()[0, 16:].tolist() == pytest.approx([2.0**-18] * 16, abs=step)
    weight_OI[0, 16:] = 2.0**-21
    # Now the scale would round to 0: 2^-21 is 0.66 of the smallest one, which code 0.5 stands for.
    assert (nvfp4(weight_OI, "w").codes[0, 16:] == 1).all()


@pytest.mark.parametrize("magnitude", [1e-45, 1e-41, 1e-38, 1e-36])
def test_nvfp4_scales_of_tiny_matrices_are_exact(magnitude: float) -> None:
    scale = nvfp4(normal(6) * magnitude, "w").scale
    # The matrix's own scale is held at 2^-126, and E4M3 numbers are multiples of 2^-9, as 2^-126 is of 2^-149.
    of_block = scale.double() / 2.0**-126
    assert torch.equal(of_block, of_block.to(torch.float8_e4m3fn).double()) and (of_block >= 2.0**-9).all()


@pytest.mark.parametrize("magnitude", [1e-45, 1e-38, 1e-34, 1.0, 1e38, 3.4e38])
def test_nvfp4_is_finite_and_within_a_step(magnitude: float) -> None:
    weight_OI = (normal(4).clamp(-3, 3) / 3) * magnitude
    real = nvfp4(weight_OI, "w").dequantize()
    # E2M1: half the gap of 4 and 6 is one sixth of the largest. E4M3 rounds a scale by 2^-4 at most, or by 2^-10 of
    # the smallest normal; a scale rounded down loses as much again where the largest weight saturates.
    bound = weight_OI.abs().amax() * (1 / 6 + 2.0**-4) * 1.0001 + 6 * 448 * 2.0**-126 * 2.0**-9
    assert real.isfinite().all() and ((real - weight_OI).abs() <= bound).all()


@pytest.mark.parametrize("name", FORMATS)
def test_a_matrix_of_zeros_stays_zeros(name: str) -> None:
    ours = FORMATS[name](torch.zeros(4, 64), "w", scale_dtype=torch.float16)
    assert torch.equal(ours.dequantize(), torch.zeros(4, 64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_weights_of_any_dtype_are_taken_at_their_value(name: str, dtype: torch.dtype) -> None:
    weight_OI = normal(5).to(dtype)
    short = FORMATS[name](weight_OI, "w", scale_dtype=torch.float32)
    wide = FORMATS[name](weight_OI.float(), "w", scale_dtype=torch.float32)
    assert torch.equal(short.codes, wide.codes) and torch.equal(short.scale, wide.scale)
