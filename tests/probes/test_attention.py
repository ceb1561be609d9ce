"""attention_sites: the model computes what eager computes, shows it at the sites, and is left as it was."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache

from probes import attention, query_blocks
from probes.attention import attention_sites
from probes.errors import ProbeError
from probes.hooks import watch
from probes.sites import attention_layers
from tests.probes.eager import REFUSED, SUPPORTED, Recorder, plain_attention, random_ids
from tests.toys import toy_model

EPS = torch.finfo(torch.float32).eps


def bound(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """How far two float32 computations of one attention may lie apart, [B, T, H, d].

    Each dot product of length n errs by at most n eps times the sum of its terms' magnitudes, so two differ by twice
    that; scaling and soft-cap add a few eps. A shift of at most e in each logit of a row changes a probability by a
    factor within exp(2 e); exp, the row sum of T terms and the division add (T + 8) eps. The product with v is again a
    dot product, of length T.
    """
    groups, d, length = q.shape[1] // k.shape[1], q.shape[-1], k.shape[2]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    sizes = q.abs() @ k.abs().transpose(-1, -2) * scaling
    error = 2 * (d + 2) * EPS * sizes + (8 * EPS * softcap if softcap else 0.0)
    logits = q @ k.transpose(-1, -2) * scaling
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    probs = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    factor = torch.expm1(2 * error.masked_fill(hidden, 0.0).amax(-1, keepdim=True)) + 2 * (length + 8) * EPS
    return ((probs * (factor + 2 * length * EPS)) @ v.abs()).transpose(1, 2)


@pytest.mark.parametrize("family", SUPPORTED)
def test_each_attention_call_equals_the_familys_own_eager_within_the_bound(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = toy_model(family, gain=4.0)
    excesses = []

    def both(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, rule: Any, **options: Any
    ) -> tuple[Tensor, None]:
        ours, _ = attention._attend(module, q, k, v, rule, **options)
        eager = sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
        hidden = ~rule.visible(0, q.shape[2], 0, k.shape[2])
        mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
        theirs, _ = eager(module, q, k, v, mask, **options)
        scaling, softcap = options.get("scaling") or q.shape[-1] ** -0.5, options.get("softcap")
        excesses.append(((ours - theirs).abs() - bound(q, k, v, hidden, scaling, softcap)).max().item())
        return ours, None

    with torch.no_grad(), attention_sites(model, block_size=16):
        monkeypatch.setitem(AttentionInterface._global_mapping, attention.NAME, both)
        model(random_ids(2, 40))
    assert len(excesses) == 2 * (2 if family == "diffllama" else 1)
    assert max(excesses) <= 0, f"worst excess over the bound {max(excesses):.3e}"


@pytest.mark.parametrize("family", SUPPORTED)
def test_the_models_error_is_at_most_twice_that_of_eager(family: str) -> None:
    ids = random_ids(2, 40)
    with torch.no_grad():
        model = toy_model(family, gain=3.0)
        model.set_attn_implementation("eager")
        eager = model(ids).logits
        with attention_sites(model, block_size=16):
            ours = model(ids).logits
        reference = model.double()(ids).logits
    ours_error, eager_error = ((x - reference).abs().max().item() for x in (ours, eager))
    # an eps of the largest logit beside it: both may happen to be exact
    assert ours_error <= 2 * eager_error + EPS * reference.abs().max().item()


@pytest.mark.parametrize("family", SUPPORTED)
def test_the_model_is_what_it_was(family: str) -> None:
    model = toy_model(family)
    ids = random_ids(1, 20)
    before = (
        model.config._attn_implementation,
        list(model.state_dict()),
        [n for n, _ in model.named_modules()],
    )
    with torch.no_grad():
        logits = model(ids).logits
        with pytest.raises(ZeroDivisionError), attention_sites(model):
            assert list(model.state_dict()) == before[1]
            assert any(name.endswith("attn_logits") for name, _ in model.named_modules())
            model(ids)
            _ = 1 / 0
        assert before == (
            model.config._attn_implementation,
            list(model.state_dict()),
            [name for name, _ in model.named_modules()],
        )
        assert torch.equal(model(ids).logits, logits)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(hasattr(module, "site_session") for module in model.modules())


@pytest.mark.parametrize("family", SUPPORTED)
def test_block_size_changes_no_bit(family: str) -> None:
    model, ids = toy_model(family, gain=3.0), random_ids(2, 145)  # the last block of 16 rows holds one
    outputs, logits = [], []
    with torch.no_grad():
        for block_size in (1, 33, 64, 1000, None):
            recorder = Recorder()
            with attention_sites(model, block_size=block_size), watch(model, "*.attn_logits", recorder.see):
                outputs.append(model(ids).logits)
            logits.append(
                {name: call[0][0].nan_to_num(0.0) * call[0][1] for name, call in recorder.calls.items()}
            )
    for output, seen in zip(outputs[1:], logits[1:], strict=True):
        assert torch.equal(output, outputs[0])
        assert all(torch.equal(seen[name], logits[0][name]) for name in seen)


def test_block_size_changes_no_bit_where_keys_are_summed_in_long_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(query_blocks, "LONG", 500)
    model, ids, outputs = toy_model("llama", gain=3.0, max_position_embeddings=1024), random_ids(1, 1000), []
    with torch.no_grad():
        for block_size in (48, 160, 1000):
            with attention_sites(model, block_size=block_size):
                outputs.append(model(ids).logits)
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[2])


@pytest.mark.parametrize("family", SUPPORTED)
def test_the_sites_show_eagers_logits_and_probabilities_once(family: str) -> None:
    model, ids = toy_model(family, gain=4.0), random_ids(2, 70)
    recorder = Recorder()
    with torch.no_grad():
        with plain_attention(model) as expected:
            model(ids)
        with (
            attention_sites(model, block_size=16),
            watch(model, ["*.attn_logits", "*.attn_probs"], recorder.see),
        ):
            model(ids)
    assert len(recorder.calls) == 2 * len(expected) == 4
    for name, calls in expected.items():
        # DiffLlama calls twice with the same queries and keys: the sites show it once.
        assert len(calls) == (2 if family == "diffllama" else 1)
        for site, whole in (("attn_logits", calls[0].logits), ("attn_probs", calls[0].probs)):
            [(seen, visible)] = recorder.calls[f"{name}.{site}"]
            assert torch.equal(visible, calls[0].visible)
            assert torch.allclose(seen[visible], whole[visible], rtol=1e-4, atol=1e-5)


def test_with_a_cache_every_logit_is_shown_once() -> None:
    model, ids = toy_model("llama", gain=3.0), random_ids(2, 30)
    whole, parts = Recorder(), Recorder()
    with torch.no_grad(), attention_sites(model):
        with watch(model, "*.attn_logits", whole.see):
            logits = model(ids).logits
        cache, pieces = DynamicCache(config=model.config), []
        with watch(model, "*.attn_logits", parts.see):
            for piece in (ids[:, :17], ids[:, 17:18], ids[:, 18:]):
                pieces.append(model(piece, past_key_values=cache).logits)
    assert torch.allclose(torch.cat(pieces, 1), logits, atol=1e-5)
    for name, calls in parts.calls.items():
        full, visible = whole.calls[name][0]
        assert sum(int(seen.sum()) for _, seen in calls) == int(visible.sum())
        last, last_visible = calls[-1]
        assert torch.equal(last_visible, visible[:, :, 18:])
        assert torch.allclose(last[last_visible], full[:, :, 18:][visible[:, :, 18:]], atol=1e-5)


@pytest.mark.parametrize("family", REFUSED)
def test_an_architecture_that_ignores_the_interface_is_told_so(family: str) -> None:
    model = toy_model(family)
    before = model.config._attn_implementation
    with (
        pytest.raises(ProbeError, match=r"AttentionInterface.*hidden states can"),
        torch.no_grad(),
        attention_sites(model),
    ):
        model(random_ids(1, 8))
    assert model.config._attn_implementation == before
    with torch.no_grad():
        model(random_ids(1, 8))


def test_a_layer_that_misses_its_site_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy_model("llama")
    second = attention_layers(model)[1][1]
    monkeypatch.setattr(second, "forward", lambda hidden_states, **_: (hidden_states, None))
    with (
        pytest.raises(
            ProbeError, match=r"1 of 2 did not, the first is model\.layers\.1\.self_attn \(LlamaAttention\)"
        ),
        torch.no_grad(),
        attention_sites(model),
    ):
        model(random_ids(1, 8))


def test_attention_sinks_are_refused() -> None:
    model = toy_model("llama")
    with attention_sites(model), pytest.raises(ProbeError, match="attention sinks"):
        q = torch.zeros(1, 4, 3, 16)
        attention._attend(attention_layers(model)[0][1], q, q, q, None, s_aux=torch.zeros(4))


def test_inside_another_nothing_is_added() -> None:
    model, counts = toy_model("llama"), []
    with torch.no_grad(), attention_sites(model, block_size=16):
        site = attention_layers(model)[0][1].attn_logits
        with attention_sites(model, block_size=64):
            assert attention_layers(model)[0][1].attn_logits is site
            with watch(model, "*.0.self_attn.attn_logits", lambda *seen: counts.append(seen[0])):
                model(random_ids(1, 40))
        assert attention_layers(model)[0][1].attn_logits is site
    assert len(counts) == 3


def test_gradients_pass() -> None:
    model, ids = toy_model("gemma2", gain=3.0), random_ids(1, 24)
    gradients = []
    for sites in (False, True):
        model.zero_grad()
        model.set_attn_implementation("eager")
        if sites:
            with attention_sites(model, block_size=16):
                model(ids, labels=ids).loss.backward()
        else:
            model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(*gradients, strict=True))


class Halver(nn.Module):
    """A stand-in quantizer whose scale spans a map: rounds to a grid of 15 levels of the largest visible magnitude."""

    spans_rows = True

    def __init__(self) -> None:
        super().__init__()
        self.scales: list[Tensor] = []
        self.order: list[str] = []

    def begin(self) -> None:
        self.order.append("begin")
        self.scales.append(torch.zeros(()))

    def observe(self, x: Tensor, block: Any) -> None:
        self.order.append("observe")
        self.scales[-1] = torch.maximum(self.scales[-1], x.masked_fill(~block.visible, 0.0).abs().amax())

    def forward(self, x: Tensor, block: Any) -> Tensor:
        self.order.append("forward")
        step = self.scales[-1] / 7
        return (x / step).round() * step


@pytest.mark.parametrize("family", ["llama", "gemma2", "diffllama"])
@pytest.mark.parametrize("site", ["attn_logits", "attn_probs"])
def test_a_scale_over_rows_does_not_depend_on_blocks(family: str, site: str) -> None:
    model, ids = toy_model(family, gain=4.0), random_ids(2, 100)
    scales, outputs = [], []
    for block_size in (16, 48, 200):
        with torch.no_grad(), attention_sites(model, block_size=block_size):
            halvers = [Halver(), Halver()]
            for (_, module), halver in zip(attention_layers(model), halvers, strict=True):
                setattr(module, site, halver)
            outputs.append(model(ids).logits)
        scales.append([halver.scales for halver in halvers])
        num_blocks, calls = -(-100 // block_size), 2 if family == "diffllama" else 1
        assert halvers[0].order == ["begin"] + ["observe"] * num_blocks + ["forward"] * num_blocks * calls
        assert not hasattr(attention_layers(model)[0][1], site)
    assert scales[0] == scales[1] == scales[2]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_hooks_see_a_block_once_although_it_is_walked_twice() -> None:
    model, seen = toy_model("llama"), []
    with torch.no_grad(), attention_sites(model, block_size=16):
        attention_layers(model)[0][1].attn_probs = Halver()
        with watch(
            model,
            ["*.0.self_attn.attn_logits", "*.0.self_attn.attn_probs"],
            lambda name, *_: seen.append(name.rpartition(".")[2]),
        ):
            model(random_ids(1, 40))
    assert seen == ["attn_logits", "attn_probs"] * 3


def _entered(seen: dict[str, list[Tensor]]) -> Any:
    return lambda name, _, __, output: seen.setdefault(name, []).append(output.clone())


ENTERING = ["*.attn_query", "*.attn_key", "*.attn_value"]


@pytest.mark.parametrize("family", SUPPORTED)
def test_the_sites_show_what_enters_the_product(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, calls = toy_model(family), random_ids(2, 20), []
    inner = attention._attend

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Any:
        calls.append((q, k, v))
        return inner(module, q, k, v, *args, **options)

    seen: dict[str, list[Tensor]] = {}
    with torch.no_grad(), attention_sites(model), watch(model, ENTERING, _entered(seen)):
        monkeypatch.setitem(AttentionInterface._global_mapping, attention.NAME, attend)
        model(ids)
    halves = 2 if family == "diffllama" else 1
    for layer, (name, _) in enumerate(attention_layers(model)):
        own = calls[layer * halves : (layer + 1) * halves]
        # DiffLlama's two calls share queries and keys, which are seen once; each half of its values is seen.
        for site, expected in zip(
            ("query", "key", "value"), ([own[0][0]], [own[0][1]], [call[2] for call in own]), strict=True
        ):
            found = seen[f"{name}.attn_{site}"]
            assert len(found) == len(expected)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_padding_is_no_token_of_what_enters() -> None:
    model, ids, seen = toy_model("mistral"), random_ids(2, 300), {}
    padding = torch.ones_like(ids)
    padding[0, :270] = 0
    padding[1, 290:] = 0

    def see(name: str, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen[name.rpartition("_")[2]] = args[1].visible.expand(*output.shape[:1], 1, output.shape[2], 1)

    with torch.no_grad(), attention_sites(model), watch(model, ENTERING, see):
        model(ids, attention_mask=padding)
        assert all(torch.equal(found[:, 0, :, 0], padding.bool()) for found in seen.values())
        model(ids)
        assert all(bool(found.all()) for found in seen.values())


def test_a_swapped_site_changes_what_enters_in_both_calls_of_diffllama() -> None:
    """Powers of two times what enters are those of the projections' weights, to the bit."""

    class Scaled(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, x: Tensor, tokens: Any) -> Tensor:
            return x * self.factor

    ids = random_ids(1, 40)
    for family in ("llama", "diffllama"):
        model, scaled = toy_model(family, gain=3.0), toy_model(family, gain=3.0)
        with torch.no_grad():
            for name, factor in (("q_proj", 2.0), ("k_proj", 0.5), ("v_proj", 4.0)):
                for _, layer in attention_layers(scaled):
                    layer.get_parameter(f"{name}.weight").mul_(factor)
            with attention_sites(scaled):
                expected = scaled(ids).logits
            with attention_sites(model):
                for _, layer in attention_layers(model):
                    layer.attn_query, layer.attn_key, layer.attn_value = Scaled(2.0), Scaled(0.5), Scaled(4.0)
                assert torch.equal(model(ids).logits, expected)
