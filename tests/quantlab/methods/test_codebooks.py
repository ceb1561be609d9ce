"""nf4 and fp4: the codes of bitsandbytes, bit for bit, and errors in sentences."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quantlab.errors import CheckpointError, SchemeError
from quantlab.methods.codebooks import fp4, nf4
from quantlab.methods.formats import FORMATS, quantize_format
from quantlab.numerics.block import BLOCK_TYPES
from quantlab.numerics.codebook import CodebookTensor
from quantlab.numerics.tables import FP4, NF4
from quantlab.schemes import WeightFormat
from tests.quantlab.bnb import load

QUANTIZERS = {"nf4": nf4, "fp4": fp4}


def normal(seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(48, 192, generator=torch.Generator().manual_seed(seed)) * scale


def uniform() -> Tensor:
    return torch.rand(48, 192, generator=torch.Generator().manual_seed(1)) * 2 - 1


def with_zero_blocks() -> Tensor:
    weight = normal(2)
    weight[3] = 0.0
    weight[5, 64:128] = 0.0
    weight[6, 64:127] = -0.0
    return weight


def near_midpoints(scale: float) -> Tensor:
    """Every midpoint of both tables and its float32 neighbours, in blocks whose largest magnitude is `scale`."""
    values = torch.cat([NF4, FP4]).sort().values
    middles = torch.cat([(table.sort().values[:-1] + table.sort().values[1:]) / 2 for table in (NF4, FP4)])
    points = torch.cat([values, middles]) * scale
    inf = torch.tensor(float("inf"))
    points = torch.cat([points, points.nextafter(inf), points.nextafter(-inf)])
    points = points[points.abs() <= scale]
    blocks = points[: len(points) // 63 * 63].view(-1, 63)
    return torch.cat([torch.full((len(blocks), 1), scale), blocks], dim=1)


WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "normal": normal,
    "small": lambda: normal(scale=0.02),
    "uniform": uniform,
    "zero blocks": with_zero_blocks,
    "midpoints": lambda: near_midpoints(1.0),
    "midpoints, odd scale": lambda: near_midpoints(0.7391),
    "huge": lambda: normal(3, 1e37),
    "largest": lambda: normal(4).sign() * torch.finfo(torch.float32).max,
    "tiny": lambda: normal(5, 1e-37),
    "subnormal": lambda: normal(6, 1e-41),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_codes_and_scales_are_those_of_bitsandbytes(name: str, weights: str, dtype: torch.dtype) -> None:
    functional = load().functional
    weight_OI = WEIGHTS[weights]().to(dtype)
    if not weight_OI.isfinite().all():
        weight_OI = weight_OI.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    packed, state = functional.quantize_4bit(weight_OI, blocksize=64, quant_type=name)
    ours = QUANTIZERS[name](weight_OI, "w")
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=-1).view(weight_OI.shape)
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.scale.flatten(), state.absmax)
    assert torch.equal(ours.values, state.code)
    assert (
        torch.equal(ours.dequantize(), functional.dequantize_4bit(packed, state).float())
        or dtype != torch.float32
    )


def test_blocks_lie_along_the_input() -> None:
    weight_OI = torch.zeros(2, 128)
    weight_OI[0, 70], weight_OI[1, 3] = -2.0, 0.5
    assert nf4(weight_OI, "w").scale.tolist() == [[0.0, 2.0], [0.5, 0.0]]
    assert torch.equal(nf4(weight_OI, "w").dequantize(), weight_OI)


@pytest.mark.parametrize(("name", "half_gap"), [("nf4", (1.0 - 0.6961928009986877) / 2), ("fp4", 1 / 6)])
def test_error_is_at_most_half_the_widest_gap(name: str, half_gap: float) -> None:
    weight_OI = normal(7)
    ours = QUANTIZERS[name](weight_OI, "w")
    error = (ours.dequantize() - weight_OI).abs().unflatten(-1, (-1, 64))
    # The table, the inverse, the product, the midpoint and the dequantized value are rounded once each.
    bound = ours.scale.unsqueeze(-1) * (half_gap + 5 * 2.0**-24)
    assert (error <= bound).all(), f"worst excess {(error - bound).max():.3e}"


@pytest.mark.parametrize("name", QUANTIZERS)
def test_storage_is_codes_and_float32_scales(name: str) -> None:
    assert QUANTIZERS[name](normal(), "w").storage_bits(16) == 48 * 192 * 4 + 48 * 3 * 32


@pytest.mark.parametrize(
    ("name", "size"),
    [("nf4", 64), ("fp4", 64), ("mxfp4", 32), ("mxfp6", 32), ("mxfp6e3m2", 32), ("nvfp4", 16)],
)
def test_blocks_must_divide_the_inputs(name: str, size: int) -> None:
    place = "model.layers.0.mlp.down_proj"
    found = f"{name} needs in_features in whole blocks of {size}: {place} has in_features=72. .*skip"
    with pytest.raises(SchemeError, match=found):
        quantize_format(torch.ones(4, 72), WeightFormat(name, 4, size), name=place)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", FORMATS)
def test_weights_must_be_finite(name: str, bad: float) -> None:
    weight_OI = normal()
    weight_OI[7, 11] = bad
    with pytest.raises(CheckpointError, match=r"finite: a\.b holds 1 NaN or Inf, the first at \[7, 11\]"):
        FORMATS[name](weight_OI, "a.b", scale_dtype=torch.float32)


@pytest.mark.parametrize("name", [name for name in FORMATS if name.upper() not in BLOCK_TYPES])
def test_every_format_keeps_zero_and_stores_what_it_says(name: str) -> None:
    weight_OI = with_zero_blocks()
    solved = quantize_format(weight_OI, WeightFormat(name, 4))
    quantized = solved.quantized
    assert isinstance(quantized, CodebookTensor) and solved.note == ""
    assert quantized.codes.dtype == torch.uint8 and quantized.codes.shape == weight_OI.shape
    assert quantized.scale.dtype == quantized.values.dtype == torch.float32
    assert int(quantized.codes.max()) < len(quantized.values) == 2**quantized.bits
    assert (quantized.dequantize()[weight_OI == 0] == 0).all()
