"""Biases and static scales under `hessian: sequential`: of the inputs that come out of quantized weights."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.hooks import watch
from quantlab.calibration.statistics import LinearStats
from quantlab.config import QuantizeConfig
from quantlab.errors import CalibrationError
from quantlab.layers.linear import QuantLinear
from quantlab.methods.config import AutoRoundConfig, MethodConfig
from quantlab.methods.rtn import quantize_weight
from quantlab.methods.solved import Solved
from quantlab.quantize import prepared, quantize_, quantized
from quantlab.schemes import Scheme, TensorSpec
from quantlab.solutions import SolutionStore
from quantlab.solving.seen import seen_behind_codes
from tests.quantlab.whole_models import calibrator, ids, model_of, run, same, state_of

SEQUENTIAL = QuantizeConfig(
    methods=MethodConfig(hessian="sequential", autoround=AutoRoundConfig(num_steps=5, batch_size=3))
)


def inputs_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """What each quantized linear reads of the calibration text, [tokens, I]."""
    seen: dict[str, Tensor] = {}

    def see(name: str, module: nn.Module, args: tuple[Tensor, ...], output: object) -> None:
        seen[name] = args[0].reshape(-1, args[0].shape[-1])

    with watch(model, list(quant_linears(model)), see):
        run(model, ids(6))
    return seen


def quant_linears(model: nn.Module) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["w2-gptq-bias", "w3-bias", "w3z-hqq-bias", "w3-autoround-bias", "nf4-bias"])
def test_a_bias_makes_up_for_the_mean_error_on_the_inputs_as_run(name: str, family: str) -> None:
    model = model_of(family)
    before = state_of(model)
    weights = {n: m.weight for n, m in model.named_modules() if hasattr(m, "weight")}
    biases = {n: m.bias for n, m in model.named_modules() if getattr(m, "bias", None) is not None}
    with quantized(model, Scheme.parse(name), SEQUENTIAL, calibrator=calibrator()):
        inputs = inputs_of(model)
        for each, linear in quant_linears(model).items():
            whole = weights[each].t() if family == "gpt2" else weights[each]
            expected = (whole.double() - linear.weight.double()) @ inputs[each].double().mean(0)
            assert linear.bias is not None
            found = linear.bias.double() - biases[each].double() if each in biases else linear.bias.double()
            # float32 rounding of the inputs through two layers, summed in batches of another size
            assert (found - expected).norm() <= 1e-4 * expected.norm(), each
    assert same(state_of(model), before)


@pytest.mark.parametrize("name", ["w2a8tzs-gptq", "w2a8tzs", "w2a8tzs-awq"])
def test_a_static_scale_covers_the_inputs_that_come_out_of_quantized_weights(name: str) -> None:
    model, ranges = model_of(), {}
    with quantized(model, Scheme.parse(name), SEQUENTIAL, calibrator=calibrator()):
        for each, linear in quant_linears(model).items():
            assert linear.low is not None and linear.high is not None
            ranges[each] = [float(linear.low), float(linear.high)]
    with quantized(model, Scheme.parse(name.replace("a8tzs", "")), SEQUENTIAL, calibrator=calibrator()):
        for each, x in inputs_of(model).items():
            assert ranges[each] == pytest.approx([float(x.min()), float(x.max())], rel=1e-4), each


def made_of_inputs(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Bias and upper end of the static range of each quantized linear."""
    found = {}
    for name, linear in quant_linears(model).items():
        assert linear.bias is not None and linear.high is not None
        found[name] = (linear.bias, linear.high)
    return found


@pytest.mark.parametrize("name", ["w2a8ts-gptq-bias", "w2a8ts-bias"])
def test_writers_and_kept_solutions_give_the_same_biases(name: str, tmp_path: Path) -> None:
    model, scheme, found = model_of(), Scheme.parse(name), []
    store = SolutionStore(tmp_path, {"checkpoint": "toy"}, (scheme,))
    for _ in range(2):
        with quantized(model, scheme, SEQUENTIAL, calibrator=calibrator(), solutions=store):
            found.append(made_of_inputs(model))
    with prepared(model, scheme, SEQUENTIAL, calibrator=calibrator()) as ready:
        for each, (bias, high) in found[0].items():
            assert torch.equal(bias, found[1][each][0]) and torch.equal(high, found[1][each][1])
            written = ready.bias(each, ready.solve(each))
            assert written is not None and torch.equal(written, bias)
            assert float(ready.stats[each].maximum_I.max()) <= float(high)


def test_shared_statistics_stay_those_of_the_16_bit_model() -> None:
    model, kept = model_of(), calibrator()
    with prepared(model, Scheme.parse("w2a8ts-gptq-bias"), calibrator=kept) as ready:
        assert ready.stats is kept.linears(model)
    with prepared(model, Scheme.parse("a8ts"), SEQUENTIAL, calibrator=kept) as ready:
        assert all(isinstance(stats, LinearStats) for stats in ready.stats.values())


def test_inputs_that_quantized_layers_spoil_are_named() -> None:
    model, spec = model_of(), Scheme.parse("w8").weights
    assert isinstance(spec, TensorSpec)

    def codes(name: str) -> Solved | None:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        return (
            Solved(quantize_weight(weight * 1e30, spec)) if name.endswith(("gate_proj", "up_proj")) else None
        )

    before = state_of(model)
    with pytest.raises(
        CalibrationError, match=r"finite: the input of model\.layers\.0\.mlp\.down_proj holds NaN"
    ):
        seen_behind_codes(model, codes, calibrator(), correct=True)
    assert same(state_of(model), before)


def test_a_linear_that_no_token_reached_keeps_its_bias_and_has_no_static_scale() -> None:
    model = model_of()
    model.model.layers[1].mlp.spare = nn.Linear(64, 64)
    bias = model.model.layers[1].mlp.spare.bias
    with quantized(model, Scheme.parse("w4-bias"), SEQUENTIAL, calibrator=calibrator()):
        assert torch.equal(model.model.layers[1].mlp.spare.bias, bias)
    with pytest.raises(CalibrationError, match=r"no token reached model\.layers\.1\.mlp\.spare"):
        quantize_(model, Scheme.parse("w4a8ts"), SEQUENTIAL, calibrator=calibrator())
