"""Attention inside the sites is the model's own: what hands its attention more than is known there is refused."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention

from probes.attention import attention_sites, outside_sites
from probes.errors import ProbeError
from probes.hooks import watch
from quantlab.errors import SchemeError
from quantlab.layers.same_attention import TRIAL_TOKENS, check_same_attention, num_trial_tokens
from quantlab.quantize import quantized
from quantlab.schemes import Scheme
from tests.toys import FAMILIES, NUM_TOKENS, toy_model


def _minimax_m3() -> PreTrainedModel:
    """Blocks of 4 keys of which a query reads 2 and its own; the first layer reads all."""
    config = AutoConfig.for_model(
        "minimax_m3_vl_text",
        **FAMILIES["llama"],
        head_dim=16,
        rotary_dim=8,
        dense_intermediate_size=64,
        shared_intermediate_size=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        mlp_layer_types=["dense", "dense"],
        layer_types=["full_attention", "minimax_m3_sparse"],
        index_n_heads=2,
        index_head_dim=16,
        index_block_size=4,
        index_topk_blocks=2,
        index_local_blocks=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def test_minimax_m3_is_refused_by_the_name_of_what_it_gives() -> None:
    model = _minimax_m3()
    ids = torch.arange(40)[None]
    before = model(ids).logits
    for scheme in ("l8t", "kv8"):
        with pytest.raises(ProbeError, match="MiniMaxM3VLAttention gives its attention block_indices"):
            quantized(model, Scheme.parse(scheme)).__enter__()
    assert torch.equal(model(ids).logits, before)
    with quantized(model, Scheme.parse("w8")):
        model(ids)


@pytest.mark.parametrize("value", [torch.zeros(1), (torch.zeros(1),), {"keys": [torch.zeros(1)]}])
def test_an_unknown_tensor_is_refused_wherever_it_hides(value: Any) -> None:
    model = toy_model("llama")
    with torch.no_grad(), attention_sites(model), pytest.raises(ProbeError, match="head_mask besides"):
        model(torch.arange(8)[None], head_mask=value)
    with torch.no_grad(), attention_sites(model):
        model(torch.arange(8)[None], position_ids=torch.arange(8)[None], flag=3, head_mask=None)


class _SparseAttention(LlamaAttention):
    """Reads only the newest keys where the implementation is the model's own, and tells its attention nothing."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.config._attn_implementation != "attention_sites":
            T, kept = hidden_states.shape[1], self.config.index_topk
            rows = torch.arange(T)
            hidden = (rows[None] > rows[:, None]) | (rows[None] <= rows[:, None] - kept)
            mask = torch.zeros(1, 1, T, T).masked_fill(hidden, torch.finfo(torch.float32).min)
            kwargs["attention_mask"] = mask
        return super().forward(hidden_states, *args, **kwargs)


def test_an_index_that_leaves_keys_out_is_found_on_more_tokens_than_it_keeps() -> None:
    """40 keys are kept, and 41 tokens are tried; 32 would have shown nothing."""
    model = toy_model("llama", gain=3.0)
    model.config.index_topk = 40
    for layer in model.model.layers:
        layer.self_attn.__class__ = _SparseAttention
    with pytest.raises(SchemeError, match="over 41 tokens"):
        check_same_attention(model)
    model.config.index_topk = 600  # more than the toy has positions: no token can be left out
    check_same_attention(model)


@pytest.mark.parametrize(
    ("numbers", "tokens"),
    [
        ({}, TRIAL_TOKENS),
        ({"sliding_window": 4096}, TRIAL_TOKENS),
        ({"num_experts_topk": 500}, TRIAL_TOKENS),
        ({"index_topk": 8}, TRIAL_TOKENS),
        ({"index_topk": 2048}, 2049),
        ({"index_topk": 2048, "max_position_embeddings": 1024}, 1024),
        ({"index_topk_blocks": 16, "index_block_size": 128, "index_local_blocks": 1}, 128 * 18 + 1),
        ({"sparse_topk_blocks": 4, "sparse_block_size": 64}, 64 * 5 + 1),
    ],
)
def test_trial_tokens_are_more_than_are_kept(numbers: dict[str, int], tokens: int) -> None:
    assert num_trial_tokens(SimpleNamespace(**numbers)) == tokens


@pytest.mark.parametrize("family", ["llama", "gemma2", "diffllama", "gpt2", "quantlab"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_families_with_sites_pass(family: str, dtype: torch.dtype) -> None:
    check_same_attention(toy_model(family, gain=3.0).to(dtype))


def test_outside_is_the_models_own_and_sites_see_nothing() -> None:
    model, ids, seen = toy_model("gemma2", gain=3.0), torch.arange(24)[None] % NUM_TOKENS, []
    with torch.no_grad():
        own = model(ids).logits
        with attention_sites(model), watch(model, "*.attn_logits", lambda *each: seen.append(each[0])):
            with outside_sites(model):
                assert torch.equal(model(ids).logits, own)
            assert not seen
            model(ids)
        assert seen
        with outside_sites(model):
            assert torch.equal(model(ids).logits, own)
    assert isinstance(model, nn.Module)
