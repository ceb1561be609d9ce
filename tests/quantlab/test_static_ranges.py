"""Static ranges: from extremes of channels to scales, and linears that use them."""

import pytest
import torch
from torch import nn

from quantlab.errors import CalibrationError
from quantlab.kernels.reference import fake_quantize_inputs
from quantlab.layers.linear import QuantLinear
from quantlab.methods.rtn import quantize_weight
from quantlab.numerics.static import static_range
from quantlab.schemes import Scheme, TensorSpec

MINIMUM = torch.tensor([[-1.0, 0.5, -3.0], [0.0, -8.0, 2.0]])
MAXIMUM = torch.tensor([[2.0, 0.75, -1.0], [4.0, 1.0, 16.0]])


def spec_of(name: str) -> TensorSpec:
    scheme = Scheme.parse(name)
    spec = scheme.activations or scheme.key
    assert spec is not None
    return spec


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("a8ts", [[-3.0]], [[3.0]]),
        ("a8tzs", [[-3.0]], [[2.0]]),
        ("a8cs", [[-2.0, -0.75, -3.0]], [[2.0, 0.75, 3.0]]),
        ("a8czs", [[-1.0, 0.5, -3.0]], [[2.0, 0.75, -1.0]]),
    ],
)
def test_ranges_of_inputs(name: str, low: list[list[float]], high: list[list[float]]) -> None:
    found = static_range(spec_of(name), MINIMUM[0], MAXIMUM[0])
    assert torch.equal(found[0], torch.tensor(low))
    assert torch.equal(found[1], torch.tensor(high))


@pytest.mark.parametrize(
    ("name", "high"),
    [
        ("k8ts", [[[16.0]]]),
        ("k8hs", [[[3.0]], [[16.0]]]),
        ("k8cs", [[[2.0, 0.75, 3.0]], [[4.0, 8.0, 16.0]]]),
    ],
)
def test_ranges_of_heads(name: str, high: list[list[list[float]]]) -> None:
    found = static_range(spec_of(name), MINIMUM, MAXIMUM)
    assert torch.equal(found[1], torch.tensor(high))
    assert torch.equal(found[0], -found[1])


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_range_that_calibration_did_not_find_is_refused(bad: float) -> None:
    broken = MAXIMUM.clone()
    broken[0, 1] = bad
    with pytest.raises(
        CalibrationError, match=r"static range must be finite.*Calibrate on text that reaches"
    ):
        static_range(spec_of("k8ts"), MINIMUM, broken)


def linear_and_inputs() -> tuple[nn.Linear, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(32, 24)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return linear, torch.randn(2, 5, 32, generator=generator) * 3


@pytest.mark.parametrize("name", ["w8a8ts", "w4a4ts", "w8a8tzs", "w8za8tzs"])
def test_a_given_scale_runs_as_an_integer_product(name: str) -> None:
    """Integers against float arithmetic on the same codes: float32 rounding of 32 products and a bias."""
    scheme, (linear, x) = Scheme.parse(name), linear_and_inputs()
    assert isinstance(scheme.weights, TensorSpec)
    assert scheme.activations is not None
    fixed = static_range(scheme.activations, torch.full((32,), -2.0), torch.full((32,), 3.0))
    quantized = quantize_weight(linear.weight.detach(), scheme.weights)
    integers, floats = (
        QuantLinear(linear, quantized, scheme.activations, kernel, fixed=fixed)  # type: ignore[arg-type]
        for kernel in ("int8_mm", "simulated")
    )
    expected = floats(x)
    sizes = fake_quantize_inputs(x, scheme.activations, fixed).abs() @ floats.weight.abs().t() + 1
    bound = 34 * torch.finfo(torch.float32).eps * sizes
    assert ((integers(x) - expected).abs() <= bound).all()
    # The range is the given one, so a sequence's values say nothing of another's scale, and a flat batch is taken.
    assert torch.equal(integers(x[0]), integers(x)[0])
    assert not torch.equal(integers(x * 100), integers(x) * 100)


def test_what_lies_beyond_a_static_range_saturates() -> None:
    spec, (_, x) = spec_of("a4cs"), linear_and_inputs()
    high = x.abs().amax((0, 1)) / 2
    out = fake_quantize_inputs(x, spec, static_range(spec, -high, high))
    assert torch.allclose(out.abs().amax((0, 1)), high)
    inside = x.abs() <= high
    assert ((out - x).abs() <= high / 7 / 2 * (1 + 1e-5))[inside].all()
