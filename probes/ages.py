"""Ages of keys: which a query reads as they were made, and which as a cache gives them back.

Letters: B sequences, H query heads, K key heads, q query rows of a block, t keys of a block, T keys, d channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from probes.sites import QueryBlock


@dataclass(frozen=True)
class Past:
    """Keys and values as a cache gives them back; a query's newest keys are read as they were instead."""

    key: Tensor
    """[B * K, d, T]."""
    value: Tensor
    """[B * K, T, d]."""
    window: int
    """How many keys, up to the query's own, are not read from the cache."""

    def ages(self, block: QueryBlock, step: int) -> "Ages":
        """Which keys are recent: the last `window` of each query, whose own is the last that it sees."""
        num_keys = block.visible.shape[-1]
        columns = torch.arange(1, num_keys + 1, device=block.visible.device)
        own = (block.visible * columns).amax(-1, keepdim=True)
        oldest, newest = (max(0, int(end) - self.window) for end in own.aminmax())
        return Ages(
            columns > own - self.window, oldest // step * step, min(num_keys, -(-newest // step) * step)
        )


@dataclass(frozen=True)
class Ages:
    """Where the keys of a block are read from."""

    recent: Tensor
    """bool, broadcastable to [B, H, q, t]."""
    first: int
    """Columns before it are older for every query; a multiple of the step in which keys are summed."""
    last: int
    """Columns from it on are recent for every query; likewise, or the number of keys."""
