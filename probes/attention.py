"""Attention with sites: `attention_sites(model)` makes attention logits and probabilities modules that can be hooked.

One attention function, registered with transformers' `AttentionInterface`, walks the queries in blocks, each against
the keys it may see, and calls two `Site` modules of the attention layer:

    logits = softcap(scale * q k^T) + bias    ->  attn_logits
    probs  = softmax(mask(logits))            ->  attn_probs
    out    = probs v

No tensor holds T x T: memory is O(block x T). Outside the block the model is what it was.

Against the eager implementation in float32, each logit differs by at most 2 gamma_d sum_i |q_i k_i| scale
(gamma_n = n eps / (1 - n eps), two dot products of length d in different orders), each probability relatively by twice
the largest logit difference plus gamma_T, each output by that times sum_j p_j |v_j| plus gamma_T of the same.
A query that sees no key (padding) gives zeros, as SDPA does.

Letters: B sequences, H query heads, K key heads, q query rows of a block, T keys, d channels.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.configuration_utils import PreTrainedConfig

from probes.errors import ProbeError
from probes.hooks import around
from probes.mask_rules import as_mask, mask_rule
from probes.query_blocks import AttentionCall, rows_of_block
from probes.sites import Site, attention_layers, decoder_stack

NAME = "attention_sites"
"""Under which the attention function and its mask function are registered with transformers."""


class _Session:
    """What the attention function remembers of one model between calls."""

    def __init__(self, layers: list[tuple[str, nn.Module]], block_size: int | None) -> None:
        self.names = {module: name for name, module in layers}
        self.block_size = block_size
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
        if missed:
            module = type(next(module for module, name in self.names.items() if name == missed[0])).__name__
            raise ProbeError(
                f"Every attention layer must go through transformers' AttentionInterface to have sites: "
                f"{len(missed)} of {len(self.names)} did not, the first is {missed[0]} ({module}), so its attention "
                "logits cannot be observed. Its hidden states can."
            )


@contextmanager
def attention_sites(model: nn.Module, *, block_size: int | None = None) -> Iterator[None]:
    """Give every attention layer of the model the sites `attn_logits` and `attn_probs` for the span of the block.

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
    session = _Session(layers, block_size)
    _, stack = decoder_stack(model)
    configs = [(config, config._attn_implementation) for config in _configs(model)]
    try:
        for _, module in layers:
            module.attn_logits, module.attn_probs = Site(), Site()
            module.site_session = session  # type: ignore[assignment]
        for config, _ in configs:
            config._attn_implementation = NAME
        with around(stack, session.begin, session.check):
            yield
    finally:
        for config, implementation in configs:
            config._attn_implementation = implementation
        for _, module in layers:
            for name in ("attn_logits", "attn_probs", "site_session"):
                if hasattr(module, name):
                    delattr(module, name)


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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query [B, H, q, d], key and value [B, K, T, d]; gives [B, q, H, d] and no weights."""
    if kwargs.get("s_aux") is not None:
        raise ProbeError(
            f"attention_sites computes a softmax over keys only: {type(module).__name__} adds attention sinks (s_aux) "
            "to it. Its hidden states can be observed, its attention logits cannot."
        )
    session: _Session = module.site_session  # type: ignore[assignment]
    causal = bool(kwargs.get("is_causal", getattr(module, "is_causal", True)))
    call = AttentionCall(
        query,
        key.reshape(-1, *key.shape[2:]).transpose(1, 2).contiguous(),
        value.reshape(-1, *value.shape[2:]).contiguous(),
        as_mask(
            attention_mask,
            query.shape[2],
            key.shape[2],
            causal=causal,
            window=kwargs.get("sliding_window"),
            device=query.device,
        ),
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap,
        rows_of_block(session.block_size, query.shape[0] * query.shape[1], key.shape[2]),
    )
    fresh = session.first_call(module, query, key, attention_mask)
    outputs = _walk(call, module, fresh=fresh, dropout=dropout if module.training else 0.0)
    return outputs, None


def _walk(call: AttentionCall, module: nn.Module, *, fresh: bool, dropout: float) -> Tensor:
    """All blocks through both sites; a site whose range spans rows is shown all of them first.

    Hooks see a block once: on the last walk, and only when the call shows new logits. Until then, and on a repeated
    call, the sites' plain `forward` runs; a repeated call reuses the ranges of the first.
    """
    logits_site, probs_site = module.attn_logits, module.attn_probs
    assert isinstance(logits_site, nn.Module)
    assert isinstance(probs_site, nn.Module)
    if fresh and logits_site.spans_rows:
        logits_site.begin()  # type: ignore[operator]
        for block in call.blocks():
            logits_site.observe(call.logits(block), block)  # type: ignore[operator]
    if fresh and probs_site.spans_rows:
        probs_site.begin()  # type: ignore[operator]
        for block in call.blocks():
            probs = call.probs(logits_site.forward(call.logits(block), block), block)
            probs_site.observe(probs, block)  # type: ignore[operator]
    outputs = []
    for block in call.blocks():
        see_logits, see_probs = (
            (logits_site, probs_site) if fresh else (logits_site.forward, probs_site.forward)
        )
        probs = see_probs(call.probs(see_logits(call.logits(block), block), block), block)
        outputs.append(call.outputs(F.dropout(probs, dropout) if dropout else probs, block))
    return torch.cat(outputs, dim=1)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, mask_rule)
