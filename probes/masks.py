"""What a block of queries may see, and the mask that a user gives as a tensor.

Letters: B sequences, H heads, q queries, T keys of the call.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from probes.errors import ProbeError


@dataclass(frozen=True)
class Reach:
    """Keys that a block of queries touches: columns [first, last) of the call."""

    first: int
    last: int
    all_first: int
    """[all_first, all_last): keys that every query of the block sees, in every sequence and head; may be empty."""
    all_last: int
    blind: bool
    """Whether some query sees no key at all (a padding token)."""


class Mask:
    """What each query of a call may see; subclasses say how."""

    num_queries: int
    num_keys: int

    def __init__(self) -> None:
        self._reach: dict[tuple[int, int], Reach] = {}

    def visible(self, start: int, stop: int, first: int, last: int) -> Tensor:
        """bool, broadcastable to [B, H, stop - start, last - first]: queries [start, stop), keys [first, last)."""
        raise AssertionError("a mask says what is visible")

    def bias(self, start: int, stop: int, first: int, last: int) -> Tensor | None:
        """What the mask adds to visible logits, or None."""
        return None

    def text_queries(self) -> Tensor:
        """bool [B or 1, 1, queries, 1]: queries that are text and not padding: each sees some key."""
        return torch.cat([seen.any(-1) for seen in self._walked()], -1).any(1, keepdim=True)[..., None]

    def text_keys(self) -> Tensor:
        """bool [B or 1, 1, T, 1]: keys that are text and not padding: some query sees each."""
        return torch.stack([seen.any(-2) for seen in self._walked()]).any(0).any(1, keepdim=True)[..., None]

    def _walked(self) -> Iterator[Tensor]:
        """What 256 queries at a time see of all keys, bool [B or 1, H or 1, q, T], so that nothing is T x T."""
        for start in range(0, self.num_queries, 256):
            stop = min(self.num_queries, start + 256)
            yield self.visible(start, stop, 0, self.num_keys).expand(-1, -1, stop - start, self.num_keys)

    def reach(self, start: int, stop: int) -> Reach:
        """The keys that queries [start, stop) touch; remembered, since every layer of a forward asks again."""
        if (start, stop) not in self._reach:
            self._reach[start, stop] = self._find_reach(start, stop)
        return self._reach[start, stop]

    def _find_reach(self, start: int, stop: int) -> Reach:
        seen = self.visible(start, stop, 0, self.num_keys)
        seen = seen.expand(*seen.shape[:2], stop - start, self.num_keys)
        some = seen.flatten(0, 2).any(0).nonzero()
        every = seen.flatten(0, 2).all(0).nonzero()
        first, last = (int(some[0]), int(some[-1]) + 1) if len(some) else (0, 1)
        all_first, all_last = (int(every[0]), int(every[-1]) + 1) if len(every) else (first, first)
        if all_last - all_first != len(every):  # not one run of columns
            all_first = all_last = first
        return Reach(first, last, all_first, all_last, blind=not bool(seen.any(-1).all()))


class TensorMask(Mask):
    """A mask that the user gave: bool (True sees) or additive (the dtype's minimum or -inf hides), [B|1, H|1, q, T]."""

    def __init__(self, mask_BHqT: Tensor, num_queries: int, num_keys: int) -> None:
        super().__init__()
        self.num_queries, self.num_keys = num_queries, num_keys
        if (
            mask_BHqT.ndim != 4
            or mask_BHqT.shape[-2] not in (1, num_queries)
            or mask_BHqT.shape[-1] < num_keys
        ):
            raise ProbeError(
                f"A mask must be [batch, heads, queries, keys] with {num_queries} queries and {num_keys} keys: "
                f"found {tuple(mask_BHqT.shape)}. Give a 4D mask of that shape, a 2D padding mask, or none."
            )
        self.mask_BHqT = mask_BHqT.expand(*mask_BHqT.shape[:2], num_queries, mask_BHqT.shape[-1])

    def visible(self, start: int, stop: int, first: int, last: int) -> Tensor:
        """bool [B|1, H|1, stop - start, last - first]."""
        block = self.mask_BHqT[..., start:stop, first:last]
        if block.dtype == torch.bool:
            return block
        if not block.is_floating_point():
            return block != 0
        # A mask of the dtype's minimum may have passed through a sum: half of it is still beyond any bias.
        return block > torch.finfo(block.dtype).min / 2

    def bias(self, start: int, stop: int, first: int, last: int) -> Tensor | None:
        """The additive part of the visible entries, None when it is zero."""
        block = self.mask_BHqT[..., start:stop, first:last]
        if not block.is_floating_point():
            return None
        added = block.masked_fill(~self.visible(start, stop, first, last), 0.0)
        return added if bool(added.any()) else None
