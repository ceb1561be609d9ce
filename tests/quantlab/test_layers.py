"""FakeQuant and QuantLinear by themselves, and FakeQuant at the sites of a model's attention."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from probes.attention import attention_sites
from probes.sites import SwappedSite, attention_layers
from quantlab.errors import SchemeError
from quantlab.layers.fake_quant import FakeQuant
from quantlab.layers.linear import QuantLinear, weight_of
from quantlab.layers.targets import find_targets
from quantlab.methods.rtn import quantize_weight
from quantlab.numerics.affine import fake_quantize
from quantlab.numerics.qtype import QType
from quantlab.schemes import Scheme, TensorSpec
from tests.toys import toy_model


@dataclass
class Block:
    visible: Tensor


def spec_of(name: str) -> TensorSpec:
    spec = Scheme.parse(name).logits
    assert spec is not None
    return spec


def logits(batch: int = 3, heads: int = 2, queries: int = 6) -> tuple[Tensor, Tensor]:
    """Logits [B, H, q, q] and a causal mask."""
    x = torch.randn(batch, heads, queries, queries, generator=torch.Generator().manual_seed(0)) * 4
    return x, torch.ones(queries, queries).tril().bool()[None, None]


def walk(site: FakeQuant, x: Tensor, visible: Tensor, rows: int) -> Tensor:
    """What the attention function does: all blocks observed first where rows are spanned, then quantized."""
    blocks = [(x[:, :, i : i + rows], Block(visible[:, :, i : i + rows])) for i in range(0, x.shape[2], rows)]
    if site.spans_rows:
        site.begin()
        for part, block in blocks:
            site.observe(part, block)
    return torch.cat([site(part, block) for part, block in blocks], dim=2)


@pytest.mark.parametrize("name", ["l8t", "l4h", "l6r", "l4tz", "l3rz"])
def test_logits_land_on_the_grid_of_what_is_visible(name: str) -> None:
    """By plain loops over everything that shares a scale."""
    spec, (x, visible) = spec_of(name), logits()
    out = walk(FakeQuant(spec, "map"), x, visible, rows=6)
    seen = visible.expand_as(x)
    for b in range(3):
        for h in range(2):
            for q in range(6):
                part = {"tensor": (b,), "head": (b, h), "row": (b, h, q)}[spec.granularity]
                values = x[part][seen[part]]
                if spec.symmetric:
                    scale, zero = values.abs().max() / (2 ** (spec.bits - 1) - 1), None
                else:
                    scale = (values.max().clamp(min=0) - values.min().clamp(max=0)) / (2**spec.bits - 1)
                    zero = torch.round(-values.min().clamp(max=0) / scale).int()
                row, see = x[b, h, q], seen[b, h, q]
                expected = fake_quantize(row, scale, zero, QType.of_activations(spec))
                assert torch.equal(out[b, h, q][see], expected[see])


@pytest.mark.parametrize("name", ["l4t", "l4h", "l4r", "l4tz"])
def test_hidden_logits_neither_change_nor_count(name: str) -> None:
    spec, (x, visible) = spec_of(name), logits()
    site = FakeQuant(spec, "map")
    plain = walk(site, x, visible, rows=2)
    for hidden in (-math.inf, math.inf, math.nan, 1e9):
        poisoned = x.masked_fill(~visible, hidden)
        out = walk(site, poisoned, visible, rows=2)
        seen = visible.expand_as(x)
        assert torch.equal(out[seen], plain[seen])
        assert torch.equal(
            out.masked_fill(seen, 0).nan_to_num(7), poisoned.masked_fill(seen, 0).nan_to_num(7)
        )


@pytest.mark.parametrize("name", ["l4t", "l4h", "l4r", "l4tz", "l4hz"])
def test_neither_block_size_nor_batch_changes_a_bit(name: str) -> None:
    spec, (x, visible) = spec_of(name), logits()
    x[1] *= 50
    site = FakeQuant(spec, "map")
    whole = walk(site, x, visible, rows=6)
    assert all(torch.equal(walk(site, x, visible, rows), whole) for rows in (1, 2, 4))
    assert all(torch.equal(walk(site, x[i : i + 1], visible, 6)[0], whole[i]) for i in range(3))


def test_a_query_that_sees_nothing_is_left_alone() -> None:
    x, visible = logits()
    visible = visible.clone()
    visible[:, :, 2] = False
    assert torch.equal(walk(FakeQuant(spec_of("l4r"), "map"), x, visible, 2)[:, :, 2], x[:, :, 2])


def test_the_protocol_of_sites() -> None:
    assert isinstance(FakeQuant(spec_of("l8t"), "map"), SwappedSite)
    spans = {name: FakeQuant(spec_of(name), "map").spans_rows for name in ("l8t", "l8h", "l8r")}
    assert spans == {"l8t": True, "l8h": True, "l8r": False}
    x, visible = logits()
    with pytest.raises(AssertionError, match="must observe every block first"):
        FakeQuant(spec_of("l8t"), "map")(x, Block(visible))
    assert "8 bits, tensor" in repr(FakeQuant(spec_of("l8t"), "map"))


def test_inputs_of_linears() -> None:
    spec = Scheme.parse("a4g8").activations
    assert spec is not None
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    out = FakeQuant(spec, "inputs")(x)
    scale = x.view(2, 3, 2, 8).abs().amax(-1, keepdim=True) / 7
    assert torch.equal(out, (x.view(2, 3, 2, 8) / scale).round().mul(scale).reshape(x.shape))
    half = FakeQuant(spec, "inputs")(x.bfloat16())
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["l4t", "l4h", "l4r", "p4t"])
@pytest.mark.parametrize("family", ["llama", "diffllama", "gemma2"])
def test_block_size_does_not_change_a_model(family: str, name: str) -> None:
    scheme = Scheme.parse(name)
    spec, place = (scheme.logits, "attn_logits") if scheme.logits else (scheme.probs, "attn_probs")
    assert spec is not None
    model = toy_model(family, gain=3.0)
    ids = torch.randint(0, 512, (2, 40), generator=torch.Generator().manual_seed(0))
    outputs = []
    for block_size in (16, 64):
        with torch.no_grad(), attention_sites(model, block_size=block_size):
            for _, layer in attention_layers(model):
                setattr(layer, place, FakeQuant(spec, "map"))
            outputs.append(model(ids).logits)
    assert torch.equal(outputs[0], outputs[1])


def make(kind: str) -> nn.Module:
    """A linear with 32 inputs and 24 outputs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear: nn.Module = Conv1D(24, 32) if kind == "conv1d" else nn.Linear(32, 24)
    return linear


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_linear_without_a_scheme_is_the_same_function(kind: str) -> None:
    linear = make(kind)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    same = QuantLinear(linear, None, None, "weight_only")
    assert same.weight.data_ptr() == linear.weight.data_ptr(), "no copy of weights that stay"  # type: ignore[operator]
    # Two sums of 32 products in different orders, and the bias.
    magnitudes = x.abs() @ weight_of(linear).abs().t() + linear.bias.abs()  # type: ignore[operator]
    assert ((same(x) - linear(x)).abs() <= 2 * 33 * 2.0**-24 * magnitudes).all()


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("name", ["w4g16", "w8a8", "w4za8z", "w4g16a8g16"])
def test_a_linear_multiplies_by_its_dequantized_weights(kind: str, name: str) -> None:
    scheme, linear = Scheme.parse(name), make(kind)
    assert scheme.weights is not None
    quantized = quantize_weight(weight_of(linear), scheme.weights)
    run_by = "weight_only" if scheme.activations is None else "simulated"
    swapped = QuantLinear(linear, quantized, scheme.activations, run_by, "x.proj")  # type: ignore[arg-type]
    assert torch.equal(swapped.weight, quantized.dequantize())
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    seen = x if scheme.activations is None else FakeQuant(scheme.activations, "inputs")(x)
    assert torch.equal(swapped(x), nn.functional.linear(seen, quantized.dequantize(), linear.bias))  # type: ignore[arg-type]
    assert f"kernel={run_by}" in repr(swapped)
    assert (swapped.in_features, swapped.out_features) == (32, 24)


def test_half_precision_goes_in_and_out() -> None:
    scheme, linear = Scheme.parse("w8a8"), make("linear").bfloat16()
    assert scheme.weights is not None
    quantized = quantize_weight(weight_of(linear), scheme.weights)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    real = QuantLinear(linear, quantized, scheme.activations, "int8_mm")
    assert real(x).dtype == real.weight.dtype == torch.bfloat16
    with pytest.raises(AssertionError, match="codes on both sides"):
        QuantLinear(linear, None, scheme.activations, "int8_mm")


@pytest.mark.parametrize("name", ["a8t", "a4c"])
def test_a_scale_per_sequence_needs_sequences(name: str) -> None:
    spec = Scheme.parse(name).activations
    linear = QuantLinear(make("linear"), None, spec, "simulated", "model.layers.0.fc1")
    message = (
        r'model.layers.0.fc1 gets \[10, 32\].* Use one scale per token \(a[48]\), or add "\*.fc1" to skip'
    )
    with pytest.raises(SchemeError, match=message):
        linear(torch.zeros(10, 32))
    linear(torch.zeros(1, 10, 32))


def test_targets_of_a_tied_model() -> None:
    targets = {target.name: target for target in find_targets(toy_model("gpt2"))}
    assert targets["transformer.h.0.attn.c_attn"].shape == (192, 64), "Conv1D is turned to (out, in)"
    assert targets["transformer.h.0.attn.c_attn"].sort == "linear"
    assert targets["lm_head"].tied_to == "transformer.wte" and targets["lm_head"].num_weights == 0
    assert targets["transformer.wpe"].sort == "outside"


@pytest.mark.parametrize(
    ("family", "sizes", "fused"),
    [
        ("dbrx", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}, {"w1", "v1", "w2"}),
        ("mixtral", {"num_local_experts": 2}, {"gate_up_proj", "down_proj"}),
        ("rwkv", {"hidden_size": 32, "num_hidden_layers": 2, "context_length": 64}, set()),
    ],
)
def test_experts_of_real_architectures(family: str, sizes: dict[str, Any], fused: set[str]) -> None:
    """Large matrices that are no linears, of two dimensions or three; RWKV's [1, 1, 32] are vectors."""
    shape = {} if family == "rwkv" else toy_shape(family, sizes)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=512, **shape | sizes))
    targets = find_targets(model)
    assert {target.name.rpartition(".")[2] for target in targets if target.sort == "fused"} == fused
    assert any(target.sort == "linear" for target in targets)


def toy_shape(family: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """What is left to say of a toy's experts."""
    if family == "dbrx":
        experts = {"ffn_hidden_size": 96, "moe_num_experts": 2, "moe_top_k": 1, "hidden_size": 64}
        return {"ffn_config": experts, "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}}
    few = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    return few | {"hidden_size": 64, "intermediate_size": 96}


def test_targets_that_are_no_linears() -> None:
    class Router(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).softmax(-1)

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.zeros(4, 16, 64))
            self.mix = nn.Parameter(torch.zeros(4, 15, 64))
            self.bias = nn.Parameter(torch.zeros(1, 1, 4096))

    class OtherLinear(Router):
        pass

    model = toy_model("llama")
    layer = model.model.layers[0]
    layer.router, layer.experts, layer.conv = Router(64, 4), Experts(), nn.Conv1d(8, 8, 3)
    layer.other, layer.attention = OtherLinear(64, 64), nn.MultiheadAttention(64, 4)
    layer.positions = nn.Embedding(4096, 4)
    sorts = {target.name: target.sort for target in find_targets(model)}
    assert sorts["model.layers.0.router"] == "other"
    assert sorts["model.layers.0.experts.up"] == "fused"
    assert sorts["model.layers.0.experts.mix"] == sorts["model.layers.0.experts.bias"] == "other"
    assert sorts["model.layers.0.conv"] == "other"
    assert sorts["model.layers.0.positions"] == "other"
    assert sorts["model.layers.0.other"] == sorts["model.layers.0.attention.in_proj_weight"] == "fused"


def test_what_is_no_text_is_rounded_at_queries_and_stays_in_maps() -> None:
    """Where a query sees nothing a map keeps its logits; a query's own values are rounded like any others."""
    spec = TensorSpec(4, "row")
    x = torch.randn(1, 2, 3, 8, generator=torch.Generator().manual_seed(0))
    seen = torch.tensor([True, False, True]).view(1, 1, 3, 1).expand_as(x)
    site = FakeQuant(spec, "heads")
    assert torch.equal(site(x, Block(seen)), site(x))
    assert not torch.equal(site(x, Block(seen))[:, :, 1], x[:, :, 1])
    out = FakeQuant(spec, "map")(x, Block(seen))
    assert torch.equal(out[:, :, 1], x[:, :, 1]) and not torch.equal(out[:, :, 0], x[:, :, 0])
    assert not torch.equal(FakeQuant(spec, "map")(x)[:, :, 1], x[:, :, 1])
