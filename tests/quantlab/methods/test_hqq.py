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
    for units, scale, first, found in zip(
        (weight / rtn.scale).double(),
        rtn.scale.flatten().double(),
        rtn.zero_point.flatten(),
        fitted.zero_point.flatten(),
        strict=True,
    ):
        zero, met = first.double(), []
        for step in range(21):
            codes = (units + zero).round().clamp(0, 15)
            residual = units - (codes - zero)
            met.append((float(residual.abs().pow(0.7).sum()), float(zero)))
            beta = 10 * 1.01**step
            real = residual * scale
            sparse = real.sign() * (real.abs() - real.abs().pow(-0.3) / beta).clamp(min=0)
            zero = (codes - units + sparse / scale).mean()
        fall = next((k for k in range(1, 21) if met[k][0] >= met[k - 1][0]), 21)
        assert float(found) == pytest.approx(met[fall - 1][1], rel=1e-5)


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
