"""Layer by layer: what each layer's codes are found on."""

from contextlib import nullcontext

import pytest
import torch

from quantlab.calibration.calibrator import Calibrator
from quantlab.config import QuantizeConfig
from quantlab.errors import CalibrationError, SchemeError
from quantlab.layers.linear import QuantLinear
from quantlab.methods.config import AutoRoundConfig, MethodConfig
from quantlab.methods.gptq import quantize_weights
from quantlab.quantize import quantized
from quantlab.schemes import Scheme
from tests.quantlab.whole_models import calibrator, ids, model_of, run, same, state_of


def test_sequential_calibration_sees_quantized_inputs() -> None:
    model, codes = model_of(), {}
    for hessian in ("shared", "sequential"):
        config = QuantizeConfig(methods=MethodConfig(hessian=hessian))
        state = state_of(model)
        with quantized(model, Scheme.parse("w3-gptq"), config, calibrator=calibrator()):
            codes[hessian] = [m.weight.clone() for m in model.modules() if isinstance(m, QuantLinear)]
        assert same(state_of(model), state)
    first, second = codes["shared"], codes["sequential"]
    # Queries, keys and values of the first layer see the same inputs either way; no linear of the second does.
    assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first[7:], second[7:], strict=True))


def test_sequential_is_gptq_on_those_inputs() -> None:
    """The second layer's codes by hand: statistics of its inputs behind a first layer with quantized weights."""
    model = model_of()
    config = QuantizeConfig(methods=MethodConfig(hessian="sequential"))
    name = "model.layers.1.self_attn.q_proj"
    with quantized(model, Scheme.parse("w3-gptq"), config, calibrator=calibrator()):
        found = model.get_submodule(name).weight.clone()
        first = {
            n: m.weight.clone() for n, m in model.named_modules() if isinstance(m, QuantLinear) and ".0." in n
        }
    state = state_of(model)[1]
    for each, weight in first.items():
        model.get_submodule(each).weight.data.copy_(weight)
    stats = Calibrator(ids(6)).linears(model)[name]
    weight = state[f"{name}.weight"]
    (solved,) = quantize_weights(weight, [Scheme.parse("w3").weights], stats)  # type: ignore[list-item]
    # another batching of the same float32 sums may tip a code
    assert (solved.quantized.dequantize() != found).float().mean() < 0.01


def test_learned_rounding_sees_the_inputs_that_a_rotated_linear_sees() -> None:
    model = model_of()
    config = QuantizeConfig(methods=MethodConfig(autoround=AutoRoundConfig(num_steps=30, batch_size=4)))
    before = run(model, ids(6))
    errors = []
    for name in ("w4-rotate", "w4-autoround-rotate"):
        with quantized(model, Scheme.parse(name), config, calibrator=calibrator()):
            errors.append(float((run(model, ids(6)) - before).norm() / before.norm()))
    assert errors[1] < errors[0]
    assert all(parameter.grad is None for parameter in model.parameters())


OUTLIERS = [
    # one weight, and whether its layer gives finite outputs
    ("1.mlp.up_proj", 1e38, None),
    ("0.mlp.up_proj", 1e38, None),
    ("0.self_attn.v_proj", 3e38, r"output of every layer must be finite .*: that of model\.layers\.0 holds"),
    (
        "1.mlp.up_proj",
        float("nan"),
        r"weights must be finite.*: model\.layers\.1\.mlp\.up_proj\.weight holds 1 NaN",
    ),
    (
        "0.input_layernorm",
        float("inf"),
        r"weights must be finite.*: model\.layers\.0\.input_layernorm\.weight holds 1",
    ),
]


@pytest.mark.parametrize("name", ["w4g32-autoround", "w4g32z-autoround"])
@pytest.mark.parametrize(("place", "value", "message"), OUTLIERS)
def test_learned_rounding_names_what_is_not_finite_and_takes_what_is(
    name: str, place: str, value: float, message: str | None
) -> None:
    model = model_of()
    model.get_submodule(f"model.layers.{place}").weight.data.view(-1)[3] = value
    config = QuantizeConfig(methods=MethodConfig(autoround=AutoRoundConfig(num_steps=12, batch_size=3)))
    refused = pytest.raises((SchemeError, CalibrationError), match=message) if message else nullcontext()
    with refused, quantized(model, Scheme.parse(name), config, calibrator=calibrator()):
        weights = [m.weight for m in model.modules() if isinstance(m, QuantLinear)]
        assert all(bool(weight.isfinite().all()) for weight in weights)
