"""One attention call, walked in blocks of queries: logits, probabilities and outputs of a block.

Bits do not depend on the block size on a CPU in float32: rows enter products in multiples of 16, and keys are summed in
chunks at fixed places.

Letters: B sequences, H query heads, K key heads, q query rows of a block, t keys of a block, T keys, d channels.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from probes.ages import Past, ages
from probes.maps import MapRule
from probes.masks import Mask
from probes.sites import QueryBlock

ROW_STEP = 16
"""Rows enter a product in multiples of this, so that a row's bits do not depend on its neighbours."""
KEY_STEP = 128
"""Keys enter a block in multiples of this, for the same reason."""
LONG_STEP, LONG = 512, 2048
"""Keys are summed in chunks at fixed places: of `KEY_STEP` keys, or of `LONG_STEP` where there are `LONG` or more."""
BLOCK_ELEMENTS = 1 << 21
"""Logits in a block when no size is given: 8 MiB of float32. Smaller blocks cost more in calls than cache saves."""


@dataclass
class AttentionCall:
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
    rule: MapRule = field(default_factory=MapRule)
    past: Past | None = None
    """What queries read in place of keys and values that are not among their newest."""

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
        if self.past is None:
            logits = self._products(query, self.key[:, :, block.key_start :][..., :keys], "logits")
        else:
            logits = self._products_of_ages(query, self.past, block)
        logits = logits.view(batch, heads, -1, keys)[:, :, :rows]
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        bias = self.mask.bias(block.start, block.start + rows, block.key_start, block.key_start + keys)
        return logits if bias is None else logits + bias

    def _products(self, query: Tensor, key: Tensor, buffer: str) -> Tensor:
        """[B * K, rows of the group, t]: scaled."""
        out = self._buffer(buffer, query, (*query.shape[:2], key.shape[-1]), query.dtype)
        return torch.baddbmm(query.new_zeros(1), query, key, beta=0, alpha=self.scaling, out=out)

    def _products_of_ages(self, query: Tensor, past: Past, block: QueryBlock) -> Tensor:
        """The same of recent keys as they are and of older ones from the cache."""
        keys = slice(block.key_start, block.key_start + block.visible.shape[-1])
        aged = ages(past.newest_keys, block, self.chunk)
        newest = self._products(query, self.key[:, :, keys][..., aged.first :], "logits")
        if not aged.last:
            return newest
        older = self._products(query, past.key[:, :, keys][..., : aged.last], "older")
        shared = aged.last - aged.first
        recent = _pad_rows(aged.recent[..., aged.first : aged.last]).expand(*self.query.shape[:2], -1, -1)
        mixed = torch.where(
            recent,
            newest[..., :shared].reshape(recent.shape),
            older[..., aged.first :].reshape(recent.shape),
        )
        parts = older[..., : aged.first], mixed.view(*newest.shape[:2], shared), newest[..., shared:]
        return torch.cat(parts, -1)

    def probs(self, logits_BHqt: Tensor, block: QueryBlock) -> Tensor:
        """[B, H, q, t]: what the call's rule makes of the logits; may write into them."""
        return self.rule.probs(self, logits_BHqt, block)

    def softmax(self, logits_BHqt: Tensor, block: QueryBlock) -> Tensor:
        """[B, H, q, t]: softmax in float32 (or wider) over what is visible; a query that sees nothing gets zeros."""
        masked = logits_BHqt.clone() if logits_BHqt.requires_grad else logits_BHqt
        first, last = block.seen_by_all
        for a, b in ((0, first), (last, masked.shape[-1])) if last > first else ((0, masked.shape[-1]),):
            if b > a:
                masked[..., a:b].masked_fill_(~block.visible[..., a:b], -torch.inf)
        wide = torch.promote_types(masked.dtype, torch.float32)
        out = self._buffer("probs", masked, masked.shape, wide)
        probs = torch.softmax(masked, -1, dtype=wide, out=out).to(self.query.dtype)
        if self.mask.reach(block.start, block.start + masked.shape[2]).blind:
            probs = probs.masked_fill(~block.visible.any(-1, keepdim=True), 0.0)
        return probs

    def outputs(self, probs_BHqt: Tensor, block: QueryBlock) -> Tensor:
        """[B, q, H, d]: probabilities (or joined maps) times values."""
        if self.past is None:
            return self._weighted(probs_BHqt, self.value, block.key_start)
        aged = ages(self.past.newest_values, block, self.chunk)
        probs, recent = probs_BHqt[..., aged.first :], aged.recent[..., aged.first :]
        newest = self._weighted(probs.masked_fill(~recent, 0.0), self.value, block.key_start + aged.first)
        if not aged.last:
            return newest
        probs, recent = probs_BHqt[..., : aged.last], aged.recent[..., : aged.last]
        return newest + self._weighted(probs.masked_fill(recent, 0.0), self.past.value, block.key_start)

    def _weighted(self, probs_BHqt: Tensor, value: Tensor, key_start: int) -> Tensor:
        """[B, q, H, d]: weights of the keys from `key_start` on times their values."""
        batch, heads, rows, keys = probs_BHqt.shape
        probs = _pad_rows(probs_BHqt).reshape(value.shape[0], -1, keys)
        # Sums in chunks only where they are not rounded to fewer bits between chunks.
        exact = probs.dtype in (torch.float32, torch.float64) and probs.device.type == "cpu"
        step = self.chunk if exact else keys
        out = probs.new_zeros(*probs.shape[:2], value.shape[-1])
        for start in range(0, keys, step):
            part = probs[..., start : start + step]
            chunk = value[:, key_start + start :][:, :step]
            # The last chunk is as long in every block, so that its sum is the same.
            if exact and part.shape[-1] < chunk.shape[1]:
                part = F.pad(part, (0, chunk.shape[1] - part.shape[-1]))
            out = torch.baddbmm(out, part, chunk[:, : part.shape[-1]])
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


def rows_of_block(asked: int | None, num_maps: int, num_keys: int) -> int:
    """Rows of a block: what was asked, or what fits the cache and wastes little at the diagonal; a multiple of 16."""
    rows = asked if asked is not None else min(256, num_keys // 8, BLOCK_ELEMENTS // (num_maps * num_keys))
    return max(1, -(-rows // ROW_STEP)) * ROW_STEP
