"""HQQ: its norm, its shrinkage and its fit. u = 2^-24 is the unit roundoff of float32."""

import pytest
import torch
from torch import Tensor

from quantlab.errors import SchemeError
from quantlab.methods.config import HqqConfig, MethodConfig
from quantlab.methods.hqq import fit_weight, quantize_weights, shrink
from quantlab.methods.rtn import quantize_weight
from quantlab.schemes import TensorSpec
from tests.quantlab.methods.matrices import GRIDS as ALL_GRIDS
from tests.quantlab.methods.matrices import heavy_tailed, name_of, sums

U = 2.0**-24
GRIDS = [spec for spec in ALL_GRIDS if not spec.symmetric]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def norms(weight: Tensor, found: Tensor, spec: TensorSpec, norm: float = 0.7) -> Tensor:
    return sums((found.double() - weight.double()).abs() ** norm, spec)


@pytest.mark.parametrize("norm", [0.5, 0.7, 1.0])
@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("spec", GRIDS, ids=name_of)
def test_no_group_is_worse_than_rtn_by_its_norm(
    spec: TensorSpec, scale_dtype: torch.dtype, norm: float
) -> None:
    weight = heavy_tailed()
    config = MethodConfig(hqq=HqqConfig(norm=norm))
    (solved,) = quantize_weights(weight, [spec], scale_dtype=scale_dtype, config=config)
    rtn = quantize_weight(weight, spec, scale_dtype=scale_dtype).dequantize()
    ours, theirs = (norms(weight, q, spec, norm) for q in (solved.quantized.dequantize(), rtn))
    # Norms are float32 sums: each within 2 n u, and powers within a few u.
    assert (ours <= theirs * (1 + 4 * weight.numel() * U)).all()
    # One zero point of a whole matrix has little to gain.
    assert spec.bits > 3 or norm < 0.7 or spec.granularity == "tensor" or ours.sum() < 0.99 * theirs.sum()


@pytest.mark.parametrize("spec", GRIDS, ids=name_of)
def test_below_the_threshold_of_shrinkage_the_unit_of_weights_does_not_matter(spec: TensorSpec) -> None:
    small = heavy_tailed() * 2.0**-12
    fitted, other = (fit_weight(weight, spec, HqqConfig()) for weight in (small, small * 2.0**-10))
    assert torch.equal(other.codes, fitted.codes) and torch.equal(other.scale, fitted.scale * 2.0**-10)


@pytest.mark.parametrize("spec", [s for s in GRIDS if s.granularity != "tensor"], ids=name_of)
def test_a_row_is_fitted_as_if_alone(spec: TensorSpec) -> None:
    weight = heavy_tailed()
    together, alone = fit_weight(weight, spec, HqqConfig()), fit_weight(weight[4:5], spec, HqqConfig())
    assert torch.equal(together.codes[4:5], alone.codes)


@pytest.mark.parametrize("spec", GRIDS, ids=name_of)
def test_zero_points_are_real_and_as_they_are_stored(spec: TensorSpec) -> None:
    fitted = fit_weight(heavy_tailed(), spec, HqqConfig(), scale_dtype=torch.float16)
    zero_point = fitted.zero_point
    assert zero_point is not None and zero_point.dtype == torch.float32
    assert torch.equal(zero_point, zero_point.half().float())
    # a matrix may have no better zero point than the first, a whole number
    assert spec.granularity == "tensor" or (zero_point != zero_point.round()).any()
    assert fitted.storage_bits(16) == fitted.codes.numel() * spec.bits + fitted.scale.numel() * 32


@pytest.mark.parametrize("unit", [1.0, 0.01])
def test_the_alternation_is_its_formula_in_float64(unit: float) -> None:
    weight, spec = heavy_tailed() * unit, TensorSpec(4, "channel", symmetric=False)
    rtn, fitted = quantize_weight(weight, spec), fit_weight(weight, spec, HqqConfig())
    assert fitted.zero_point is not None and rtn.zero_point is not None
    real_scale = (weight.amax(1, keepdim=True) - weight.amin(1, keepdim=True)) / 15
    starts = [(rtn.scale, rtn.zero_point), (real_scale, -weight.amin(1, keepdim=True) / real_scale)]
    for row, values in enumerate(weight.double()):
        met = []
        for scales, first in starts:
            scale, zero = scales[row].double(), first[row].double()
            for step in range(21):
                codes = (values / scale + zero).round().clamp(0, 15)
                residual = values - (codes - zero) * scale
                met.append((float(residual.abs().pow(0.7).sum()), float(zero)))
                beta = 10 * 1.01**step
                sparse = residual.sign() * (residual.abs() - residual.abs().pow(-0.3) / beta).clamp(min=0)
                zero = (codes - (values - sparse) / scale).mean()
        # In float32 zero points that are as good to its last place may change places.
        good = [zero for norm, zero in met if norm <= min(met)[0] * (1 + 1e-5)]
        assert any(float(fitted.zero_point[row]) == pytest.approx(zero, rel=1e-5) for zero in good)


def published(weight: Tensor, bits: int, size: int) -> Tensor:
    """What the source's solver leaves in groups of `size`, written anew from its description: the grid is that of the
    smallest and the largest weight, its zero point real from the start, and the last one that was fitted is taken."""
    groups, top = weight.reshape(-1, size), 2**bits - 1
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale, beta, least = (high - low) / top, 10.0, float("inf")
    zero = -low / scale
    for _ in range(20):
        codes = (groups / scale + zero).round().clamp(0, top)
        residual = groups - (codes - zero) * scale
        sparse = residual.sign() * (residual.abs() - residual.abs().pow(-0.3) / beta).clamp(min=0)
        zero = (codes - (groups - sparse) / scale).mean(1, keepdim=True)
        beta, error = beta * 1.01, float(residual.abs().mean())
        if error >= least:
            break
        least = error
    codes = (groups / scale + zero).round().clamp(0, top)
    return ((codes - zero) * scale).reshape(weight.shape)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", ["centred", "shifted", "positive", "negative"])
def test_no_group_is_worse_than_the_source_leaves_it(kind: str, bits: int) -> None:
    """Nor by much in squares, of which a range that holds 0 leaves many times more where all weights have one sign."""
    draw = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    weight = {
        "centred": draw * 0.02,
        "shifted": draw * 0.01 + 0.02,
        "positive": draw.clamp(-3, 3) * 0.002 + 0.04,
        "negative": draw.clamp(-3, 3) * 0.002 - 0.04,
    }[kind]
    spec = TensorSpec(bits, "group", 64, symmetric=False)
    ours = fit_weight(weight, spec, HqqConfig()).dequantize()
    theirs = published(weight, bits, 64)
    by_norm = norms(weight, ours, spec), norms(weight, theirs, spec)
    # Both meet the same zero points; ours compares float32 sums of 64 powers.
    assert (by_norm[0] <= by_norm[1] * (1 + 4 * 64 * U)).all()
    squares = [float((found - weight).double().square().sum()) for found in (ours, theirs)]
    assert squares[0] <= 1.05 * squares[1]
    if kind in ("positive", "negative"):
        rtn = quantize_weight(weight, spec).dequantize()
        assert 8 * squares[0] < float((rtn - weight).double().square().sum())


@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_a_zero_point_that_its_dtype_cannot_hold_is_not_taken(scale_dtype: torch.dtype) -> None:
    """Far from 0 the source's zero point is coarse or infinite as it is stored; RTN's start is then left."""
    far = torch.linspace(0, 1e-4, 64).repeat(3, 1) + torch.tensor([[1.0], [-100.0], [0.0]])
    spec = TensorSpec(4, "channel", symmetric=False)
    fitted = fit_weight(far, spec, HqqConfig(), scale_dtype=scale_dtype)
    assert fitted.zero_point is not None and fitted.zero_point.isfinite().all()
    assert torch.equal(fitted.zero_point, fitted.zero_point.to(scale_dtype).float())
    rtn = quantize_weight(far, spec, scale_dtype=scale_dtype).dequantize()
    assert (norms(far, fitted.dequantize(), spec) <= norms(far, rtn, spec) * (1 + 1e-5)).all()


def test_weights_that_are_all_alike_are_exact() -> None:
    weight = torch.tensor([[0.3], [-7.0], [0.0]]).expand(3, 32)
    assert torch.equal(
        fit_weight(weight, TensorSpec(4, "channel", symmetric=False), HqqConfig()).dequantize(), weight
    )


def test_weights_on_a_grid_stay_on_it() -> None:
    codes = torch.randint(0, 16, (8, 32), generator=torch.Generator().manual_seed(0))
    codes[:, 0], codes[:, 1] = 0, 15
    weight = (codes - 7) * 0.25
    assert torch.equal(
        fit_weight(weight, TensorSpec(4, "channel", symmetric=False), HqqConfig()).dequantize(), weight
    )


def test_a_grid_without_zero_points_has_nothing_to_fit() -> None:
    with pytest.raises(SchemeError, match=r"a symmetric grid has none. Add z, as in w4g64z-hqq"):
        fit_weight(heavy_tailed(), TensorSpec(4, "channel"), HqqConfig())


def test_more_steps_are_never_worse() -> None:
    weight, spec = heavy_tailed(), TensorSpec(3, "group", 16, symmetric=False)
    found = [
        norms(weight, fit_weight(weight, spec, HqqConfig(num_steps=n)).dequantize(), spec) for n in (1, 4, 20)
    ]
    assert (found[1] <= found[0] * (1 + 1e-5)).all() and (found[2] <= found[1] * (1 + 1e-5)).all()
    assert found[2].sum() < found[0].sum()


@pytest.mark.parametrize("norm", [0.5, 0.7, 1.0])
def test_shrinkage_is_its_formula(norm: float) -> None:
    x = torch.tensor([0.0, 1e-30, -0.05, 0.2, -0.3, 0.5, -4.0])
    expected = [
        0.0 if v == 0 else (1 if v > 0 else -1) * max(0.0, abs(v) - abs(v) ** (norm - 1) / 10)
        for v in x.tolist()
    ]
    assert torch.allclose(shrink(x, 10.0, norm), torch.tensor(expected), rtol=1e-6, atol=0)


def test_shrinkage_at_norm_1_is_the_minimizer() -> None:
    x = torch.linspace(-1, 1, 21)
    grid = torch.linspace(-1.2, 1.2, 24001).unsqueeze(-1)
    best = grid[(grid.abs() + 10 / 2 * (grid - x).square()).argmin(0)].squeeze(-1)
    assert (shrink(x, 10.0, 1.0) - best).abs().max() <= 1e-4 + 4 * U
