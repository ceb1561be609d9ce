"""AWQ: errors from X^T X against errors of outputs, the search, and clipping by output error.

u = 2^-24 is the unit roundoff of float32.
"""

import pytest
import torch
from torch import Tensor

from quantlab.methods import awq
from quantlab.methods.config import AwqConfig, MethodConfig
from quantlab.methods.rtn import quantize_weight
from quantlab.schemes import TensorSpec
from tests.quantlab.methods.matrices import GRIDS, heavy_tailed, inputs_of, name_of, stats_of

U = 2.0**-24
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def restored(weight: Tensor, spec: TensorSpec, scales_I: Tensor, scale_dtype: torch.dtype) -> Tensor:
    return quantize_weight(weight * scales_I, spec, scale_dtype=scale_dtype).dequantize() / scales_I


def output_error(x_TI: Tensor, weight: Tensor, found: Tensor) -> float:
    return float((x_TI.double() @ (found.double() - weight.double()).T).square().sum())


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("spec", GRIDS, ids=name_of)
def test_errors_are_those_of_outputs_on_the_calibration_text(
    spec: TensorSpec, scale_dtype: torch.dtype
) -> None:
    weights, x = [heavy_tailed(), heavy_tailed(8, seed=3)], inputs_of()
    gram_II = stats_of(x).gram_II
    candidates = awq.candidate_scales(weights, spec, gram_II, 5)
    found = awq.output_errors(weights, spec, gram_II, candidates, scale_dtype=scale_dtype)
    for scales, error in zip(candidates, found, strict=True):
        direct = sum(
            output_error(x, weight, restored(weight, spec, scales, scale_dtype)) for weight in weights
        )
        # The residual is the same float32 difference on both sides up to one rounding; the products are float64.
        assert error == pytest.approx(direct, rel=1e-4)


def test_float32_products_lose_only_rounding() -> None:
    weight, spec, gram_II = heavy_tailed(), TensorSpec(4, "group", 16), stats_of(inputs_of()).gram_II
    candidates = awq.candidate_scales([weight], spec, gram_II, 20)
    exact = awq.output_errors([weight], spec, gram_II, candidates)
    single = awq.output_errors([weight], spec, gram_II.float(), candidates)
    residuals = [(restored(weight, spec, s, torch.float32) - weight).abs().double() for s in candidates]
    for one, other, residual in zip(exact, single, residuals, strict=True):
        # Each output of I products is within (I + 2) u of the sum of its magnitudes.
        assert abs(one - other) <= 66 * U * float((residual @ gram_II.abs() * residual).sum())


def test_the_grid_is_powers_of_rms_and_of_relative_weights() -> None:
    weights, x, spec = [heavy_tailed(), heavy_tailed(8, seed=3)], inputs_of(), TensorSpec(4, "group", 16)
    candidates = awq.candidate_scales(weights, spec, stats_of(x).gram_II, 20)
    rms = x.double().square().mean(0).sqrt()
    groups = torch.cat(weights).double().abs().unflatten(-1, (4, 16))
    relative = (groups / groups.amax(-1, keepdim=True)).flatten(-2).mean(0)
    live = rms > 0
    assert candidates.shape == (40, 64) and (candidates[0] == 1).all()
    for i, scales in enumerate(candidates.double()):
        alpha = i % 20 / 20
        expected = rms**alpha if i < 20 else rms**alpha / relative ** (1 - alpha)
        ratio = scales[live] / expected[live]
        assert (ratio / ratio[0] - 1).abs().max() < 1e-5
        assert float(scales.max() * scales.min()) == pytest.approx(1, rel=1e-6)


def test_a_dead_channel_bounds_no_scale() -> None:
    weight = heavy_tailed()
    weight[:, 9] = 0.0
    candidates = awq.candidate_scales([weight], TensorSpec(4, "channel"), stats_of(inputs_of()).gram_II, 20)
    assert candidates.min() >= 0.0099 and candidates.max() <= 101


@pytest.mark.parametrize("spec", GRIDS, ids=name_of)
def test_scales_are_the_best_of_the_grid_and_never_worse_than_none(spec: TensorSpec) -> None:
    weights, stats = [heavy_tailed(), heavy_tailed(8, seed=3)], stats_of(inputs_of())
    scales = awq.search_scales(weights, spec, stats)
    candidates = awq.candidate_scales(weights, spec, stats.gram_II, 20)
    errors = awq.output_errors(weights, spec, stats.gram_II, candidates)
    (mine,) = awq.output_errors(weights, spec, stats.gram_II, scales.unsqueeze(0))
    assert mine <= min(errors) * (1 + 1e-5) and mine <= errors[0]
    # These inputs are worth scaling on every grid.
    assert mine < 0.9 * errors[0]


def test_scales_are_the_best_for_grids_as_they_are_stored() -> None:
    weight, stats, spec = heavy_tailed(8, seed=5), stats_of(inputs_of()), TensorSpec(8, "channel")
    candidates = awq.candidate_scales([weight], spec, stats.gram_II, 20)
    best = []
    for dtype in (torch.float32, torch.bfloat16):
        scales = awq.search_scales([weight], spec, stats, scale_dtype=dtype)
        errors = awq.output_errors([weight], spec, stats.gram_II, candidates, scale_dtype=dtype)
        (mine,) = awq.output_errors([weight], spec, stats.gram_II, scales.unsqueeze(0), scale_dtype=dtype)
        assert mine <= min(errors) * (1 + 1e-5)
        best.append(errors.index(min(errors)))
    assert best[0] != best[1], "the case must tell the two apart"


def test_a_salient_channel_is_scaled_up() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 64, generator=generator)
    x[:, 7] *= 30
    scales = awq.search_scales(
        [torch.randn(32, 64, generator=generator)], TensorSpec(3, "group", 16), stats_of(x)
    )
    assert int(scales.argmax()) == 7 and scales[7] > 2 * scales.median()


def test_alike_inputs_leave_only_the_weights_to_go_by() -> None:
    weight, spec = heavy_tailed(), TensorSpec(3, "group", 16)
    candidates = awq.candidate_scales([weight], spec, torch.eye(64) * 4, 20)
    assert (candidates[:20] == 1).all() and not (candidates[20:39] == 1).all()


def test_no_token_means_no_scales() -> None:
    scales = awq.search_scales([heavy_tailed()], TensorSpec(3, "group", 16), stats_of(torch.zeros(1, 64)))
    assert torch.equal(scales, torch.ones(64))


def test_the_number_of_steps_is_a_setting() -> None:
    weight, spec, stats = heavy_tailed(), TensorSpec(3, "group", 16), stats_of(inputs_of())
    config = MethodConfig(awq=AwqConfig(num_steps=2))
    scales = awq.search_scales([weight], spec, stats, config=config)
    four = awq.candidate_scales([weight], spec, stats.gram_II, 2)
    assert any(torch.allclose(scales, one) for one in four)
    assert not torch.allclose(scales, awq.search_scales([weight], spec, stats))


def test_blocks_of_the_triangle_make_the_whole() -> None:
    weight, x, spec = heavy_tailed(4, 600), inputs_of(50, 600), TensorSpec(4, "channel")
    (found,) = awq.output_errors([weight], spec, stats_of(x).gram_II, torch.ones(1, 600))
    assert found == pytest.approx(
        output_error(x, weight, quantize_weight(weight, spec).dequantize()), rel=1e-6
    )


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("spec", GRIDS, ids=name_of)
def test_clipping_lowers_the_output_error_of_each_group(spec: TensorSpec, scale_dtype: torch.dtype) -> None:
    weight, x = heavy_tailed(), inputs_of()
    (solved,) = awq.quantize_weights(weight, [spec], stats_of(x), scale_dtype=scale_dtype)
    rtn = quantize_weight(weight, spec, scale_dtype=scale_dtype).dequantize()

    def errors(found: Tensor) -> Tensor:
        residual_OI = found.double() - weight.double()
        size = spec.group_size or 64
        outputs_TOG = torch.einsum(
            "tgi,ogi->tog", x.double().unflatten(-1, (-1, size)), residual_OI.unflatten(-1, (-1, size))
        )
        squares_OG = outputs_TOG.square().sum(0)
        return squares_OG.sum() if spec.granularity == "tensor" else squares_OG

    ours, theirs = errors(solved.quantized.dequantize()), errors(rtn)
    assert (ours <= theirs + 1e-5 * theirs.mean()).all()
    assert spec.bits > 3 or ours.sum() < 0.95 * theirs.sum()


def test_clipping_can_be_left_out() -> None:
    weight, spec = heavy_tailed(), TensorSpec(3, "group", 16)
    config = MethodConfig(awq=AwqConfig(clip=False))
    (solved,) = awq.quantize_weights(weight, [spec], stats_of(inputs_of()), config=config)
    assert torch.equal(solved.quantized.codes, quantize_weight(weight, spec).codes)


def test_divided_statistics_are_those_of_divided_inputs() -> None:
    x, scales = inputs_of(), torch.rand(64, generator=torch.Generator().manual_seed(2)) + 0.5
    divided, direct = stats_of(x).divided(scales), stats_of(x / scales)
    assert divided.gram_II.dtype == torch.float64 and divided.num_tokens == 200
    for name in ("gram_II", "minimum_I", "maximum_I", "mean_I"):
        ours, theirs = getattr(divided, name), getattr(direct, name)
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max())), name


def test_scaled_and_clipped_beats_rtn_at_the_output() -> None:
    weight, x, spec = heavy_tailed(), inputs_of(), TensorSpec(3, "group", 16)
    stats = stats_of(x)
    scales = awq.search_scales([weight], spec, stats)
    (solved,) = awq.quantize_weights(weight * scales, [spec], stats.divided(scales))
    ours = output_error(x, weight, solved.quantized.dequantize() / scales)
    assert ours < 0.5 * output_error(x, weight, quantize_weight(weight, spec).dequantize())
