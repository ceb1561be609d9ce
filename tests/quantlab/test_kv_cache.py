"""The cache of keys and values: what a decoder would read token by token, and no query knows of a later token.

Letters: B sequences, M query heads, K key heads, T tokens, d channels.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from probes import attention
from probes.attention import attention_sites
from probes.maps import DifferentialMaps, MapRule
from probes.sites import Aged, Tokens, attention_layers
from quantlab.errors import SchemeError
from quantlab.layers.kv_cache import CachedHeads, cached_share_, round_by_channel
from quantlab.schemes import Scheme, TensorSpec
from tests.quantlab.test_site_schemes import MODELS, extremes, ids, logits_of, model_of, refused, under
from tests.toys import toy_model

SPECS = ("kv8", "kv4z", "kv2g8", "kv4u1", "kv4u16", "kv3g4u40", "kv4cu32", "kv2czu32", "kv2czu64", "kv4cu96")


def spec_of(name: str) -> TensorSpec:
    spec = Scheme.parse(name).cache
    assert spec is not None
    return spec


def grid(x: Tensor, spec: TensorSpec) -> Tensor:
    """A vector that shares one scale, rounded as the definition has it, in float32 as a cache would."""
    x = x.float()
    if spec.symmetric:
        scale = x.abs().max() / (2 ** (spec.bits - 1) - 1)
        return torch.round(x / scale).mul(scale).double()
    scale = (x.max() - x.min()) / (2**spec.bits - 1)
    return torch.round((x - x.min()) / scale).mul(scale).add(x.min()).double()


class Cache:
    """Keys or values of one head as a decoder keeps them: a token is appended, the query reads, and what is due is
    stored."""

    def __init__(self, spec: TensorSpec) -> None:
        self.spec = spec
        self.exact: list[Tensor] = []
        self.stored: list[Tensor] = []

    def append(self, x_d: Tensor) -> None:
        self.exact.append(x_d)
        while len(self.exact) > (self.spec.window or 0):
            self.store(self.exact.pop(0), self.spec.group_size or len(x_d))

    def store(self, x_d: Tensor, width: int) -> None:
        self.stored.append(torch.cat([grid(part, self.spec) for part in x_d.split(width)]))

    def read(self) -> Tensor:
        """[t, d]: all tokens so far, as the newest query reads them."""
        return torch.stack(self.stored + self.exact)

    def settle(self) -> None:
        """What is done when the query has read."""


class KiviValues(Cache):
    """Behind the residual, 32 channels of a token share a scale."""

    def append(self, x_d: Tensor) -> None:
        self.exact.append(x_d)

    def settle(self) -> None:
        assert self.spec.window is not None
        if len(self.exact) > self.spec.window:
            self.store(self.exact.pop(0), 32)


class KiviKeys(KiviValues):
    """A full residual is stored whole, 32 tokens of a channel on a grid."""

    def settle(self) -> None:
        if len(self.exact) == self.spec.window:
            for group in torch.stack(self.exact).split(32):
                self.stored += torch.stack([grid(column, self.spec) for column in group.unbind(1)], 1).unbind(
                    0
                )
            self.exact = []


def decode(q: Tensor, k: Tensor, v: Tensor, spec: TensorSpec, lambda_: float | None) -> Tensor:
    """[B, T, H, d] of float64 queries [B, M, T, d], step by step; pairs of adjacent maps are joined with lambda."""
    batch, maps, length, width = q.shape
    joins = 1 if lambda_ is None else 2
    out = torch.zeros(batch, length, maps // joins, v.shape[-1], dtype=torch.float64)
    kinds = (KiviKeys, KiviValues) if spec.granularity == "channel" else (Cache, Cache)
    for b in range(batch):
        keys, values = (
            [kind(spec) for _ in range(x.shape[1])] for kind, x in zip(kinds, (k, v), strict=True)
        )
        for t in range(length):
            for caches, x in ((keys, k), (values, v)):
                for head, cache in enumerate(caches):
                    cache.append(x[b, head, t])
            seen_keys, seen_values = ([cache.read() for cache in caches] for caches in (keys, values))
            rows = [
                torch.softmax(seen_keys[m * len(keys) // maps] @ q[b, m, t] / width**0.5, 0)
                for m in range(maps)
            ]
            if lambda_ is not None:
                rows = [rows[i] - lambda_ * rows[i + 1] for i in range(0, maps, 2)]
            for h, row in enumerate(rows):
                out[b, t, h] = row @ seen_values[h * len(values) // len(rows)]
            for cache in (*keys, *values):
                cache.settle()
    return out


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("lambda_", [None, 0.7], ids=["softmax", "differential"])
@pytest.mark.parametrize("block_size", [16, 96])
def test_a_decoder_that_goes_step_by_step_reads_the_same(
    name: str, lambda_: float | None, block_size: int
) -> None:
    """Both in float64; what differs is the order of sums of 75 terms, some 1e-14 of numbers of size 1."""
    generator, spec = torch.Generator().manual_seed(0), spec_of(name)
    width = 64 if spec.granularity == "channel" else 8
    q, k, v = (
        torch.randn(2, heads, 75, width, generator=generator, dtype=torch.float64)
        * size
        * (8 / width) ** 0.25
        for heads, size in ((4, 2.0), (2, 1.0), (2, 1.0))
    )
    expected = decode(q, k, v, spec, lambda_)
    model = toy_model("llama")
    rule = (
        MapRule()
        if lambda_ is None
        else DifferentialMaps(
            torch.tensor(lambda_, dtype=torch.float64), slice(0, None, 2), slice(1, None, 2)
        )
    )
    layer: Any = attention_layers(model)[0][1]
    layer.combines_maps = rule.combines
    with attention_sites(model, block_size=block_size):
        layer.attn_key, layer.attn_value = CachedHeads(spec, "keys"), CachedHeads(spec, "values")
        out, _ = attention._attend(layer, q, k, v, None, maps=rule)
    assert (out - expected).abs().max() <= 1e-13, f"{(out - expected).abs().max():.1e}"


STATIC = ("kv4ts", "kv4hs", "kv4cs", "kv4tsu8")


MOST = [(variant, name) for variant in ("standard", "diff_v1", "diffllama") for name in (*SPECS, *STATIC)]
REST = [(variant, name) for variant in MODELS for name in ("kv4z", "kv4cu32", "kv4tsu8")]


@pytest.mark.parametrize(("variant", "name"), dict.fromkeys(MOST + REST))
def test_no_query_knows_of_a_later_token(variant: str, name: str) -> None:
    if refused(variant, name):
        return
    model, tokens = model_of(variant, name), ids(1, 90)
    stats = extremes(model, tokens) if Scheme.parse(name).cache.static else None  # type: ignore[union-attr]
    with under(model, name, stats):
        before = logits_of(model, tokens)
        for changed in (1, 33, 64, 89):
            other = tokens.clone()
            other[0, changed:] = (other[0, changed:] + 7) % 512
            after = logits_of(model, other)
            assert torch.equal(after[:, :changed], before[:, :changed])
            assert not torch.equal(after[:, changed:], before[:, changed:])


def test_a_window_that_cuts_a_group_would_let_queries_know() -> None:
    """Why `kv4cu16` is refused, and that the test above can fail."""
    model, tokens = toy_model("llama", gain=3.0, head_dim=32), ids(1, 90)
    other = tokens.clone()
    other[0, 60:] = (other[0, 60:] + 7) % 512
    for window in (16, 32):
        spec, outputs = TensorSpec(4, "channel", window=window), []
        with attention_sites(model):
            for _, layer in attention_layers(model):
                layer.attn_key, layer.attn_value = CachedHeads(spec, "keys"), CachedHeads(spec, "values")
            outputs = [logits_of(model, each)[:, :60] for each in (tokens, other)]
        # With 16 keys 32 to 47 are read from the cache at 48, on scales that know of keys up to 63.
        assert torch.equal(*outputs) == (window == 32)


@pytest.mark.parametrize("variant", MODELS)
def test_a_window_as_long_as_the_text_changes_no_bit(variant: str) -> None:
    if refused(variant, "kv4u90"):
        return
    model, tokens = model_of(variant), ids(2, 90)
    with attention_sites(model):
        plain = logits_of(model, tokens)
    with under(model, "kv4u90"):
        assert torch.equal(logits_of(model, tokens), plain)
    with under(model, "kv4u89"):
        shorter = logits_of(model, tokens)
    assert torch.equal(shorter[:, :89], plain[:, :89])
    assert not torch.equal(shorter[:, 89], plain[:, 89])


def test_what_is_read_of_the_quantized_cache_is_counted() -> None:
    """A query at position i reads i + 1 tokens, of which i + 1 - 24 are old; padding is none."""
    model, tokens = model_of("llama"), ids(2, 90)
    mask = torch.ones_like(tokens)
    mask[1, :50] = 0
    with under(model, "kv4u24"):
        assert cached_share_(model) == 0.0
        logits_of(model, tokens)
        assert cached_share_(model) == pytest.approx((66 * 67) / (90 * 91))
        with torch.no_grad():
            model(tokens, attention_mask=mask)
        assert cached_share_(model) == pytest.approx((66 * 67 + 16 * 17) / (90 * 91 + 40 * 41))
    with under(model, "kv4"):
        assert cached_share_(model) is None
    with under(model := model_of("llama", "kv4cu32"), "kv4cu32"):
        logits_of(model, tokens)
        # Keys: 32 of positions 32 to 63, 64 of those to 89. Values: position t reads t - 32 old ones.
        keys, values = 32 * 32 + 26 * 64, 57 * 58 / 2
        assert cached_share_(model) == pytest.approx((keys + values) / (90 * 91))


@pytest.mark.parametrize("variant", MODELS)
@pytest.mark.parametrize("name", ["kv4u24", "kv4cu32"])
def test_block_size_changes_no_bit(variant: str, name: str) -> None:
    if refused(variant, name):
        return
    model, tokens, outputs = model_of(variant, name), ids(1, 300), []
    for block_size in (16, 48, 320):
        with under(model, name, block_size=block_size):
            outputs.append(logits_of(model, tokens))
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[2])


@pytest.mark.parametrize("name", ["kv8", "kv4u16", "kv4cu32", "kv2czu32", "kv4z"])
@pytest.mark.parametrize("family", ["llama", "diffllama", "diff_v1", "diff_v2"])
def test_generation_with_a_cache_reads_what_one_pass_reads(family: str, name: str) -> None:
    """transformers' cache keeps what it was given; the sites round what is read of it, at every step alike."""
    model, tokens = model_of(family, name), ids(1, 75)
    with under(model, name), torch.no_grad():
        whole = logits_of(model, tokens)
        cache, pieces = DynamicCache(config=model.config), []
        for start, stop in ((0, 40), (40, 41), (41, 70), (70, 71), (71, 75)):
            pieces.append(model(tokens[:, start:stop], past_key_values=cache).logits)
    # The order of float sums differs with the number of queries; a flipped code would be far above this.
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=2e-4)


def test_keys_by_channel_count_from_the_first_token() -> None:
    spec, generator = spec_of("kv4cu32"), torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 50, 4, generator=generator)
    visible = torch.ones(2, 1, 50, 1, dtype=torch.bool)
    whole = round_by_channel(x, visible[:1], spec)
    for start, stop in ((0, 32), (32, 50)):
        scale = x[:, :, start:stop].abs().amax(2, keepdim=True) / 7
        assert torch.equal(whole[:, :, start:stop], (x[:, :, start:stop] / scale).round() * scale)
    padded = torch.cat([torch.full((2, 3, 13, 4), 1e4), x], 2)
    seen = torch.cat([torch.zeros(2, 1, 13, 1, dtype=torch.bool), visible], 2)
    seen[1, :, :13] = True  # the second sequence has no padding: its groups start 13 tokens earlier
    out = round_by_channel(padded, seen, spec)
    assert torch.equal(out[0, :, 13:], whole[0])
    assert not torch.equal(out[1, :, 13:], whole[1])


def test_a_minimum_is_real_and_zero_need_not_be_a_code() -> None:
    """Between 5 and 6 all four codes of 2 bits are used, also where keys of a channel share a scale."""
    x = 5 + torch.rand(1, 2, 64, 32, generator=torch.Generator().manual_seed(0))
    tokens = Tokens(lambda: torch.ones(1, 1, 64, 1, dtype=torch.bool))
    for name in ("kv2z", "kv2g32z", "kv2czu32"):
        for what in ("keys", "values"):
            out = CachedHeads(spec_of(name), what)(x, tokens)  # type: ignore[arg-type]
            past = out.past if isinstance(out, Aged) else out
            # Half a step, and the rounding of the sum.
            assert (past - x).abs().max() <= 0.5 / 3 + 6 * 2**-23
            assert past.min() == x.min() and past.max() > 5.99


def test_heads_whose_channels_do_not_fill_groups_are_refused() -> None:
    with (
        pytest.raises(
            SchemeError, match=r"channels of a head: .* has 16, kv4czu128 asks for 32.*\(kv4zu128\)"
        ),
        under(model_of("llama"), "kv4czu128"),
    ):
        pass
    # Values of a pair of maps are twice as wide as keys; only they are in groups of channels.
    with under(toy_model("quantlab", variant="diff_v1", head_dim=16), "kv4czu128"):
        pass
