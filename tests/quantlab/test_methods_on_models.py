"""Methods, formats and transforms on whole models: what they change, what they keep, what they refuse."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from quantlab.calibration.calibrator import Calibrator
from quantlab.config import QuantizeConfig
from quantlab.errors import CalibrationError, SchemeError
from quantlab.layers.fake_quant import FakeQuant
from quantlab.layers.rotated import HeadHadamard
from quantlab.methods.config import AutoRoundConfig, MethodConfig
from quantlab.quantize import quantize_, quantized
from quantlab.schemes import Scheme
from quantlab.transforms.edges import find_edges
from quantlab.transforms.edit import Undo, restore
from quantlab.transforms.guard import Guard
from quantlab.transforms.rotate import rotate_
from quantlab.transforms.scaling import scale_
from tests.quantlab.whole_models import calibrator, ids, model_of, run, same, state_of
from tests.toys import toy_model

SCHEMES = (
    *("w4g32-gptq", "w4g32-clip", "w4g32-wclip", "w4g32z-hqq", "w3-autoround", "w4a8-gptq", "w4-gptq-bias"),
    *(
        "nf4",
        "fp4",
        "fp8",
        "mxfp4",
        "mxfp6",
        "nvfp4",
        "nf4-a8",
        "llm_int8",
        "a8ts",
        "w8a8cs",
        "w4g32z-a8-hqq",
    ),
)
QUICK = QuantizeConfig(methods=MethodConfig(autoround=AutoRoundConfig(num_steps=4, batch_size=2)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "diffllama"])
def test_every_method_runs_and_leaves_the_model_as_it_was(family: str) -> None:
    model, kept = model_of(family), calibrator()
    before, state = run(model), state_of(model)
    for name in SCHEMES:
        scheme = Scheme.parse(name)
        with quantized(model, scheme, QUICK, calibrator=kept) as changes:
            after = run(model)
        assert after.isfinite().all() and not torch.equal(after, before), name
        assert changes.share_by_bits == {scheme.weights.bits if scheme.weights else 16: 1.0}, name
        assert same(state_of(model), state), name
    assert torch.equal(run(model), before)


@pytest.mark.parametrize("variant", ["standard", "diff_v1", "diff_v2", "grouped_diff", "gated"])
@pytest.mark.parametrize(
    "name",
    [
        "w4g32-awq",
        "w8a8-smooth",
        "w4a4-fold-rotate",
        "w3-gptq-rotate",
        "w4g32-awq-smooth",
        "w4g32-awq-rotate",
        "kv8hs",
    ],
)
def test_transforms_run_on_attention_variants(variant: str, name: str) -> None:
    options = {"num_attention_heads": 8, "num_key_value_heads": 4} if variant == "grouped_diff" else {}
    model, kept = model_of("quantlab", variant=variant, **options), calibrator()
    before, state = run(model), state_of(model)
    with quantized(model, Scheme.parse(name), calibrator=kept):
        assert not torch.equal(run(model), before)
    assert same(state_of(model), state) and torch.equal(run(model), before)


def divergence(model: PreTrainedModel, name: str, config: QuantizeConfig = QUICK) -> float:
    """Mean squared difference of logits on the calibration text itself."""
    before = run(model, ids(6))
    with quantized(model, Scheme.parse(name), config, calibrator=calibrator()):
        return float((run(model, ids(6)) - before).square().mean())


@pytest.mark.parametrize("name", ["w3-gptq", "w3-awq", "w3-autoround"])
def test_methods_that_see_inputs_are_nearer_than_rounding(name: str) -> None:
    model = model_of()
    long = QuantizeConfig(methods=MethodConfig(autoround=AutoRoundConfig(num_steps=60, batch_size=4)))
    assert divergence(model, name, long) < 0.9 * divergence(model, "w3")


def test_widths_of_mixed_schemes() -> None:
    model = model_of()
    widths = {"*": "w3", "*.v_proj": "w8", "model.layers.0.mlp.*": "w16"}
    scheme = Scheme.parse("w4-gptq-mixed")
    with quantized(model, scheme, QuantizeConfig(widths=widths), calibrator=calibrator()) as changes:
        bits = {row.name: row.bits for row in changes.rows if row.action == "swapped"}
    assert bits["model.layers.1.self_attn.v_proj"] == 8 and bits["model.layers.0.self_attn.q_proj"] == 3
    assert bits["model.layers.0.mlp.up_proj"] == 16 and changes.share_by_bits.keys() == {3, 8, 16}
    with pytest.raises(
        SchemeError, match=r"'\*.vproj' matches none. Did you mean|'\*.vproj' matches none. There"
    ):
        quantize_(model, Scheme.parse("w4-mixed"), QuantizeConfig(widths={"*.vproj": "w8"}))
    with pytest.raises(
        SchemeError, match=r"from quantize.widths: it is empty. `quantlab allocate` writes it"
    ):
        quantize_(model, Scheme.parse("w4-mixed"))


def test_rotation_turns_queries_and_keys_ahead_of_their_rounding() -> None:
    model = model_of()
    before = run(model)
    with quantized(model, Scheme.parse("k8-rotate"), calibrator=calibrator()):
        layer = model.model.layers[0].self_attn
        assert isinstance(layer.attn_query, HeadHadamard) and isinstance(layer.attn_key, HeadHadamard)
        assert isinstance(layer.attn_key.then, FakeQuant) and layer.attn_query.then is None
        turned = run(model)
        layer.attn_key.then, model.model.layers[1].self_attn.attn_key.then = None, None
        # nothing is rounded now: float32 products of turned heads, through two layers and a head
        torch.testing.assert_close(run(model), before, rtol=0, atol=1e-3 * float(before.abs().max()))
    assert not torch.allclose(turned, before, rtol=0, atol=1e-3 * float(before.abs().max()))
    with quantized(model, Scheme.parse("k8-rotate"), calibrator=calibrator()) as changes:
        assert "queries and keys of 2 layers are turned as they arrive" in " ".join(changes.notes)


def test_bias_correction_takes_the_mean_error_away() -> None:
    model, kept = model_of(), calibrator()
    layer = model.model.layers[0].self_attn.q_proj
    mean = kept.linears(model)["model.layers.0.self_attn.q_proj"].mean_I
    with quantized(model, Scheme.parse("w3-bias"), calibrator=kept):
        found = model.model.layers[0].self_attn.q_proj
        assert found.bias is not None
        expected = (layer.weight.double() - found.weight.double()) @ mean.double()
        torch.testing.assert_close(found.bias.double(), expected, rtol=1e-4, atol=1e-6)


def test_awq_on_an_architecture_without_declared_edges_is_refused() -> None:
    model = model_of("llama")
    model.config.model_type = "unheard_of"
    state = state_of(model)
    with pytest.raises(SchemeError, match="declared graph"):
        quantize_(model, Scheme.parse("w4-awq"), calibrator=calibrator())
    assert same(state_of(model), state)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (float("nan"), r"weights must be finite.*model.layers.1.mlp.up_proj.weight holds 1 NaN or Inf"),
        (float("inf"), r"weights must be finite.*model.layers.1.mlp.up_proj.weight holds 1 NaN or Inf"),
    ],
)
def test_weights_that_are_not_finite_are_named(spoil: float, message: str) -> None:
    model = model_of()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = spoil
    with pytest.raises(CalibrationError, match=message):
        quantize_(model, Scheme.parse("w4-gptq"), calibrator=calibrator())


def test_an_outlier_of_1e38_ends_in_a_sentence_or_in_finite_codes() -> None:
    model = model_of()
    model.model.layers[0].self_attn.v_proj.weight.data[0, 0] = 1e38
    with pytest.raises((CalibrationError, SchemeError), match=r"must be finite|overflow"):
        quantize_(model, Scheme.parse("w4-gptq"), calibrator=calibrator())
    changes = quantize_(model, Scheme.parse("w4"))
    assert changes.share_by_bits == {4: 1.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", [0, 1])
def test_scales_of_a_linear_that_is_rotated_already_are_caught(dtype: torch.dtype, seed: int) -> None:
    model = toy_model("llama", seed=seed, intermediate_size=128).to(dtype)
    undo: Undo = []
    rotate_(model, undo, parts=("down",))
    scales = torch.rand(128, generator=torch.Generator().manual_seed(seed)) * 0.5 + 0.75
    edges = find_edges(model, ("link",))

    def scale(changes: Undo) -> list[str]:
        for edge in edges:
            scale_(model, edge, scales, changes)
        return []

    with pytest.raises(SchemeError, match="scales must not change the function"):
        Guard(model, ids(2, seed=3)).apply("scales", scale, undo)
    restore(undo)


def test_static_scales_of_an_expert_that_no_token_reached_are_refused() -> None:
    class Blind(Calibrator):
        def linears(self, model: nn.Module, made_by: str = "") -> Any:
            found = dict(super().linears(model, made_by))
            name = "model.layers.1.mlp.up_proj"
            return found | {name: replace(found[name], num_tokens=0)}

    with pytest.raises(CalibrationError, match=r"no token reached model.layers.1.mlp.up_proj"):
        quantize_(model_of(), Scheme.parse("a8ts"), calibrator=Blind(ids(6)))
