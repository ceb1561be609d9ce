"""Methods, formats and transforms on whole models: what they change, what they keep, what they refuse."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantlab import solving
from quantlab.calibration.calibrator import Calibrator
from quantlab.config import QuantizeConfig
from quantlab.errors import CalibrationError, SchemeError
from quantlab.layers.fake_quant import FakeQuant
from quantlab.layers.linear import QuantLinear
from quantlab.layers.rotated import HeadHadamard
from quantlab.methods.config import AutoRoundConfig, MethodConfig
from quantlab.methods.gptq import quantize_weights
from quantlab.quantize import quantize_, quantized
from quantlab.schemes import Scheme
from quantlab.solutions import SolutionStore
from quantlab.transforms.edges import find_edges
from quantlab.transforms.edit import Undo, restore
from quantlab.transforms.guard import Guard
from quantlab.transforms.rotate import rotate_
from quantlab.transforms.scaling import scale_
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


def ids(rows: int = 6, length: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(0, 512, (rows, length), generator=torch.Generator().manual_seed(seed))


def calibrator() -> Calibrator:
    return Calibrator(ids(), batch_size=3)


def model_of(family: str = "llama", **changes: Any) -> PreTrainedModel:
    wide = {} if family == "gpt2" else {"intermediate_size": 128}
    return toy_model(family, gain=3.0, **(wide | changes))


@torch.no_grad()
def run(model: PreTrainedModel, tokens: Tensor | None = None) -> Tensor:
    logits: Tensor = model(ids(2, seed=7) if tokens is None else tokens).logits
    return logits


def state_of(model: nn.Module) -> tuple[list[tuple[str, int]], dict[str, Tensor]]:
    modules = [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)]
    return modules, {name: value.clone() for name, value in model.state_dict().items()}


def same(one: tuple[Any, dict[str, Tensor]], other: tuple[Any, dict[str, Tensor]]) -> bool:
    return (
        one[0] == other[0]
        and list(one[1]) == list(other[1])
        and all(torch.equal(value, other[1][name]) for name, value in one[1].items())
    )


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
    before = run(model, ids())
    with quantized(model, Scheme.parse(name), config, calibrator=calibrator()):
        return float((run(model, ids()) - before).square().mean())


@pytest.mark.parametrize("name", ["w3-gptq", "w3-awq", "w3-autoround"])
def test_methods_that_see_inputs_are_nearer_than_rounding(name: str) -> None:
    model = model_of()
    long = QuantizeConfig(methods=MethodConfig(autoround=AutoRoundConfig(num_steps=60, batch_size=4)))
    assert divergence(model, name, long) < 0.9 * divergence(model, "w3")


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
    stats = Calibrator(ids()).linears(model)[name]
    weight = state[f"{name}.weight"]
    (solved,) = quantize_weights(weight, [Scheme.parse("w3").weights], stats)  # type: ignore[list-item]
    # another batching of the same float32 sums may tip a code
    assert (solved.quantized.dequantize() != found).float().mean() < 0.01


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


def test_schemes_that_need_calibration_say_so() -> None:
    for name, needs in (
        ("w4-gptq", "inputs, tokens"),
        ("w4-rotate", "tokens"),
        ("kv8ts", "attention, tokens"),
    ):
        with pytest.raises(SchemeError, match=rf"{name} needs calibration \({needs}\): none was given"):
            quantize_(model_of(), Scheme.parse(name))


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


def test_the_name_of_the_linear_goes_with_a_method_s_complaint() -> None:
    model = model_of()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(SchemeError) as caught:
        quantize_(model, Scheme.parse("w4z-hqq"))
    assert "model.layers.1.mlp.down_proj" in " ".join([str(caught.value), *caught.value.__notes__])


class Counting:
    """GPTQ that counts how often, and for how many schemes, it was called."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, weight: Tensor, specs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        self.calls.append(len(specs))
        return quantize_weights(weight, specs, *args, **kwargs)


def test_schemes_of_a_sweep_are_solved_together_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting()
    monkeypatch.setitem(solving.QUANTIZERS, "gptq", counting)
    names = ("w3-gptq", "w4g32-gptq", "w4a8-gptq", "w4g32z-gptq-bias", "w4-gptq-fold", "w4", "w4g32-awq")
    schemes = tuple(map(Scheme.parse, names))
    store = SolutionStore(tmp_path, {"checkpoint": "toy"}, schemes)
    model, kept, codes = model_of(), calibrator(), {}
    for scheme in schemes[:4]:
        with quantized(model, scheme, calibrator=kept, solutions=store) as changes:
            codes[scheme.name] = [m.weight.clone() for m in model.modules() if isinstance(m, QuantLinear)]
        alone = quantized(model, scheme, calibrator=kept)
        count = len(counting.calls)
        with alone as again:
            weights = [m.weight for m in model.modules() if isinstance(m, QuantLinear)]
            assert all(torch.equal(a, b) for a, b in zip(codes[scheme.name], weights, strict=True))
        del counting.calls[count:]
        assert changes.summary() == again.summary()
    # one call a linear, for the four grids; the folded model is another one
    assert counting.calls == [4] * 14


def test_what_is_damaged_or_of_something_else_is_solved_anew(tmp_path: Path) -> None:
    scheme, model, kept = Scheme.parse("w4g32-gptq"), model_of(), calibrator()
    store = SolutionStore(tmp_path, {"checkpoint": "toy"}, (scheme,))
    with quantized(model, scheme, calibrator=kept, solutions=store):
        pass
    known = store.load(scheme)
    assert known is not None and len(known) == 14
    other = SolutionStore(tmp_path, {"checkpoint": "another"}, (scheme,))
    assert other.path(scheme) != store.path(scheme) and other.load(scheme) is None
    file = sorted(store.path(scheme).glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:200])
    assert store.load(scheme) is None
    with quantized(model, scheme, calibrator=kept, solutions=store):
        pass
    again = store.load(scheme)
    assert again is not None
    assert all(torch.equal(again[n].quantized.codes, known[n].quantized.codes) for n in known)
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name], "nothing half-done is left"


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


def test_learned_rounding_sees_the_inputs_that_a_rotated_linear_sees() -> None:
    model = model_of()
    config = QuantizeConfig(methods=MethodConfig(autoround=AutoRoundConfig(num_steps=30, batch_size=4)))
    before = run(model, ids())
    errors = []
    for name in ("w4-rotate", "w4-autoround-rotate"):
        with quantized(model, Scheme.parse(name), config, calibrator=calibrator()):
            errors.append(float((run(model, ids()) - before).norm() / before.norm()))
    assert errors[1] < errors[0]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_static_scales_of_an_expert_that_no_token_reached_are_refused() -> None:
    class Blind(Calibrator):
        def linears(self, model: nn.Module, made_by: str = "") -> Any:
            found = dict(super().linears(model, made_by))
            name = "model.layers.1.mlp.up_proj"
            return found | {name: replace(found[name], num_tokens=0)}

    with pytest.raises(CalibrationError, match=r"no token reached model.layers.1.mlp.up_proj"):
        quantize_(model_of(), Scheme.parse("a8ts"), calibrator=Blind(ids()))


def test_a_flipped_byte_of_a_solution_is_seen(tmp_path: Path) -> None:
    scheme, model, kept = Scheme.parse("w4g32-gptq"), model_of(), calibrator()
    store = SolutionStore(tmp_path, {"checkpoint": "toy"}, (scheme,))
    with quantized(model, scheme, calibrator=kept, solutions=store):
        pass
    file = sorted(store.path(scheme).glob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[-7] ^= 16
    file.write_bytes(content)
    assert store.load(scheme) is None
    file.unlink()
    assert store.load(scheme) is None
