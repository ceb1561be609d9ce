"""Schemes inside attention, on every variant: what each part rounds, alone and together, one map or both."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.attention import attention_sites
from probes.hooks import watch
from probes.sites import attention_layers, map_of_head
from quantlab.attention.variants import VARIANTS
from quantlab.calibration.collect import calibrate
from quantlab.calibration.statistics import AttentionStats, Ranges
from quantlab.errors import CalibrationError, SchemeError
from quantlab.layers.fake_quant import FakeQuant, QuantOutput
from quantlab.layers.kv_cache import CachedHeads
from quantlab.layers.sites import find_outputs, find_sites, swap_output, swap_site
from quantlab.schemes import Scheme, TensorSpec
from quantlab.transforms.edit import restore
from tests.toys import toy_model

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{variant: ("quantlab", {"variant": variant}) for variant in VARIANTS},
    "flow local": ("quantlab", {"variant": "flow", "variant_options": {"potential": "local"}}),
    "diff_v1 halves": ("quantlab", {"variant": "diff_v1", "variant_options": {"pairing": "halves"}}),
    "llama": ("llama", {}),
    "diffllama": ("diffllama", {}),
    "gemma2": ("gemma2", {}),
}
TWO_MAPS = (
    "diff_v1",
    "diff_v2",
    "grouped_diff",
    "shared_diff",
    "threshold_diff",
    "diff_v1 halves",
    "diffllama",
)
LENGTH = 40


def model_of(name: str, scheme: str = "w16") -> PreTrainedModel:
    """A toy, with heads of 32 channels where the scheme has caches in groups of as many."""
    family, changes = MODELS[name]
    cache = Scheme.parse(scheme).cache
    wide = cache is not None and cache.granularity == "channel" and not cache.static
    return toy_model(family, gain=3.0, **changes | ({"head_dim": 32} if wide else {}))


def ids(batch: int = 1, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(0, 512, (batch, length), generator=torch.Generator().manual_seed(seed))


@contextmanager
def under(
    model: PreTrainedModel,
    scheme: str | Scheme,
    attention: dict[str, AttentionStats] | None = None,
    **options: Any,
) -> Iterator[None]:
    """The model with its attention sites under a scheme."""
    scheme = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    with attention_sites(model, **options):
        for prefix, layer, site, quantizer in find_sites(model, scheme, attention):
            swap_site(layer, prefix, site, quantizer, [])
        yield


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokens: Tensor, **kwargs: Any) -> Tensor:
    logits: Tensor = model(tokens, **kwargs).logits
    return logits


def seen_under(model: PreTrainedModel, scheme: str, site: str) -> tuple[Tensor, Tensor, Tensor]:
    """(before, after, visible) at a site of the first layer, which sees one block."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def see(name: str, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen.append((args[0].clone(), output.clone(), args[1].visible.expand_as(output).clone()))

    first = attention_layers(model)[0][0]
    with under(model, scheme, block_size=64), watch(model, f"{first}.{site}", see):
        logits_of(model, ids())
    return seen[0]


def extremes(model: PreTrainedModel, tokens: Tensor) -> dict[str, AttentionStats]:
    """Calibration by hand: the extremes of each channel of each head over the tokens."""
    found: dict[str, dict[str, Ranges]] = {}

    def see(name: str, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        layer, what = name.split(".attn_")
        low, high = output.amin((0, 2)), output.amax((0, 2))
        old = found.setdefault(layer, {}).get(what, Ranges(low, high))
        found[layer][what] = Ranges(old.minimum_HC.minimum(low), old.maximum_HC.maximum(high))

    with attention_sites(model), watch(model, ["*.attn_query", "*.attn_key", "*.attn_value"], see):
        logits_of(model, tokens)
    return {layer: AttentionStats(**ranges) for layer, ranges in found.items()}


def refused(variant: str, scheme: str) -> str | None:
    """The sentence with which a combination is refused; None where it runs."""
    parts = Scheme.parse(scheme)
    if variant == "flow local" and (parts.query or parts.key or parts.cache):
        return r"makes one number of each token instead\. Quantize its logits"
    return None


@pytest.mark.parametrize("part", ["l{}t", "p{}t", "q{}", "k{}", "v{}", "kv{}"])
@pytest.mark.parametrize("variant", MODELS)
def test_every_part_runs_on_every_variant_and_costs_more_at_fewer_bits(variant: str, part: str) -> None:
    model = model_of(variant)
    with attention_sites(model):
        plain = logits_of(model, ids())
    errors = []
    for bits in (8, 6, 4):
        name = part.format(bits)
        sentence = refused(variant, name)
        if sentence:
            with pytest.raises(SchemeError, match=sentence), under(model, name):
                pass
            continue
        with under(model, name):
            out = logits_of(model, ids())
        assert out.isfinite().all()
        errors.append((out - plain).norm().item())
    assert all(error > 0 for error in errors)
    assert errors == [] or errors[-1] > errors[0]
    with attention_sites(model):
        assert torch.equal(logits_of(model, ids()), plain)


TOGETHER = (
    "q8k8v8l8tp8t",
    "q6k6v6l6hp6r",
    "q4k4v4l4tp4t",
    "q4kv4u8l4rp4h",
    "q8kv4cu32",
    "w16l4tp16",
    "q16k16v16kv16",
)


@pytest.mark.parametrize("variant", MODELS)
def test_parts_together(variant: str) -> None:
    model = model_of(variant, "kv4cu32")
    with attention_sites(model):
        plain = logits_of(model, ids())
    outputs = []
    for name in TOGETHER:
        if refused(variant, name):
            continue
        with under(model, name):
            outputs.append(logits_of(model, ids()))
        # 16 bits is untouched, to the bit
        assert torch.equal(outputs[-1], plain) == (Scheme.parse(name).is_baseline)
    assert all(not torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])


@pytest.mark.parametrize("variant", MODELS)
@pytest.mark.parametrize("part", ["l4t", "p4t", "l4h", "l4r"])
def test_one_map(variant: str, part: str) -> None:
    model = model_of(variant)
    if variant not in TWO_MAPS:
        with (
            pytest.raises(SchemeError, match=r"one of the two maps.* subtracts none\. Leave m2 out"),
            under(model, f"{part}m2"),
        ):
            pass
        return
    site = "attn_logits" if part[0] == "l" else "attn_probs"
    maps = torch.tensor(map_of_head(attention_layers(model)[0][1]))
    outputs = []
    for which in (1, 2):
        before, after, visible = seen_under(model, f"{part}m{which}", site)
        chosen = maps == which - 1
        assert torch.equal(after[:, ~chosen], before[:, ~chosen])
        assert torch.equal(after.masked_fill(visible, 0), before.masked_fill(visible, 0))
        assert (after != before)[:, chosen].any(-1).any(-1).all(), "every head of the map is rounded"
        if part.endswith(
            "t"
        ):  # the largest value of the chosen map alone is 7 steps, or 15 of what is not negative
            values, rounded = before[:, chosen][visible[:, chosen]], after[:, chosen][visible[:, chosen]]
            step = values.abs().max() / (7 if part[0] == "l" else 15)
            assert torch.equal(rounded, (values / step).round() * step)
        with under(model, f"{part}m{which}"):
            outputs.append(logits_of(model, ids()))
    with under(model, part):
        outputs.append(logits_of(model, ids()))
    assert all(not torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])


@pytest.mark.parametrize("variant", MODELS)
@pytest.mark.parametrize("part", ["l", "p"])
def test_each_map_has_a_scale_of_its_own(variant: str, part: str) -> None:
    """What one attention call a map would do; where there is one map, it is the tensor."""
    model, site = model_of(variant), "attn_logits" if part == "l" else "attn_probs"
    before, after, visible = seen_under(model, f"{part}4m", site)
    maps = torch.tensor(map_of_head(attention_layers(model)[0][1]))
    assert sorted(set(maps.tolist())) == ([0, 1] if variant in TWO_MAPS else [0])
    for which in (0, 1) if variant in TWO_MAPS else (0,):
        seen = visible[:, maps == which]
        values, rounded = before[:, maps == which][seen], after[:, maps == which][seen]
        step = values.abs().max() / (7 if part == "l" else 15)
        assert torch.equal(rounded, (values / step).round() * step)
    assert torch.equal(after.masked_fill(visible, 0), before.masked_fill(visible, 0))
    with under(model, f"{part}4m"):
        by_map = logits_of(model, ids())
    with under(model, f"{part}4t"):
        together = logits_of(model, ids())
    # The first token's probability is 1 in every softmax map, so those have the tensor's scale whatever shares it.
    differ = variant in TWO_MAPS and (part == "l" or variant == "threshold_diff")
    assert torch.equal(by_map, together) == (not differ)


def test_a_scale_per_map_depends_neither_on_blocks_nor_on_the_batch() -> None:
    model, tokens = model_of("diff_v1"), ids(3, 100)
    outputs = []
    for block_size in (16, 128):
        with under(model, "l4mp4m", block_size=block_size):
            outputs += [logits_of(model, tokens), torch.cat([logits_of(model, row[None]) for row in tokens])]
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])
    # Float sums of one sequence and of three may differ; a code that flips for it would be far above this.
    assert torch.allclose(outputs[0], outputs[1], atol=2e-4)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_is_never_negative_has_the_whole_grid(bits: int) -> None:
    """2^bits codes for probabilities and for lambda, of which the largest is the largest value; maps that were joined
    have both signs and stay on a grid that is its own mirror image."""
    model, steps = model_of("diff_v2"), 2**bits - 1
    before, after, visible = seen_under(model, f"p{bits}t", "attn_probs")
    step = before[visible].max() / steps
    assert torch.equal(after[visible], (before[visible] / step).round() * step)
    assert (after[visible] / step).round().max() == steps
    before, after, visible = seen_under(model, f"e{bits}t", "attn_effective")
    assert before[visible].min() < 0
    step = before[visible].abs().max() / (2 ** (bits - 1) - 1)
    assert torch.equal(after[visible], (before[visible] / step).round() * step)
    lambdas = torch.rand(2, 5, 4, generator=torch.Generator().manual_seed(0))
    rounding = QuantOutput(nn.Identity(), TensorSpec(bits, "row"), "lambdas")
    step = lambdas.amax(-1, keepdim=True) / steps
    assert torch.equal(rounding(lambdas), (lambdas / step).round() * step)
    name, module, spec = find_outputs(model, Scheme.parse(f"d{bits}"))[0]
    swap_output(model, module, name, spec, undo := [])
    standing = model.get_submodule(name)
    assert isinstance(standing, QuantOutput) and standing.rounding.kind == "lambdas"
    restore(undo)


def test_a_mask_that_differs_between_heads_is_that_of_the_chosen_ones() -> None:
    """A block's mask of [B, H, q, t] and of [B, 1, q, t] say the same."""
    spec = TensorSpec(4, "head", map=2)
    site = FakeQuant(spec, "map", heads=[1, 3])
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    causal = torch.ones(5, 5).tril().bool()[None, None]

    class Block:
        def __init__(self, visible: Tensor) -> None:
            self.visible = visible

    outputs = []
    for visible in (causal, causal.expand(2, 4, 5, 5)):
        site.begin()
        site.observe(x, Block(visible))
        outputs.append(site(x, Block(visible)))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0][:, [0, 2]], x[:, [0, 2]])
    mixed = causal.repeat(1, 4, 1, 1)
    mixed[:, 3, 0] = True  # another mask for one chosen head: its first row sees everything
    x[:, 3, 0, 4] = 100.0
    site.begin()
    site.observe(x, Block(mixed))
    out = site(x, Block(mixed))
    assert torch.equal(out[:, 1], outputs[0][:, 1])
    assert torch.equal(out[:, 3, 0, 4], x[:, 3, 0, 4])


SPANS: dict[str, Callable[[Tensor], Tensor]] = {
    "r": lambda x: x.abs().amax(-1, True),
    "t": lambda x: x.abs().amax((1, 2, 3), True),
    "h": lambda x: x.abs().amax((2, 3), True),
    "c": lambda x: x.abs().amax(2, True),
    "g8": lambda x: x.unflatten(-1, (-1, 8)).abs().amax(-1).repeat_interleave(8, -1),
}


@pytest.mark.parametrize("grain", SPANS)
@pytest.mark.parametrize("site", ["query", "key", "value"])
def test_heads_land_on_the_grid_of_what_shares_a_scale(site: str, grain: str) -> None:
    before, after, _ = seen_under(toy_model("llama", gain=3.0), f"{site[0]}4{grain}", f"attn_{site}")
    scale = (SPANS[grain](before) / 7).expand_as(before)
    assert torch.equal(after, (before / scale).round() * scale)


@pytest.mark.parametrize(
    "name", ["q4", "k4t", "v4h", "q4ck4cv4c", "kv4", "kv4cu32", "kv2czu32", "q4tzk4hzv4cz"]
)
@pytest.mark.parametrize("family", ["llama", "diffllama", "mistral"])
def test_neither_padding_nor_the_batch_nor_blocks_change_a_sequence(family: str, name: str) -> None:
    model, tokens = toy_model(family, gain=3.0, **{"head_dim": 32} if "u32" in name else {}), ids(1, 50)
    padded, mask = ids(2, 70, seed=1), torch.ones(2, 70, dtype=torch.long)
    padded[0, 20:], mask[0, :20] = tokens[0], 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with under(model, name):
        alone = logits_of(model, tokens)
    for block_size in (16, 64):
        with under(model, name, block_size=block_size):
            among = logits_of(model, padded, attention_mask=mask, position_ids=positions)[0, 20:]
        # Float sums start at another place; a code that flips for it would be a step of 4 bits, far above this.
        assert torch.allclose(among, alone[0], atol=2e-4), f"{(among - alone[0]).abs().max():.1e}"


@pytest.mark.parametrize("name", ["q8{}s", "k8{}s", "v8{}s", "kv8{}s", "q4{}zsk4{}zs"])
@pytest.mark.parametrize("grain", ["t", "h", "c"])
@pytest.mark.parametrize("family", ["llama", "diffllama", "diff_v1", "grouped_diff"])
def test_static_ranges(family: str, grain: str, name: str) -> None:
    model, tokens = model_of(family), ids()
    static = name.replace("{}", grain)
    stats = extremes(model, tokens)
    with under(model, static, stats):
        out = logits_of(model, tokens)
        # Nothing is found anew: what comes later in a sequence changes nothing but the order of float sums.
        assert torch.allclose(logits_of(model, tokens[:, :17]), out[:, :17], atol=2e-4)
    assert out.isfinite().all()
    if name.startswith("q8"):  # the first layer's own extremes are what a dynamic scale finds
        first, found = attention_layers(model)[0][0], []
        with (
            under(model, static, stats),
            watch(model, f"{first}.attn_query", lambda *seen: found.append(seen[3].clone())),
        ):
            logits_of(model, tokens)
        assert torch.equal(found[0], seen_under(model, f"q8{grain}", "attn_query")[1])


@pytest.mark.parametrize("family", ["llama", "diffllama", "diff_v1", "gemma2"])
def test_calibration_gives_the_ranges_of_these_sites(family: str) -> None:
    model, tokens = model_of(family), ids(3)
    by_hand, found = extremes(model, tokens), calibrate(model, tokens).attention
    assert list(found) == list(by_hand) == [name for name, _ in attention_layers(model)]
    for name, stats in by_hand.items():
        for which in ("query", "key", "value"):
            ours, theirs = getattr(stats, which), getattr(found[name], which)
            assert torch.allclose(ours.minimum_HC, theirs.minimum_HC, atol=1e-4)
            assert torch.allclose(ours.maximum_HC, theirs.maximum_HC, atol=1e-4)


def test_static_ranges_that_calibration_did_not_give() -> None:
    model = toy_model("llama")
    stats = extremes(model, ids())
    with pytest.raises(CalibrationError, match=r"none was given\. Calibrate first"), under(model, "k8ts"):
        pass
    renamed = {name.replace("layers.1", "layers.7"): each for name, each in stats.items()}
    with (
        pytest.raises(CalibrationError, match=r"model\.layers\.1\.self_attn is not in it"),
        under(model, "kv8cs", renamed),
    ):
        pass
    other = extremes(toy_model("llama", num_key_value_heads=4), ids())
    with (
        under(model, "k8hs", other),
        pytest.raises(CalibrationError, match="calibration saw 4 heads of 1 channels, 2 of 16 are here"),
    ):
        logits_of(model, ids())


def test_groups_that_do_not_divide_a_head() -> None:
    model = toy_model("llama")
    for name in ("q4g12", "kv4g12"):
        with (
            pytest.raises(SchemeError, match=r"divide the channels of a head: .*has 16, .* asks for 12"),
            under(model, name),
        ):
            pass


def test_sites_are_found_before_anything_is_swapped() -> None:
    model = toy_model("llama")
    with pytest.raises(SchemeError, match="live inside attention_sites"):
        find_sites(model, Scheme.parse("q4"))
    with attention_sites(model):
        found = find_sites(model, Scheme.parse("q4kv4u8l4t"))
        assert not any(isinstance(module, FakeQuant) for module in model.modules())
        rows = [swap_site(layer, prefix, site, quantizer, []) for prefix, layer, site, quantizer in found]
        assert sum(isinstance(module, CachedHeads) for module in model.modules()) == 4
    assert [(row.name.rpartition(".")[2], row.why) for row in rows[:4]] == [
        ("attn_query", "q4"),
        ("attn_key", "kv4u8"),
        ("attn_value", "kv4u8"),
        ("attn_logits", "l4t"),
    ]
    assert not any(isinstance(module, FakeQuant) for module in model.modules())
