"""A scheme on a model: what is swapped, what stays and why, and nothing left behind."""

import gc
import json
import weakref

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.attention import attention_sites
from probes.errors import ProbeError
from probes.hooks import watch
from probes.sites import decoder_layers
from quantlab.config import QuantizeConfig
from quantlab.errors import SchemeError
from quantlab.export.compressed_tensors import layout
from quantlab.layers.fake_quant import FakeQuant
from quantlab.layers.linear import QuantLinear
from quantlab.quantize import Changes, quantize_, quantized
from quantlab.schemes import Scheme
from tests.exporting import toy_job
from tests.toys import toy_model

LINEARS = {"llama": 14, "gpt2": 8, "gpt_neox": 8, "diffllama": 14}
SCHEMES = (
    "w8",
    "w4g32z",
    "w8a8",
    "w4a8t",
    "a8",
    "w8za8z",
    "w4g32a8",
    "l8t",
    "l4h",
    "l6r",
    "p8t",
    "w4g32a8l6t",
    "x8",
    "x4t",
    "w8a8x6",
)


def ids(batch: int = 2, length: int = 24) -> Tensor:
    return torch.randint(0, 512, (batch, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def run(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    logits: Tensor = model(tokens).logits
    return logits


def modules_of(model: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)]


@pytest.mark.parametrize("family", LINEARS)
def test_every_scheme_runs_and_leaves_the_model_as_it_was(family: str) -> None:
    model = toy_model(family, gain=3.0)
    before, modules, keys = run(model, ids()), modules_of(model), list(model.state_dict())
    alive = []
    for name in SCHEMES:
        scheme = Scheme.parse(name)
        with quantized(model, scheme) as changes:
            after = run(model, ids())
            alive += [weakref.ref(m) for m in model.modules() if isinstance(m, QuantLinear | FakeQuant)]
        assert after.isfinite().all() and not torch.equal(after, before)
        assert modules_of(model) == modules and list(model.state_dict()) == keys
        linears = [row for row in changes.rows if row.action == "swapped" and row.num_weights]
        assert len(linears) == (LINEARS[family] if scheme.weights or scheme.activations else 0)
        assert sum(changes.share_by_bits.values()) == pytest.approx(1.0, abs=1e-12)
        assert changes.share_by_bits == {scheme.weights.bits if scheme.weights else 16: 1.0}
        json.dumps(changes.summary(), allow_nan=False)
    assert torch.equal(run(model, ids()), before)
    gc.collect()
    assert not [ref for ref in alive if ref() is not None], "copies of earlier schemes are gone"


def test_the_baseline_changes_nothing() -> None:
    model = toy_model("llama")
    before = run(model, ids())
    with quantized(model, Scheme.parse("w16")) as changes:
        assert torch.equal(run(model, ids()), before)
    assert changes.rows == () and changes.share_by_bits == {16: 1.0} and changes.average_storage_bits == 16.0
    assert changes.weights_bytes == 2 * sum(p.numel() for p in model.parameters())
    with pytest.raises(SchemeError, match=r"'\*.upproj' matches none"):
        quantize_(model, Scheme.parse("w16"), QuantizeConfig(skip=("*.upproj",)))


@pytest.mark.parametrize("name", ["w8a8", "l4t", "w4g32a8l6t"])
def test_an_exception_restores_the_model_too(name: str) -> None:
    model = toy_model("llama")
    before, modules = run(model, ids()), modules_of(model)
    with pytest.raises(KeyError, match="stop"), quantized(model, Scheme.parse(name)):
        raise KeyError("stop")
    assert modules_of(model) == modules and torch.equal(run(model, ids()), before)


def test_swapping_for_good() -> None:
    model = toy_model("gpt2")
    changes = quantize_(model, Scheme.parse("w8a8"))
    assert isinstance(model.transformer.h[0].attn.c_attn, QuantLinear)
    assert not any(isinstance(module, FakeQuant) for module in model.modules())
    assert changes.summary()["kernels"] == {"int8_mm": 8}
    with pytest.raises(SchemeError, match="one scheme at a time"):
        quantize_(model, Scheme.parse("w4"))


@pytest.mark.parametrize("variant", ["diff_v1", "diff_v2"])
@pytest.mark.parametrize("name", ["w4g32", "w8a8", "l4t", "p4r", "e4h", "x4", "w8a8l8tp8te8tx8"])
def test_every_scheme_changes_differential_models_and_leaves_them_as_they_were(
    variant: str, name: str
) -> None:
    model = toy_model("quantlab", gain=3.0, variant=variant)
    before, modules = run(model, ids()), modules_of(model)
    with quantized(model, Scheme.parse(name)) as changes:
        assert not torch.equal(run(model, ids()), before)
        swapped = {row.name.rpartition(".")[2] for row in changes.rows if row.action == "swapped"}
    assert ("lambda_proj" in swapped) == (variant == "diff_v2" and "w" in name)
    assert ("attn_effective" in swapped) == ("e" in name)
    assert torch.equal(run(model, ids()), before)
    assert modules_of(model) == modules


def test_lambda_is_rounded_where_it_is_of_each_token() -> None:
    model = toy_model("quantlab", gain=3.0, variant="diff_v2")
    before, seen = run(model, ids()), []
    with quantized(model, Scheme.parse("d4")) as changes:
        assert [row.name for row in changes.rows if row.action == "swapped"] == [
            f"model.layers.{index}.self_attn.lambda_" for index in (0, 1)
        ]
        with watch(model, "*.self_attn.lambda_", lambda _, __, ___, out: seen.append(out)):
            assert not torch.equal(run(model, ids()), before)
    for lambda_BTH in seen:
        codes = lambda_BTH / lambda_BTH.amax(-1, keepdim=True) * 7
        assert torch.allclose(codes, codes.round(), atol=1e-4)
    assert torch.equal(run(model, ids()), before)


@pytest.mark.parametrize("changes", [{}, {"variant": "diff_v1"}])
def test_lambda_needs_attention_that_makes_one_for_each_token(changes: dict[str, str]) -> None:
    with (
        pytest.raises(SchemeError, match="its attention has no lambda, or one a layer"),
        quantized(toy_model("quantlab", **changes), Scheme.parse("d8")),
    ):
        pass


def test_layers_that_are_integrated_have_no_output_of_their_own() -> None:
    with (
        pytest.raises(SchemeError, match="are integrated over depth"),
        quantized(toy_model("quantlab", variant="continuous_depth"), Scheme.parse("x8")),
    ):
        pass


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "quantlab"])
def test_outputs_of_layers_lie_on_the_grid(family: str) -> None:
    model, seen = toy_model(family, gain=3.0), []
    names = [name for name, _ in decoder_layers(model)]
    with quantized(model, Scheme.parse("x4")), watch(model, names, lambda _, __, ___, out: seen.append(out)):
        run(model, ids())
    assert len(seen) == 2
    for output in seen:
        hidden = output[0] if isinstance(output, tuple) else output
        codes = hidden / hidden.abs().amax(-1, keepdim=True) * 7
        assert torch.allclose(codes, codes.round(), atol=1e-3)


def test_effective_maps_need_a_layer_that_joins_maps() -> None:
    for model in (toy_model("llama"), toy_model("quantlab")):
        with (
            pytest.raises(SchemeError, match="exist where attention joins its maps"),
            quantized(model, Scheme.parse("e8t")),
        ):
            pass


def test_the_block_size_does_not_change_a_scale_of_effective_maps() -> None:
    model, outputs = toy_model("quantlab", gain=3.0, variant="diff_v1"), []
    for size in (16, 32, 64):
        with attention_sites(model, block_size=size), quantized(model, Scheme.parse("l6te4t")):
            outputs.append(run(model, ids(length=80)))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_sites_need_their_block() -> None:
    model = toy_model("llama")
    with pytest.raises(SchemeError, match="l8t quantizes attention sites, which live inside attention_sites"):
        quantize_(model, Scheme.parse("l8t"))
    with attention_sites(model):
        quantize_(model, Scheme.parse("l4t"))
        one = run(model, ids())
    with quantized(model, Scheme.parse("l4t")):
        assert torch.equal(run(model, ids()), one)
    with attention_sites(model), quantized(model, Scheme.parse("l4t")):
        assert torch.equal(run(model, ids()), one)


def test_architectures_without_sites_are_refused() -> None:
    model = toy_model("gptj")
    with pytest.raises(ProbeError, match="AttentionInterface"), quantized(model, Scheme.parse("l8t")):
        run(model, ids())
    with quantized(model, Scheme.parse("w8a8")):
        run(model, ids())


def test_the_table_says_what_stays_and_why() -> None:
    with quantized(
        toy_model("llama"), Scheme.parse("w4g32"), QuantizeConfig(skip=("*.down_proj", "*.0.mlp.up_proj"))
    ) as changes:
        pass
    rows = {row.name: row for row in changes.rows}
    assert rows["model.layers.1.mlp.down_proj"].why == "skip"
    assert rows["model.embed_tokens"].why.startswith("outside the decoder layers")
    assert rows["lm_head"].action == "skipped" and rows["lm_head"].bits == 16
    # Per layer q, o 64x64, k, v 32x64, gate, up, down 96x64; skipped: both down and one up.
    total, skipped = 2 * (2 * 4096 + 2 * 2048 + 3 * 6144), 3 * 6144
    assert changes.share_by_bits == {4: 1 - skipped / total, 16: skipped / total}
    storage = (total - skipped) * (4 + 32 / 32) + skipped * 16
    assert changes.average_storage_bits == storage / total
    others = 2 * 512 * 64 + 5 * 64
    assert changes.weights_bytes == (storage + 16 * others) / 8
    table = changes.table()
    down = next(row for row in table if row["name"] == "model.layers.*.mlp.down_proj")
    assert (down["count"], down["action"], down["num_weights"]) == (2, "skipped", 6144)
    assert sum(row["count"] for row in table) == len(changes.rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_count_as_they_are_stored(dtype: torch.dtype) -> None:
    """As an export weighs them, which adds 128 bits of shape to a linear."""
    scheme, names = Scheme.parse("w4g32"), [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    model = toy_model("llama")
    config = QuantizeConfig(skip=("*.mlp.*", "*.k_proj", "*.v_proj", "*.o_proj"))
    with toy_job(model, scheme.name, dtype, config) as job:
        written = layout(job)
    with quantized(model, scheme, config, scale_dtype=dtype) as changes:
        stored = sum(row.storage_bits for row in changes.rows if row.name in names)
    assert stored == 2 * 64 * 64 * (4 + 8 * dtype.itemsize / 32)
    assert stored + 2 * 128 == written.average_storage_bits * written.num_codes


def test_tied_weights_are_counted_once() -> None:
    model = toy_model("gpt2")
    with quantized(model, Scheme.parse("w8")) as changes:
        pass
    row = next(row for row in changes.rows if row.name == "lm_head")
    assert row.num_weights == 0 and row.why.endswith("tied to transformer.wte")
    counted = sum(row.num_weights for row in changes.rows)
    assert counted == sum(p.numel() for p in model.parameters() if p.ndim > 1)


def test_a_linear_that_the_model_holds_twice_stays_shared() -> None:
    model = toy_model("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    modules = modules_of(model)
    with quantized(model, Scheme.parse("w4")) as changes:
        assert model.model.layers[1].mlp.up_proj is model.model.layers[0].mlp.up_proj
        assert isinstance(model.model.layers[1].mlp.up_proj, QuantLinear)
    assert modules_of(model) == modules
    assert changes.share_by_bits == {4: 1.0}


@pytest.mark.parametrize("name", ["w4", "a8"])
def test_a_matrix_of_several_names_is_skipped_whole_or_not_at_all(name: str) -> None:
    model = toy_model("llama")
    layers = model.model.layers
    layers[1].mlp = layers[0].mlp
    layers[1].self_attn.q_proj.weight = layers[0].self_attn.q_proj.weight
    modules = modules_of(model)
    for leaf in ("mlp.up_proj", "self_attn.q_proj"):
        one, other = (f"model.layers.{i}.{leaf}" for i in (0, 1))
        for kept, quantized_too in ((one, other), (other, one)):
            message = f"{quantized_too} and {kept} are one matrix.* Skip both or neither"
            with pytest.raises(SchemeError, match=message):
                quantize_(model, Scheme.parse(name), QuantizeConfig(skip=[kept]))
            assert modules_of(model) == modules
    with quantized(model, Scheme.parse("w4"), QuantizeConfig(skip=["*.up_proj", "*.q_proj"])) as changes:
        run(model, ids())
    # Held twice and counted once: the MLP's 3 matrices of 6144 and q of 4096; of k and v 2048 and o 4096 two each.
    assert changes.share_by_bits == {4: 28672 / 38912, 16: (6144 + 4096) / 38912}
    with quantized(model, Scheme.parse("w4")) as changes:
        assert changes.share_by_bits == {4: 1.0}
        q = [layer.self_attn.q_proj for layer in layers]
        assert all(isinstance(linear, QuantLinear) for linear in q) and torch.equal(q[0].weight, q[1].weight)
    assert sum(row.num_weights for row in changes.rows) == sum(
        parameter.numel() for parameter in model.parameters() if parameter.ndim > 1
    )


def test_a_linear_tied_to_something_outside_the_decoder_is_refused() -> None:
    model = toy_model("llama")
    layer = model.model.layers[1]
    layer.extra = nn.Linear(64, 512, bias=False)
    layer.extra.weight = model.model.embed_tokens.weight
    message = (
        r"model.layers.1.extra and model.embed_tokens are one matrix.*\. Add \"model.layers.1.extra\" to skip"
    )
    with pytest.raises(SchemeError, match=message):
        quantize_(model, Scheme.parse("w4"))
    with quantized(model, Scheme.parse("w4"), QuantizeConfig(skip=["*.extra"])) as changes:
        assert isinstance(layer.self_attn.q_proj, QuantLinear)
    assert changes.share_by_bits == {4: 1.0}


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(4, 16, 64))


def test_fused_experts_are_refused_or_skipped_and_counted() -> None:
    model = toy_model("llama")
    model.model.layers[0].experts = Experts()
    modules = modules_of(model)
    message = r"no nn.Linear, .*: model.layers.0.experts.up is \[4, 16, 64\]. Add \"\*.up\" to skip"
    with pytest.raises(SchemeError, match=message), quantized(model, Scheme.parse("w8a8")):
        pass
    assert modules_of(model) == modules
    with quantized(model, Scheme.parse("w8"), QuantizeConfig(skip=["*.experts.*"])) as changes:
        assert changes.share_by_bits[16] == 4096 / (4096 + 61440)
    with quantized(model, Scheme.parse("l8t")):
        run(model, ids())


@pytest.mark.parametrize(
    ("name", "skip", "kernel", "message"),
    [
        (
            "w4g64",
            [],
            "integer",
            r"model.layers.0.mlp.down_proj has in_features=96, group_size=64. Use group_size=32",
        ),
        ("w8a8g64", [], "integer", r"group_size must divide in_features: model.layers.0.mlp.down_proj"),
        ("w4", ["*.upproj"], "integer", r"'\*.upproj' matches none. Did you mean '\*.up_proj'"),
        ("w4", ["zzz"], "integer", r"'zzz' matches none. There are \*.q_proj, \*.k_proj"),
        ("w4", ["*"], "integer", r"the 14 of LlamaForCausalLM are all skipped. Skip less"),
        ("a8", ["model.layers.*"], "integer", r"the 14 of LlamaForCausalLM are all skipped"),
    ],
)
def test_what_cannot_be_honoured_is_refused(name: str, skip: list[str], kernel: str, message: str) -> None:
    model = toy_model("llama")
    modules = modules_of(model)
    with (
        pytest.raises(SchemeError, match=message),
        quantized(model, Scheme.parse(name), QuantizeConfig(skip=skip, kernel=kernel)),
    ):
        pass
    assert modules_of(model) == modules
    with pytest.raises(SchemeError, match=message):
        quantize_(model, Scheme.parse(name), QuantizeConfig(skip=skip, kernel=kernel))
    assert modules_of(model) == modules


def test_models_without_decoder_linears_are_refused() -> None:
    model = toy_model("llama")
    for _, layer in decoder_layers(model):
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                setattr(layer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], nn.Identity())
    with pytest.raises(SchemeError, match=r"of the decoder layers: LlamaForCausalLM has none"):
        quantize_(model, Scheme.parse("w4"))
    with pytest.raises(ProbeError, match="decoder layers"):
        quantize_(nn.Sequential(nn.Linear(4, 4)), Scheme.parse("w4"))


def test_weights_that_are_codes_already_are_refused() -> None:
    class Linear8(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.to(x.dtype).t()

    model = toy_model("llama")
    coded = Linear8(64, 96, bias=False)
    coded.weight = nn.Parameter(torch.zeros(96, 64, dtype=torch.int8), requires_grad=False)
    model.model.layers[0].mlp.up_proj = coded
    with pytest.raises(
        SchemeError, match=r"model.layers.0.mlp.up_proj holds codes already. Load the checkpoint deq"
    ):
        quantize_(model, Scheme.parse("w4"))
    with quantized(model, Scheme.parse("w4"), QuantizeConfig(skip=["*.0.mlp.up_proj"])):
        run(model, ids())


def typical(difference: Tensor) -> float:
    """The median magnitude: what most values do, whatever a few flipped codes do to theirs."""
    return float(difference.abs().median())


@pytest.mark.parametrize("family", ["llama", "gpt2", "diffllama"])
@pytest.mark.parametrize("name", ["w8a8", "w4a8t", "w8za8z", "w6a6"])
def test_integers_and_floats_agree_on_a_model(family: str, name: str) -> None:
    """The products agree within rounding, so a code flips only where a value lies within rounding of a boundary.

    A flip is one step, which is what quantization does to every value: so it moves an output by no more than the
    scheme's own effect, both ways, and most outputs not at all.
    """
    model, scheme = toy_model(family, gain=3.0), Scheme.parse(name)
    before = run(model, ids())
    with quantized(model, scheme) as changes:
        real = run(model, ids())
    with quantized(model, scheme, QuantizeConfig(kernel="simulated")) as reference:
        fake = run(model, ids())
    assert set(changes.summary()["kernels"]) == {"int8_mm"}
    assert set(reference.summary()["kernels"]) == {"simulated"}
    assert (real - fake).abs().max() <= 2 * (fake - before).abs().max()
    assert typical(real - fake) <= 0.1 * typical(fake - before)


@pytest.mark.parametrize("name", ["w8a8", "a8t", "w4a8t", "a4c", "l4t", "l4h", "l4r", "p4t", "w8a8l6t"])
@pytest.mark.parametrize("family", ["llama", "diffllama"])
def test_what_else_is_in_the_batch_does_not_matter(family: str, name: str) -> None:
    """Sequences alone and beside others: the same, but for what rounding of float sums may flip on some machine.

    A scale over the batch would move most values by the whole effect of the scheme.
    """
    model, scheme = toy_model(family, gain=3.0), Scheme.parse(name)
    with torch.no_grad():
        # One token whose embedding is far larger than all others, in one sequence only.
        model.get_input_embeddings().weight[7] *= 30
    tokens = ids(4, 20).masked_fill(ids(4, 20) == 7, 8)
    tokens[2, 5] = 7
    before = run(model, tokens)
    with quantized(model, scheme):
        together = run(model, tokens)
        for i in range(4):
            alone = run(model, tokens[i : i + 1])[0]
            assert typical(alone - together[i]) <= 0.1 * typical(together[i] - before[i])


def test_changes_are_data() -> None:
    with quantized(toy_model("llama"), Scheme.parse("w8a8l8")) as changes:
        pass
    assert isinstance(changes, Changes)
    summary = changes.summary()
    assert summary["scheme"] == "w8a8l8t" and summary["share_by_bits"] == {"8": 1.0}
    assert (summary["num_swapped"], summary["num_skipped"]) == (16, 2)
    assert summary["kernels"] == {"int8_mm": 14, "simulated": 2}
