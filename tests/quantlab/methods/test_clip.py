"""Clip search against RTN and against a search by hand in float64.

u = 2^-24 is the unit roundoff of float32; a sum of n squares has a relative error below 2 n u.
"""

import pytest
import torch
from torch import Tensor

from quantlab.methods.clip import clip_weight, quantize_weights, quantize_weights_by_inputs
from quantlab.methods.rtn import quantize_weight
from quantlab.numerics.qtype import QType
from quantlab.numerics.ranges import search_clip
from quantlab.schemes import TensorSpec
from tests.quantlab.methods.matrices import GRIDS, heavy_tailed, inputs_of, name_of, stats_of, sums

U = 2.0**-24
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def weighted_error(weight: Tensor, found: Tensor, spec: TensorSpec, moments_I: Tensor | float) -> Tensor:
    return sums((found.double() - weight.double()).square() * moments_I, spec)


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("spec", GRIDS, ids=name_of)
def test_no_group_is_worse_than_rtn_by_its_own_measure(spec: TensorSpec, scale_dtype: torch.dtype) -> None:
    weight, stats = heavy_tailed(), stats_of(inputs_of())
    rtn = quantize_weight(weight, spec, scale_dtype=scale_dtype).dequantize()
    moments = stats.gram_II.diagonal()
    (plain,) = quantize_weights(weight, [spec], scale_dtype=scale_dtype)
    (weighted,) = quantize_weights_by_inputs(weight, [spec], stats, scale_dtype=scale_dtype)
    for solved, importance in ((plain, 1.0), (weighted, moments)):
        ours = weighted_error(weight, solved.quantized.dequantize(), spec, importance)
        theirs = weighted_error(weight, rtn, spec, importance)
        # Candidates are compared in float32, each within 2 n u of its true error.
        assert (ours <= theirs * (1 + 4 * weight.numel() * U)).all()
        # A heavy tail is not worth its steps where there are few of them.
        assert spec.bits > 3 or ours.sum() < 0.95 * theirs.sum()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_range_is_the_best_of_64(symmetric: bool, weighted: bool) -> None:
    weight, spec = heavy_tailed(6), TensorSpec(3, "group", 16, symmetric)
    moments = stats_of(inputs_of()).gram_II.diagonal() if weighted else torch.ones(64, dtype=torch.float64)
    found = clip_weight(weight, spec, moments.float() if weighted else None).dequantize()
    for row in range(6):
        for start in range(0, 64, 16):
            w, h = (values[start : start + 16].double() for values in (weight[row], moments))
            low, high = (-w.abs().max(), w.abs().max()) if symmetric else (min(w.min(), 0), max(w.max(), 0))
            errors = []
            for factor in torch.linspace(1, 0.2, 64).tolist():
                scale = high * factor / 3 if symmetric else (high - low) * factor / 7
                zero, ends = (0, (-4, 3)) if symmetric else ((-low * factor / scale).round(), (0, 7))
                codes = ((w / scale).round() + zero).clamp(*ends)
                errors.append(float(((codes - zero) * scale - w).square() @ h))
            mine = float((found[row, start : start + 16] - w).square() @ h)
            # float32 moves a code across the middle of two only where both cost the same.
            assert mine == pytest.approx(min(errors), rel=1e-5)


def test_equal_moments_weigh_nothing() -> None:
    weight = heavy_tailed()
    for spec in GRIDS:
        alike = clip_weight(weight, spec, torch.full((64,), 4.0))
        assert torch.equal(alike.codes, clip_weight(weight, spec).codes)


def test_only_the_proportions_of_moments_matter() -> None:
    weight, x = heavy_tailed(), inputs_of()
    (once,) = quantize_weights_by_inputs(weight, [TensorSpec(3, "group", 16)], stats_of(x))
    # 1e25 squared and summed overflows float32, in which the search runs.
    (huge,) = quantize_weights_by_inputs(weight, [TensorSpec(3, "group", 16)], stats_of(x.double() * 2.0**80))
    assert torch.equal(once.quantized.codes, huge.quantized.codes)


def test_ties_keep_the_wider_range() -> None:
    x = torch.tensor([[1.0, -2.0, 4.0]])
    low, high = search_clip(x, (-1,), QType(4), lambda residual: residual.sum(-1, keepdim=True) * 0)
    assert (low, high) == (-4, 4)


def test_errors_beyond_float32_keep_the_full_range() -> None:
    weight = torch.tensor([[1e38, 2e37, -3e37, 4e36]])
    spec = TensorSpec(3, "channel")
    assert torch.equal(clip_weight(weight, spec).scale, quantize_weight(weight, spec).scale)
