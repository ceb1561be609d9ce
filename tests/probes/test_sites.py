"""Where things are, and watching them."""

import pytest
import torch
from torch import nn

from probes.attention import attention_sites
from probes.errors import ProbeError
from probes.hooks import watch
from probes.sites import QueryBlock, attention_layers, decoder_layers, map_of_head, select
from tests.probes.eager import random_ids
from tests.toys import FAMILIES, toy_model


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_found_by_structure(family: str) -> None:
    model = toy_model(family)
    layers, attentions = decoder_layers(model), attention_layers(model)
    assert [name.rpartition(".")[2] for name, _ in layers] == ["0", "1"]
    assert all(model.get_submodule(name) is module for name, module in layers + attentions)
    assert [name.startswith(layer) for (name, _), (layer, _) in zip(attentions, layers, strict=True)] == [
        True,
        True,
    ]
    expected = (0, 0, 1, 1) if family == "diffllama" else (0, 0, 0, 0)
    assert map_of_head(attentions[0][1]) == expected


def test_a_module_may_declare_its_maps() -> None:
    attention = attention_layers(toy_model("llama"))[0][1]
    attention.map_of_head = (0, 1, 0, 1)
    assert map_of_head(attention) == (0, 1, 0, 1)


def test_what_is_no_language_model_is_refused() -> None:
    with pytest.raises(ProbeError, match=r"nn\.ModuleList whose elements contain attention: Linear has none"):
        decoder_layers(nn.Linear(2, 2))


def test_an_unmatched_pattern_names_what_exists() -> None:
    model = toy_model("llama")
    with pytest.raises(
        ProbeError, match=r"'\*\.q_prj' matches none of LlamaForCausalLM.*model\.layers\.\*\.self_attn"
    ):
        select(model, "*.q_prj")
    with pytest.raises(ProbeError, match=r"Did you mean 'model\.layers'"):
        select(model, "model.layer")
    with pytest.raises(ProbeError, match="inside attention_sites only"), watch(model, "*.attn_logits", print):
        pass


def test_a_hook_changes_nothing_and_is_gone_afterwards() -> None:
    model, ids, seen = toy_model("llama"), random_ids(1, 9), []
    with torch.no_grad():
        before = model(ids).logits

        def see(name: str, *_: object) -> torch.Tensor:
            seen.append(name)
            return torch.zeros(1)  # ignored

        with watch(model, ["*.mlp", "*.self_attn.o_proj"], see) as names:
            assert torch.equal(model(ids).logits, before)
        assert sorted(seen) == sorted(names)
        assert len(seen) == 4
        with pytest.raises(ZeroDivisionError), watch(model, "*.mlp", lambda *_: 1 / 0):
            model(ids)
        seen.clear()
        assert torch.equal(model(ids).logits, before)
    assert seen == []
    assert not any(module._forward_hooks for module in model.modules())


def test_a_forward_stops_once_all_is_seen() -> None:
    model, ids, ran = toy_model("llama"), random_ids(1, 40), []
    with torch.no_grad(), watch(model, "*.mlp", lambda name, *_: ran.append(name)):
        with watch(model, "model.layers.0.mlp.down_proj", lambda *_: None, stop=True):
            model(ids)
            raise AssertionError("the forward should have stopped")
        assert ran == []
        blocks: list[int] = []
        with (
            attention_sites(model, block_size=16),
            watch(
                model,
                "*.0.self_attn.attn_logits",
                lambda _, __, args, ___: blocks.append(args[1].start),
                stop=True,
            ),
        ):
            model(ids)
    assert blocks == [0, 16, 32]
    assert ran == []
    assert not hasattr(attention_layers(model)[0][1], "attn_logits")


def test_visible_parts_hold_each_visible_value_once() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 40, generator=generator)
    visible = torch.rand(2, 1, 5, 40, generator=generator) < 0.5
    for first, last in ((0, 0), (0, 12), (7, 30), (28, 40), (0, 40)):
        visible[..., first:last] = True
        block = QueryBlock(visible, 0, 0, 5, 40, seen_by_all=(first, last))
        parts = torch.cat([part.flatten() for part in block.visible_parts(x)])
        assert torch.equal(parts.sort().values, x[visible.expand_as(x)].sort().values)
