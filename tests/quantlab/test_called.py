"""A linear that counts as quantized is one that the model calls."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from quantlab.config import QuantizeConfig
from quantlab.errors import SchemeError
from quantlab.layers.linear import QuantLinear
from quantlab.quantize import quantize_, quantized
from quantlab.schemes import Scheme
from tests.toys import FAMILIES, toy_model

IDS = torch.arange(12)[None]


def _jamba() -> PreTrainedModel:
    """An attention layer and a Mamba layer, no experts."""
    config = AutoConfig.for_model(
        "jamba",
        **FAMILIES["llama"],
        num_experts=1,
        num_experts_per_tok=1,
        attn_layer_period=2,
        attn_layer_offset=0,
        mamba_d_state=8,
        mamba_dt_rank=8,
        use_mamba_kernels=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("scheme", ["w8", "w8a8", "a8"])
def test_jambas_dt_proj_is_refused(scheme: str) -> None:
    model = _jamba()
    before = model(IDS).logits
    with (
        pytest.raises(SchemeError, match=r"model\.layers\.1\.mamba\.dt_proj is not.*\*\.dt_proj"),
        quantized(model, Scheme.parse(scheme)),
    ):
        model(IDS)
    assert torch.equal(model(IDS).logits, before) and not _hooks(model)
    with quantized(model, Scheme.parse(scheme), QuantizeConfig(skip=("*.dt_proj",))):
        model(IDS)


class _Past(nn.Module):
    """An MLP whose parent reads its weights."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.inner = mlp

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.inner.gate_proj.weight[: x.shape[-1]])


def test_a_weight_that_a_grandparent_reads_is_found_too() -> None:
    model = toy_model("llama")
    model.model.layers[1].mlp = _Past(model.model.layers[1].mlp)
    with (
        pytest.raises(SchemeError, match=r"layers\.1\.mlp\.inner\.gate_proj is not"),
        quantized(model, Scheme.parse("w8")),
    ):
        model(IDS)


class _Routed(nn.Module):
    """Two experts of which the second is never chosen."""

    def __init__(self, mlp: nn.Module, *, reads_past: bool) -> None:
        super().__init__()
        self.experts = nn.ModuleList([mlp, copy.deepcopy(mlp)])
        self.reads_past = reads_past

    def forward(self, x: Tensor) -> Tensor:
        first: Tensor = self.experts[0](x)
        return first


@pytest.mark.parametrize("inside", ["modules", "linears"])
def test_an_expert_that_no_token_chose_is_no_fault(inside: str) -> None:
    model = toy_model("llama")
    mlp = model.model.layers[0].mlp
    if inside == "modules":
        model.model.layers[0].mlp = _Routed(mlp, reads_past=False)
    else:
        mlp.more = nn.ModuleList([nn.Linear(64, 64)])
    with quantized(model, Scheme.parse("w8")):
        model(IDS)


def test_a_linear_that_an_expert_reads_past_is_found() -> None:
    model = toy_model("llama")
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(F.linear(x, mlp.up_proj.weight) * mlp.gate_proj(x))
    model.model.layers[0].mlp = _Routed(mlp, reads_past=True)
    with (
        pytest.raises(
            SchemeError, match=r"experts\.0\.up_proj is not, though model\.layers\.0\.mlp\.experts\.0 ran"
        ),
        quantized(model, Scheme.parse("w8")),
    ):
        model(IDS)


def test_the_hooks_go_with_the_first_forward_and_with_the_block() -> None:
    model = toy_model("llama")
    with quantized(model, Scheme.parse("w8")):
        assert _hooks(model)
    assert not _hooks(model)
    quantize_(model, Scheme.parse("w8"))
    other = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    logits = model(IDS).logits
    assert not _hooks(model) and torch.equal(other(IDS).logits, logits)
    assert any(isinstance(module, QuantLinear) for module in other.modules())


def _hooks(model: nn.Module) -> list[Any]:
    return [hook for m in model.modules() for hook in (*m._forward_hooks, *m._forward_pre_hooks)]
