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

Bits do not depend on the block size on a CPU in float32: rows enter products in multiples of 16, and keys are summed
in chunks of 128 at fixed places.

Letters: B sequences, H query heads, K key heads, N = H / K, q query rows of a block, t keys of a block, d channels.
"""

import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.configuration_utils import PreTrainedConfig

from probes.errors import ProbeError
from probes.hooks import around
from probes.masks import Mask, as_mask, mask_rule
from probes.sites import QueryBlock, Site, attention_layers, decoder_stack

NAME = "attention_sites"
"""Under which the attention function and its mask function are registered with transformers."""

ROW_STEP = 16
"""Rows enter a product in multiples of this, so that a row's bits do not depend on its neighbours."""
KEY_STEP = 128
"""Keys enter a block in multiples of this, for the same reason."""
LONG_STEP, LONG = 512, 2048
"""Keys are summed in chunks at fixed places: of `KEY_STEP` keys, or of `LONG_STEP` where there are `LONG` or more."""
BLOCK_ELEMENTS = 1 << 21
"""Logits in a block when no size is given: 8 MiB of float32. Smaller blocks cost more in calls than cache saves."""


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


@dataclass
class _Call:
    """One attention call, its keys and values laid out once."""

    query: Tensor
    """[B, H, queries, d]."""
    key: Tensor
    """[B * K, d, T]."""
    value: Tensor
    """[B * K, T, d]."""
    mask: Mask
    scaling: float
    softcap: float | None
    block_size: int

    def __post_init__(self) -> None:
        self.num_keys = self.key.shape[2]
        self.chunk = KEY_STEP if self.num_keys < LONG else LONG_STEP
        self._scratch: dict[str, Tensor] = {}

    def blocks(self) -> Iterator[QueryBlock]:
        """The blocks in order, with what each may see."""
        num_queries, num_keys = self.query.shape[2], self.num_keys
        for start in range(0, num_queries, self.block_size):
            stop = min(num_queries, start + self.block_size)
            reach = self.mask.reach(start, stop)
            first = reach.first // self.chunk * self.chunk
            last = min(num_keys, -(-reach.last // KEY_STEP) * KEY_STEP)
            yield QueryBlock(
                visible=self.mask.visible(start, stop, first, last),
                start=start,
                key_start=first,
                num_queries=num_queries,
                num_keys=num_keys,
                seen_by_all=(reach.all_first - first, reach.all_last - first),
            )

    def logits(self, block: QueryBlock) -> Tensor:
        """[B, H, q, t]: scaled, soft-capped and biased, not masked."""
        rows, keys = block.visible.shape[-2:]
        batch, heads, _, width = self.query.shape
        query = _pad_rows(self.query[:, :, block.start : block.start + rows])
        query = query.reshape(self.key.shape[0], -1, width)
        key = self.key[:, :, block.key_start : block.key_start + keys]
        out = self._buffer("logits", query, (*query.shape[:2], keys), query.dtype)
        logits = torch.baddbmm(query.new_zeros(1), query, key, beta=0, alpha=self.scaling, out=out)
        logits = logits.view(batch, heads, -1, keys)[:, :, :rows]
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        bias = self.mask.bias(block.start, block.start + rows, block.key_start, block.key_start + keys)
        return logits if bias is None else logits + bias

    def probs(self, logits_BHqt: Tensor, block: QueryBlock) -> Tensor:
        """[B, H, q, t]: softmax in float32 over what is visible; a query that sees nothing gets zeros."""
        masked = logits_BHqt.clone() if logits_BHqt.requires_grad else logits_BHqt
        first, last = block.seen_by_all
        for a, b in ((0, first), (last, masked.shape[-1])) if last > first else ((0, masked.shape[-1]),):
            if b > a:
                masked[..., a:b].masked_fill_(~block.visible[..., a:b], -torch.inf)
        out = self._buffer("probs", masked, masked.shape, torch.float32)
        probs = torch.softmax(masked, -1, dtype=torch.float32, out=out).to(self.query.dtype)
        if self.mask.reach(block.start, block.start + masked.shape[2]).blind:
            probs = probs.masked_fill(~block.visible.any(-1, keepdim=True), 0.0)
        return probs

    def outputs(self, probs_BHqt: Tensor, block: QueryBlock) -> Tensor:
        """[B, q, H, d]: probabilities times values."""
        batch, heads, rows, keys = probs_BHqt.shape
        probs = _pad_rows(probs_BHqt).reshape(self.value.shape[0], -1, keys)
        # Sums in chunks only where they are not rounded to fewer bits between chunks.
        exact = probs.dtype in (torch.float32, torch.float64) and probs.device.type == "cpu"
        step = self.chunk if exact else keys
        out = probs.new_zeros(*probs.shape[:2], self.value.shape[-1])
        for start in range(0, keys, step):
            part = probs[..., start : start + step]
            value = self.value[:, block.key_start + start :][:, :step]
            if (
                exact and part.shape[-1] < value.shape[1]
            ):  # the last chunk is as long in every block: its sum is the same
                part = F.pad(part, (0, value.shape[1] - part.shape[-1]))
            out = torch.baddbmm(out, part, value[:, : part.shape[-1]])
        return out.view(batch, heads, -1, out.shape[-1])[:, :, :rows].transpose(1, 2)

    def _buffer(self, name: str, like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """Memory of the call's largest block, used again by every block: fresh pages would cost as much as a softmax.

        None where a gradient is taken, which must keep every block.
        """
        if torch.is_grad_enabled():
            return None
        size = math.prod(shape)
        if name not in self._scratch or self._scratch[name].numel() < size:
            rows = size // shape[-1]
            self._scratch[name] = torch.empty(rows * self.num_keys, dtype=dtype, device=like.device)
        return self._scratch[name][:size].view(*shape)


def _pad_rows(x_BHqd: Tensor) -> Tensor:
    """Zero rows up to a multiple of `ROW_STEP`."""
    missing = -x_BHqd.shape[2] % ROW_STEP
    return F.pad(x_BHqd, (0, 0, 0, missing)) if missing else x_BHqd


def _rows_of_block(asked: int | None, num_maps: int, num_keys: int) -> int:
    """Rows of a block: what was asked, or what fits the cache and wastes little at the diagonal; a multiple of 16."""
    rows = asked if asked is not None else min(256, num_keys // 8, BLOCK_ELEMENTS // (num_maps * num_keys))
    return max(1, -(-rows // ROW_STEP)) * ROW_STEP


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
    call = _Call(
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
        _rows_of_block(session.block_size, query.shape[0] * query.shape[1], key.shape[2]),
    )
    fresh = session.first_call(module, query, key, attention_mask)
    outputs = _walk(call, module, fresh=fresh, dropout=dropout if module.training else 0.0)
    return outputs, None


def _walk(call: _Call, module: nn.Module, *, fresh: bool, dropout: float) -> Tensor:
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
