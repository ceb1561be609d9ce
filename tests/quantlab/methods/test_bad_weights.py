"""Weights that no method may stumble over, and those that every method refuses in a sentence."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from quantlab.calibration.statistics import LinearStats
from quantlab.errors import SchemeError
from quantlab.methods import awq, clip, gptq, hqq, rtn
from quantlab.methods.autoround import tune_layer
from quantlab.methods.config import AutoRoundConfig
from quantlab.methods.solved import Solved
from quantlab.schemes import TensorSpec
from tests.quantlab.methods.matrices import GRIDS, heavy_tailed, inputs_of, name_of, stats_of

Method = Callable[..., list[Solved]]


def autoround(
    weight_OI: Tensor,
    specs: Sequence[TensorSpec],
    stats: LinearStats,
    *,
    scale_dtype: torch.dtype = torch.float32,
) -> list[Solved]:
    """A layer of one linear, under the signature of the others."""
    layer = nn.Sequential(nn.Linear(weight_OI.shape[1], len(weight_OI), bias=False)).requires_grad_(False)
    layer[0].weight.data = weight_OI.clone()
    x_NTI = inputs_of(60, weight_OI.shape[1]).unflatten(0, (6, 10))

    def run(numbers: Sequence[int]) -> Tensor:
        output: Tensor = layer(x_NTI[list(numbers)])
        return output

    config = AutoRoundConfig(num_steps=12, batch_size=4)
    wanted_NTO = run(range(6))
    return [
        tune_layer(layer, {"0": spec}, run, wanted_NTO, config=config, scale_dtype=scale_dtype)["0"]
        for spec in specs
    ]


METHODS: dict[str, Method] = {
    "rtn": rtn.quantize_weights,
    "clip": clip.quantize_weights,
    "wclip": clip.quantize_weights_by_inputs,
    "awq": awq.quantize_weights,
    "hqq": hqq.quantize_weights,
    "gptq": gptq.quantize_weights,
    "autoround": autoround,
}
NEED_STATS = ("wclip", "awq", "gptq")
GRIDS_OF = {name: [spec for spec in GRIDS if name != "hqq" or not spec.symmetric] for name in METHODS}
"""hqq refuses symmetric grids, and `test_hqq` holds it to that."""
CASES = [
    pytest.param(METHODS[name], spec, id=f"{name}-{name_of(spec)}")
    for name, specs in GRIDS_OF.items()
    for spec in specs
]


def cases(*without: str) -> list[object]:
    """Every method on every grid, but for these methods."""
    return [case for case in CASES if str(case.id).split("-")[0] not in without]


@pytest.fixture(scope="module")
def stats() -> LinearStats:
    return stats_of(inputs_of())


def restored(method: Method, weight: Tensor, spec: TensorSpec, stats: LinearStats) -> Tensor:
    (solved,) = method(weight, [spec], stats)
    quantized = solved.quantized
    assert quantized.scale.isfinite().all() and (quantized.scale > 0).all()
    return quantized.dequantize()


@pytest.mark.parametrize(("method", "spec"), CASES)
def test_zeros_stay_zeros(method: Method, spec: TensorSpec, stats: LinearStats) -> None:
    assert (restored(method, torch.zeros(8, 64), spec, stats) == 0).all()


@pytest.mark.parametrize(("method", "spec"), CASES)
def test_a_constant_matrix_keeps_its_value(method: Method, spec: TensorSpec, stats: LinearStats) -> None:
    # One value spans the grid, so that it is one of its points; a mirrored grid has no code at its end but scale's.
    found = restored(method, torch.full((8, 64), 0.3), spec, stats)
    assert ((found - 0.3).abs() <= 4e-7).all()


# Autoround learns all rows together, so no row is as it would be without the outlier: see its own tests.
@pytest.mark.parametrize(("method", "spec"), cases("autoround"))
def test_an_outlier_of_1e38_leaves_everything_finite(
    method: Method, spec: TensorSpec, stats: LinearStats
) -> None:
    weight = heavy_tailed(8)
    weight[2, 3] = 1e38
    found = restored(method, weight, spec, stats)
    assert found.isfinite().all()
    if spec.granularity != "tensor":
        assert torch.equal(found[3], restored(method, heavy_tailed(8), spec, stats)[3])


@pytest.mark.parametrize(("method", "spec"), CASES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(
    method: Method, spec: TensorSpec, bad: float, stats: LinearStats
) -> None:
    weight = heavy_tailed(8)
    # Channel 5 is dead, which excuses nothing.
    weight[2, 5] = weight[5, 1] = bad
    with pytest.raises(
        SchemeError, match=rf"weights must be finite: found {bad} at \[2, 5\] and 1 more.*\(8, 64\)"
    ):
        method(weight, [spec], stats)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_range_that_overflows_is_refused(method: Method, stats: LinearStats) -> None:
    weight = heavy_tailed(8)
    weight[2, 3], weight[2, 4] = 3e38, -3e38
    with pytest.raises(SchemeError, match=r"must fit float32: found magnitudes up to 3e\+38"):
        method(weight, [TensorSpec(4, "channel", symmetric=False)], stats)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_groups_must_divide(method: Method, stats: LinearStats) -> None:
    with pytest.raises(SchemeError, match=r"group_size must divide.*64, group_size=48"):
        method(heavy_tailed(8), [TensorSpec(4, "group", 48, symmetric=False)], stats)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_scales_must_fit_their_dtype(method: Method, stats: LinearStats) -> None:
    with pytest.raises(SchemeError, match=r"scales must fit torch\.float16"):
        method(
            heavy_tailed(8) * 1e7,
            [TensorSpec(4, "channel", symmetric=False)],
            stats,
            scale_dtype=torch.float16,
        )


# gptq and autoround choose others on purpose.
@pytest.mark.parametrize(("method", "spec"), cases("gptq", "autoround"))
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
def test_codes_are_the_nearest_for_scales_as_they_are_stored(
    method: Method, spec: TensorSpec, scale_dtype: torch.dtype, stats: LinearStats
) -> None:
    weight = heavy_tailed(8)
    (solved,) = method(weight, [spec], stats, scale_dtype=scale_dtype)
    quantized = solved.quantized
    assert torch.equal(quantized.scale.to(scale_dtype).float(), quantized.scale)
    groups = quantized.scale.shape[-1]
    steps = weight.unflatten(-1, (groups, -1)) / quantized.scale.unsqueeze(-1)
    zero_point = getattr(quantized, "zero_point", None)
    if zero_point is None:
        nearest = steps.round().flatten(-2)
    elif zero_point.is_floating_point():
        nearest = (steps + zero_point.unsqueeze(-1)).round().flatten(-2)
    else:
        nearest = (steps.round() + zero_point.unsqueeze(-1)).flatten(-2)
    low, high = (
        (-(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1) if spec.symmetric else (0, 2**spec.bits - 1)
    )
    assert torch.equal(quantized.codes.float(), nearest.clamp(low, high))


@pytest.mark.parametrize("name", NEED_STATS)
def test_statistics_are_asked_for(name: str) -> None:
    with pytest.raises(SchemeError, match=rf"{name} needs calibration statistics: found none.*\(24, 64\)"):
        METHODS[name](heavy_tailed(), [TensorSpec(4, "channel")], None)


@pytest.mark.parametrize("name", NEED_STATS)
def test_statistics_of_another_layer_are_refused(name: str) -> None:
    with pytest.raises(SchemeError, match=r"X\^T X of 64 channels for a matrix of shape \(8, 32\)"):
        METHODS[name](heavy_tailed(8, 32), [TensorSpec(4, "channel")], stats_of(inputs_of()))


@pytest.mark.parametrize("name", NEED_STATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    x = inputs_of()
    x[7, 9] = bad
    with pytest.raises(
        SchemeError, match=r"X\^T X must be finite: found NaN or infinity at input channel 9 of 64"
    ):
        METHODS[name](heavy_tailed(), [TensorSpec(4, "channel")], stats_of(x))


@pytest.mark.parametrize("name", NEED_STATS)
def test_a_layer_that_no_token_reached_is_rounded_and_says_so(name: str) -> None:
    weight, spec = heavy_tailed(), TensorSpec(3, "group", 16)
    (solved,) = METHODS[name](weight, [spec], stats_of(torch.zeros(1, 64)))
    assert "every input was 0 in calibration" in solved.note
    assert torch.equal(solved.quantized.codes, rtn.quantize_weight(weight, spec).codes)


@pytest.mark.parametrize("name", NEED_STATS)
def test_fewer_tokens_than_inputs_are_said(name: str) -> None:
    weight, spec = heavy_tailed(), TensorSpec(4, "group", 16)
    few, enough = (METHODS[name](weight, [spec], stats_of(inputs_of(tokens=T)))[0].note for T in (63, 64))
    assert few.startswith(f"{name}: 63 tokens for 64 input channels: rank-deficient")
    assert "rank-deficient" not in enough
