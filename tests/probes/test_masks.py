"""Masked positions never count: what the sites call visible is what an explicit mask lets through."""

from typing import Any

import pytest
import torch
from torch import Tensor

from probes.attention import attention_sites
from probes.errors import ProbeError
from probes.hooks import watch
from probes.mask_rules import mask_rule
from probes.sites import attention_layers
from tests.probes.eager import SUPPORTED, Recorder, plain_attention, random_ids
from tests.toys import toy_model

LENGTH = 50
WINDOW = 8
"""Of the toy models that have one."""


def explicit(family: str, layer: int, keep_BT: Tensor) -> Tensor:
    """Which logits count, [B, 1, T, T], written out: causal, both tokens' own padding, the layer's window."""
    position = torch.arange(keep_BT.shape[1])
    visible = position <= position[:, None]
    windowed = {"mistral": (0, 1), "gemma2": (0,), "gemma3_text": (0, 1)}
    if layer in windowed.get(family, ()):
        visible &= position > position[:, None] - WINDOW
    return visible & keep_BT[:, None, None, :] & keep_BT[:, None, :, None]


def recorded(model: Any, *, block_size: int = 16, **inputs: Any) -> tuple[Recorder, Tensor]:
    recorder = Recorder()
    with (
        torch.no_grad(),
        attention_sites(model, block_size=block_size),
        watch(model, ["*.attn_logits", "*.attn_probs"], recorder.see),
    ):
        output = model(**inputs).logits
    return recorder, output


@pytest.mark.parametrize("family", SUPPORTED)
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_padding_never_counts(family: str, side: str) -> None:
    model, ids = toy_model(family, gain=3.0), random_ids(2, LENGTH)
    keep = torch.ones(2, LENGTH, dtype=torch.long)
    if side == "left":
        keep[0, :19] = 0
    elif side == "right":
        keep[0, -19:] = 0
    recorder, output = recorded(model, input_ids=ids, attention_mask=keep)
    with torch.no_grad(), plain_attention(model) as expected:
        reference = model(ids, attention_mask=keep).logits
    assert torch.allclose(output[keep.bool()], reference[keep.bool()], atol=1e-5)
    for layer, (name, _) in enumerate(attention_layers(model)):
        [(logits, visible)] = recorder.calls[f"{name}.attn_logits"]
        by_hand = explicit(family, layer, keep.bool()).expand_as(visible)
        assert torch.equal(visible, by_hand)
        assert torch.allclose(logits[visible], expected[name][0].logits[by_hand], rtol=1e-4, atol=1e-5)
        probs, _ = recorder.calls[f"{name}.attn_probs"][0]
        assert not probs.nan_to_num(0.0)[~visible].any()


def test_a_query_that_sees_nothing_gets_zeros() -> None:
    model = toy_model("llama")
    keep = torch.ones(1, LENGTH, dtype=torch.long)
    keep[0, :20] = 0
    recorder, output = recorded(model, input_ids=random_ids(1, LENGTH), attention_mask=keep)
    assert output.isfinite().all()
    probs, _ = recorder.calls["model.layers.0.self_attn.attn_probs"][0]
    assert not probs[:, :, :20].nan_to_num(0.0).any()


def packed(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Position ids that restart with each sequence, [1, T], and the mask that keeps the sequences apart, [T, T]."""
    positions = torch.cat([torch.arange(length) for length in lengths])
    owner = torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)])
    row = torch.arange(len(owner))
    return positions[None], (owner == owner[:, None]) & (row <= row[:, None])


@pytest.mark.parametrize("family", ["llama", "qwen3", "diffllama", "gpt_neox"])
@pytest.mark.parametrize("how", ["positions", "bool", "additive"])
def test_packed_sequences_do_not_see_each_other(family: str, how: str) -> None:
    model, lengths = toy_model(family, gain=3.0), (17, 5, 28)
    positions, together = packed(lengths)
    ids = random_ids(1, sum(lengths))
    additive = torch.zeros(together.shape).masked_fill(~together, torch.finfo(torch.float32).min)
    masks = {"positions": None, "bool": together[None, None], "additive": additive[None, None]}
    recorder, output = recorded(
        model, input_ids=ids, position_ids=positions, attention_mask=masks[how], use_cache=False
    )
    for name, _ in attention_layers(model):
        [(_, visible)] = recorder.calls[f"{name}.attn_logits"]
        assert torch.equal(visible, together.expand_as(visible))
    start = 0
    for length in lengths:
        with torch.no_grad():
            alone = model(ids[:, start : start + length]).logits
        assert torch.allclose(output[:, start : start + length], alone, atol=1e-5)
        start += length


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "qwen2"])
def test_a_mask_for_each_layer_type_is_taken_as_given(family: str) -> None:
    model, lengths = (
        toy_model(family, gain=3.0, layer_types=["sliding_attention", "full_attention"]),
        (17, 5, 28),
    )
    positions, together = packed(lengths)
    row = torch.arange(sum(lengths))
    window = together & (row > row[:, None] - WINDOW)
    masks = {"full_attention": together[None, None], "sliding_attention": window[None, None]}
    recorder, _ = recorded(
        model,
        input_ids=random_ids(1, sum(lengths)),
        position_ids=positions,
        attention_mask=masks,
        use_cache=False,
    )
    for (name, _), mask in zip(attention_layers(model), (window, together), strict=True):
        [(_, visible)] = recorder.calls[f"{name}.attn_logits"]
        assert torch.equal(visible, mask.expand_as(visible))


def test_the_bias_of_an_additive_mask_is_part_of_the_logits() -> None:
    model, ids = toy_model("llama", gain=3.0), random_ids(1, LENGTH)
    row = torch.arange(LENGTH)
    hidden = row > row[:, None]
    slope = -0.1 * (row[:, None] - row).float()
    mask = torch.stack([slope * head for head in (1, 2, 3, 4)])[None].masked_fill(hidden, -torch.inf)
    recorder, output = recorded(model, input_ids=ids, attention_mask=mask)
    with torch.no_grad(), plain_attention(model) as expected:
        reference = model(ids, attention_mask=mask).logits
    assert torch.allclose(output, reference, atol=1e-5)
    for name, [call] in expected.items():
        [(logits, visible)] = recorder.calls[f"{name}.attn_logits"]
        assert torch.equal(visible, call.visible)
        assert torch.allclose(logits[visible], call.logits[visible], rtol=1e-4, atol=1e-5)


def test_a_mask_that_differs_between_heads() -> None:
    model = toy_model("diffllama", gain=3.0)
    row = torch.arange(LENGTH)
    mask = torch.stack([(row <= row[:, None]) & (row > row[:, None] - w) for w in (50, 3, 9, 20)])[None]
    recorder, _ = recorded(model, input_ids=random_ids(1, LENGTH), attention_mask=mask)
    for _, visible in (calls[0] for calls in recorder.calls.values()):
        assert torch.equal(visible, mask)


def test_a_custom_mask_function_is_evaluated_per_block() -> None:
    def every_third(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & ((key % 3 == 0) | (key == query))

    for use_vmap in (False, True):
        rule = mask_rule(2, 40, 40, mask_function=every_third, use_vmap=use_vmap)
        row = torch.arange(40)
        whole = every_third(row, row, row[:, None], row)
        assert torch.equal(rule.visible(7, 20, 3, 33).expand(2, 1, 13, 30)[1, 0], whole[7:20, 3:33])
        reach = rule.reach(7, 20)
        assert (reach.first, reach.last, reach.blind) == (0, 20, False)
        assert whole[7:20, reach.all_first : reach.all_last].all()


def test_wrong_masks_are_refused() -> None:
    model, ids = toy_model("llama"), random_ids(1, 10)
    with attention_sites(model), pytest.raises(ProbeError, match="10 queries and 10 keys"):
        model(ids, attention_mask=torch.ones(1, 1, 9, 10, dtype=torch.bool))
