"""Ages of keys: which a query reads as they were made, and which as a cache gives them back.

Letters: B sequences, H query heads, K key heads, q query rows of a block, t keys of a block, T keys, d channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from probes.sites import Newest, QueryBlock


@dataclass(frozen=True)
class Past:
    """Keys and values as a cache gives them back; a query's newest ones are read as they were instead."""

    key: Tensor
    """[B * K, d, T]."""
    value: Tensor
    """[B * K, T, d]."""
    newest_keys: Newest
    """Which keys are not read from the cache."""
    newest_values: Newest
    """Which values are not."""


def ages(newest: Newest, block: QueryBlock, step: int) -> "Ages":
    """Which keys of a block are recent for each of its queries, whose own key is the last that it sees."""
    num_keys = block.visible.shape[-1]
    columns = torch.arange(1, num_keys + 1, device=block.visible.device)
    own = (block.visible * columns).amax(-1, keepdim=True)
    last_cached = own - newest.window
    if newest.step > 1:
        assert newest.first is not None, "whole steps are counted from a sequence's first token"
        before = newest.first.to(own.device) - block.key_start
        last_cached = before + (last_cached - before).clamp(min=0) // newest.step * newest.step
    oldest, latest = (max(0, int(end)) for end in last_cached.aminmax())
    return Ages(columns > last_cached, oldest // step * step, min(num_keys, -(-latest // step) * step))


@dataclass(frozen=True)
class Ages:
    """Where the keys of a block are read from."""

    recent: Tensor
    """bool, broadcastable to [B, H, q, t]."""
    first: int
    """Columns before it are older for every query; a multiple of the step in which keys are summed."""
    last: int
    """Columns from it on are recent for every query; likewise, or the number of keys."""
