"""Attention with sites: `attention_sites(model)` makes what happens inside attention modules that can be hooked.

One attention function, registered with transformers' `AttentionInterface`, walks the queries in blocks, each against
the keys it may see, and calls the `Site` modules of the attention layer:

    q, k, v   as they enter the product          ->  attn_query, attn_key, attn_value, once a call
    logits    = softcap(scale * q k^T) + bias    ->  attn_logits
    probs     = softmax(mask(logits))            ->  attn_probs
    effective = A1 - lambda A2                   ->  attn_effective, where a layer joins its maps (`probes.maps`)
    out       = effective v, or probs v

No tensor holds T x T: memory is O(block x T). Outside the block the model is what it was.
Where the site of keys or values gives `Aged`, a query's newest keys weigh as they are and older ones as cached.

Against the eager implementation in float32, each logit differs by at most 2 gamma_d sum_i |q_i k_i| scale
(gamma_n = n eps / (1 - n eps), two dot products of length d in different orders), each probability relatively by twice
the largest logit difference plus gamma_T, each output by that times sum_j p_j |v_j| plus gamma_T of the same.
A query that sees no key (padding) gives zeros, as SDPA does.

Letters: B sequences, H query heads, K key heads, q query rows of a block, T keys, d channels.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.configuration_utils import PreTrainedConfig

from probes.ages import Past
from probes.errors import ProbeError
from probes.hooks import around
from probes.maps import MapRule
from probes.mask_rules import as_mask, mask_rule
from probes.masks import Mask
from probes.query_blocks import AttentionCall, rows_of_block
from probes.sites import Aged, QueryBlock, Site, Tokens, attention_layers, decoder_stack

MAP_SITES = ("attn_logits", "attn_probs", "attn_effective")
"""Sites that see blocks of queries, in the order in which data passes them; the last only where maps are joined."""
SITES = ("attn_query", "attn_key", "attn_value", *MAP_SITES)
"""All sites of an attention layer."""
WITHOUT_EFFECT = frozenset(
    (
        "position_ids",
        "cache_position",
        "position_embeddings",
        "token_type_ids",
        "mm_token_type_ids",
        "num_items_in_batch",
    )
)
"""Tensors that models hand through to attention, which it takes no notice of: rotation and mask are made before it."""
NAME = "attention_sites"
"""Under which the attention function and its mask function are registered with transformers."""


class _Session:
    """What the attention function remembers of one model between calls."""

    def __init__(
        self,
        layers: list[tuple[str, nn.Module]],
        block_size: int | None,
        configs: list[tuple[PreTrainedConfig, str]],
    ) -> None:
        self.names = {module: name for name, module in layers}
        self.block_size = block_size
        self.configs = configs
        """Configurations and the implementation that each had before, outermost first."""
        self.paused = False
        self.reached: dict[nn.Module, tuple[Any, Any, Any]] = {}

    def begin(self) -> None:
        self.reached.clear()

    def first_call(self, module: nn.Module, query: Tensor, key: Tensor, mask: Any) -> bool:
        """Whether the module shows new logits: DiffLlama calls twice with one q and k, once per half of v."""
        last = self.reached.get(module)
        if last is not None and last[0]() is query and last[1]() is key and last[2] is mask:
            return False
        self.reached[module] = (weakref.ref(query), weakref.ref(key), mask)
        return True

    def check(self) -> None:
        missed = [name for module, name in self.names.items() if module not in self.reached]
        if missed and not self.paused:
            module = type(next(module for module, name in self.names.items() if name == missed[0])).__name__
            raise ProbeError(
                f"Every attention layer must go through transformers' AttentionInterface to have sites: "
                f"{len(missed)} of {len(self.names)} did not, the first is {missed[0]} ({module}), so its attention "
                "logits cannot be observed. Its hidden states can."
            )


@contextmanager
def attention_sites(model: nn.Module, *, block_size: int | None = None) -> Iterator[None]:
    """Give every attention layer of the model its sites for the span of the block.

    Args:
        block_size: query rows per block, rounded up to a multiple of 16; chosen by the size of a row when None.
            Results do not depend on it beyond float rounding.

    Inside another `attention_sites` of the same model nothing is added, and the outer block size holds.

    Raises:
        ProbeError: after a forward in which an attention layer did not reach its sites; the architecture does not go
            through `AttentionInterface`.
    """
    layers = attention_layers(model)
    if all(hasattr(module, "attn_logits") for _, module in layers):
        yield
        return
    _, stack = decoder_stack(model)
    configs = [(config, config._attn_implementation) for config in _configs(model)]
    session = _Session(layers, block_size, configs)
    try:
        for _, module in layers:
            for name in SITES:
                if name != "attn_effective" or getattr(module, "combines_maps", False):
                    setattr(module, name, Site())
            module.site_session = session  # type: ignore[assignment]
        for config, _ in configs:
            config._attn_implementation = NAME
        with around(stack, session.begin, session.check):
            yield
    finally:
        for config, implementation in configs:
            config._attn_implementation = implementation
        for _, module in layers:
            for name in (*SITES, "site_session"):
                if hasattr(module, name):
                    delattr(module, name)


@contextmanager
def outside_sites(model: nn.Module) -> Iterator[None]:
    """The model's own attention for the span of the block, also inside `attention_sites`; sites see nothing then."""
    sessions = (getattr(module, "site_session", None) for _, module in attention_layers(model))
    session: _Session | None = next(sessions, None)
    if session is None:
        yield
        return
    try:
        session.paused = True
        for config, implementation in session.configs:
            config._attn_implementation = implementation
        yield
    finally:
        for config, _ in session.configs:
            config._attn_implementation = NAME
        session.paused = False


def _configs(model: nn.Module) -> list[PreTrainedConfig]:
    """Every configuration that a module of the model reads, outermost first, since setting one sets those inside."""
    found = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    for config in list(found.values()):
        for name in getattr(config, "sub_configs", {}):
            inner = getattr(config, name, None)
            if inner is not None:
                found.setdefault(id(inner), inner)
    return [config for config in found.values() if isinstance(config, PreTrainedConfig)]


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    maps: MapRule | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query [B, M, q, d], key [B, K, T, d], value [B, V, T, dv]; gives [B, q, H, dv] and None.

    K divides M, V divides H; M is H unless the rule `maps` joins maps.
    """
    _check_known(module, kwargs)
    if kwargs.get("s_aux") is not None:
        raise ProbeError(
            f"attention_sites computes a softmax over keys only: {type(module).__name__} adds attention sinks (s_aux) "
            "to it. Its hidden states can be observed, its attention logits cannot."
        )
    session: _Session = module.site_session  # type: ignore[assignment]
    mask = as_mask(
        attention_mask,
        query.shape[2],
        key.shape[2],
        causal=bool(kwargs.get("is_causal", getattr(module, "is_causal", True))),
        window=kwargs.get("sliding_window"),
        device=query.device,
    )
    fresh = session.first_call(module, query, key, attention_mask)
    call = _call(
        *_entering(module, query, key, value, mask, fresh=fresh),
        mask,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        maps or MapRule(),
        block_size=session.block_size,
        softcap=softcap,
    )
    outputs = _walk(call, module, fresh=fresh, dropout=dropout if module.training else 0.0)
    return outputs, None


def _check_known(module: nn.Module, options: Mapping[str, Any]) -> None:
    """Refuse tensors that decide on the result in a way that is not known here, as which keys a query reads."""
    unknown = [
        name for name in options if name not in {*WITHOUT_EFFECT, "s_aux"} and _holds_tensor(options[name])
    ]
    if unknown:
        raise ProbeError(
            f"attention_sites computes softmax(scale q k^T + mask) v: {type(module).__name__} gives its attention "
            f"{', '.join(sorted(unknown))} besides, which that leaves out. Its hidden states can be observed, its "
            "attention logits cannot."
        )


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensor, value.values()))
    return isinstance(value, Tensor) or (isinstance(value, list | tuple) and any(map(_holds_tensor, value)))


def _entering(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Mask, *, fresh: bool
) -> tuple[Tensor, Tensor | Aged, Tensor | Aged]:
    """Queries, keys and values through their sites. Hooks see values at every call, the others where they are new."""
    sites = [module.get_submodule(name) for name in ("attn_query", "attn_key", "attn_value")]
    of_query, of_key = (site if fresh else site.forward for site in sites[:2])
    queries, keys = Tokens(mask.text_queries), Tokens(mask.text_keys)
    return of_query(query, queries), of_key(key, keys), sites[2](value, keys)


def blocked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float,
    maps: MapRule,
    block_size: int | None = None,
) -> Tensor:
    """The same attention without sites: what a rule means where `attention_sites` is not entered. [B, q, H, dv]."""
    mask = as_mask(
        attention_mask, query.shape[2], key.shape[2], causal=True, window=None, device=query.device
    )
    call = _call(query, key, value, mask, scaling, maps, block_size=block_size)
    blocks = (call.outputs(maps.combine(call.probs(call.logits(b), b), b), b) for b in call.blocks())
    return torch.cat(list(blocks), dim=1)


def _call(
    query: Tensor,
    key: Tensor | Aged,
    value: Tensor | Aged,
    mask: Mask,
    scaling: float,
    maps: MapRule,
    *,
    block_size: int | None,
    softcap: float | None = None,
) -> AttentionCall:
    newest = [x.recent if isinstance(x, Aged) else x for x in (key, value)]
    return AttentionCall(
        query,
        *_laid_out(*newest),
        mask,
        scaling,
        softcap,
        rows_of_block(block_size, query.shape[0] * query.shape[1], mask.num_keys),
        maps,
        _past(key, value),
    )


def _past(key: Tensor | Aged, value: Tensor | Aged) -> Past | None:
    """What older keys and values are, where a site gave `Aged`."""
    if not isinstance(key, Aged) or not isinstance(value, Aged):
        assert not isinstance(key, Aged) and not isinstance(value, Aged), "a cache holds keys and values"
        return None
    return Past(*_laid_out(key.past, value.past), key.newest, value.newest)


def _laid_out(key_BKTd: Tensor, value_BKTd: Tensor) -> tuple[Tensor, Tensor]:
    """[B * K, d, T] and [B * K, T, d], contiguous."""
    key, value = (x.reshape(-1, *x.shape[2:]) for x in (key_BKTd, value_BKTd))
    return key.transpose(1, 2).contiguous(), value.contiguous()


def _walk(call: AttentionCall, module: nn.Module, *, fresh: bool, dropout: float) -> Tensor:
    """All blocks through the sites; a site whose range spans rows is shown all of them first.

    Hooks see a block once: on the last walk, and only when the call shows new logits. Until then, and on a repeated
    call, the sites' plain `forward` runs; a repeated call reuses the ranges of the first.
    """
    sites = [site for name in MAP_SITES if (site := getattr(module, name, None)) is not None]
    assert len(sites) == 2 + call.rule.combines, "a layer that joins maps declares combines_maps"
    for position, site in enumerate(sites):
        if fresh and site.spans_rows:
            site.begin()
            for block in call.blocks():
                site.observe(_arriving(call, [each.forward for each in sites[:position]], block), block)
    *passed, last = sites if fresh else [site.forward for site in sites]
    outputs = []
    for block in call.blocks():
        weights = last(_arriving(call, passed, block), block)
        outputs.append(call.outputs(F.dropout(weights, dropout) if dropout else weights, block))
    return torch.cat(outputs, dim=1)


def _arriving(call: AttentionCall, passed: Sequence[Callable[..., Tensor]], block: QueryBlock) -> Tensor:
    """What reaches the next site when a block has gone through those passed."""
    x = call.logits(block)
    for site, stage in zip(passed, (call.probs, call.rule.combine), strict=False):
        x = stage(site(x, block), block)
    return x


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, mask_rule)
