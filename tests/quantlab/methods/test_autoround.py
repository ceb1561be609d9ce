"""AutoRound: never worse than round to nearest on its own objective, on the grid, and gone afterwards."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from quantlab.errors import SchemeError
from quantlab.methods.autoround import _Learner, tune_layer
from quantlab.methods.config import AutoRoundConfig
from quantlab.methods.rtn import quantize_weight
from quantlab.schemes import Scheme, TensorSpec

CONFIG = AutoRoundConfig(num_steps=60, batch_size=4)


class Layer(nn.Module):
    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32, bias=False)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = x + self.down(torch.relu(self.up(x)))
        return output


@pytest.fixture
def layer() -> Layer:
    return Layer(torch.Generator().manual_seed(0))


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(12, 10, 32, generator=torch.Generator().manual_seed(1))


def spec_of(name: str) -> TensorSpec:
    spec = Scheme.parse(name).weights
    assert isinstance(spec, TensorSpec)
    return spec


def tuned(layer: Layer, inputs: Tensor, name: str, config: AutoRoundConfig = CONFIG) -> dict[str, Tensor]:
    def run(numbers: Sequence[int]) -> Tensor:
        output: Tensor = layer(inputs[list(numbers)])
        return output

    specs = {"up": spec_of(name), "down": spec_of(name)}
    solved = tune_layer(layer, specs, run, layer(inputs), config=config)
    return {each: result.quantized.dequantize() for each, result in solved.items()}


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_end_of_the_range_that_is_held_at_zero_learns_nothing(sign: float) -> None:
    """Where all weights have one sign the stored range goes from 0 to the other end, and so do its gradients."""
    linear = nn.Linear(32, 8, bias=False)
    linear.weight.data = sign * (torch.rand(8, 32, generator=torch.Generator().manual_seed(0)) + 1)
    learner = _Learner(linear, spec_of("w4z"), torch.float32)
    scale, zero_point = learner.grid()
    assert zero_point is not None and bool((zero_point == (0 if sign > 0 else 15)).all())
    held, moved = torch.autograd.grad(scale.sum(), list(learner.factors)[:: int(sign)])
    assert not held.any() and torch.allclose(moved, scale.detach())


def error(layer: Layer, inputs: Tensor, weights: dict[str, Tensor]) -> float:
    hidden = torch.relu(nn.functional.linear(inputs, weights["up"], layer.up.bias))
    return float((inputs + nn.functional.linear(hidden, weights["down"]) - layer(inputs)).square().mean())


@pytest.mark.parametrize("name", ["w4", "w3g16", "w2g32z", "w3t", "w4z"])
def test_the_error_falls_below_that_of_round_to_nearest(name: str, layer: Layer, inputs: Tensor) -> None:
    nearest = {
        each: quantize_weight(layer.get_submodule(each).weight, spec_of(name)).dequantize()  # type: ignore[arg-type]
        for each in ("up", "down")
    }
    found = tuned(layer, inputs, name)
    # all 12 sequences are compared, so what is kept is better on just these
    assert error(layer, inputs, found) < 0.9 * error(layer, inputs, nearest)


def test_steps_that_leap_too_far_leave_the_best_codes_that_were_seen(layer: Layer, inputs: Tensor) -> None:
    wild = CONFIG.model_copy(update={"learning_rate": 1.0, "num_steps": 11})
    found = tuned(layer, inputs, "w4g16", wild)
    nearest = {
        each: quantize_weight(layer.get_submodule(each).weight, spec_of("w4g16")).dequantize()  # type: ignore[arg-type]
        for each in ("up", "down")
    }
    assert error(layer, inputs, found) <= error(layer, inputs, nearest) * (1 + 1e-5)


def test_codes_are_on_the_grid_and_the_layer_is_as_before(layer: Layer, inputs: Tensor) -> None:
    modules, weights = dict(layer.named_modules()), {k: v.clone() for k, v in layer.state_dict().items()}
    solved = tune_layer(
        layer,
        {"up": spec_of("w3g16z")},
        lambda n: layer(inputs[list(n)]),
        layer(inputs),
        config=CONFIG,
        scale_dtype=torch.float16,
    )["up"]
    codes = solved.quantized.codes
    assert codes.dtype == torch.uint8 and int(codes.max()) <= 7 and solved.quantized.scale.shape == (64, 2)
    assert torch.equal(solved.quantized.scale, solved.quantized.scale.half().float())
    assert solved.note.startswith("autoround: output error 0.")
    assert dict(layer.named_modules()) == modules
    assert all(torch.equal(value, weights[key]) for key, value in layer.state_dict().items())


def test_the_same_seed_gives_the_same_codes(layer: Layer, inputs: Tensor) -> None:
    torch.manual_seed(3)
    first = tuned(layer, inputs, "w3")
    state = torch.random.get_rng_state()
    second = tuned(layer, inputs, "w3")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(state, torch.random.get_rng_state())
    other = tuned(layer, inputs, "w3", CONFIG.model_copy(update={"seed": 1}))
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_outputs_that_are_not_finite_are_refused(layer: Layer, inputs: Tensor) -> None:
    inputs[3, 2, 1] = torch.inf
    # the residual, and what every channel of the linears reads of it
    with pytest.raises(
        SchemeError,
        match="must be finite to learn its rounding: that of layer holds 32 NaN or Inf among 3840",
    ):
        tuned(layer, inputs, "w4")


def test_outputs_that_rounding_makes_infinite_are_refused(layer: Layer, inputs: Tensor) -> None:
    with pytest.raises(SchemeError, match=r"that of h\.1 is not with its weights rounded to nearest"):
        tune_layer(
            layer,
            {"down": spec_of("w4")},
            lambda numbers: torch.full_like(inputs[list(numbers)], torch.inf),
            inputs,
            config=CONFIG,
            name="h.1",
        )


def test_finite_outputs_whose_squares_overflow_are_taken_and_never_get_worse(
    layer: Layer, inputs: Tensor
) -> None:
    layer.down.weight.data[3, 4] = 1e38
    inputs[..., 4] = 0.01
    layer.up.bias.data[4] = 0.02
    assert bool(layer(inputs).isfinite().all()) and float(layer(inputs).abs().max()) > 1e36
    found = tuned(layer, inputs, "w4")
    assert all(bool(weight.isfinite().all()) for weight in found.values())
    nearest = {
        each: quantize_weight(layer.get_submodule(each).weight, spec_of("w4")).dequantize()  # type: ignore[arg-type]
        for each in ("up", "down")
    }
    wide, large = layer.double(), inputs.double()
    errors = [error(wide, large, {k: w.double() for k, w in each.items()}) for each in (found, nearest)]
    assert errors[0] <= errors[1]


def test_a_matrix_that_is_refused_is_named(layer: Layer, inputs: Tensor) -> None:
    layer.down.weight.data[1, 2] = torch.nan
    with pytest.raises(SchemeError, match="weights must be finite") as caught:
        tune_layer(layer, {"down": spec_of("w4")}, lambda numbers: inputs, inputs, config=CONFIG, name="h.1")
    assert caught.value.__notes__ == ["in h.1.down"]
