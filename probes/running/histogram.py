"""An exact histogram of magnitudes over their bit pattern: any quantile within 2^-8, in one pass and 256 KiB.

The 16 high bits of a float32 are a bfloat16. Their 15 bits without the sign name a bucket, in the order of |x|: one
bucket per bfloat16 value, 128 to the octave. Whatever the data's range, nothing is clipped and nothing is chosen.
"""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probes.running.chunks import buffer, chunks

NUM_BUCKETS = 0x7F80
"""Patterns below infinity's."""
CHUNK = 1 << 18
"""Values that are counted at once: 1 MiB, which stays in a core's cache."""


class Histogram:
    """Counts of |x| by bfloat16 pattern, and of NaN, +Inf and -Inf, which enter no bucket.

    Quantiles are lower ones: of n values in order, the one at floor(q (n - 1)); at 0.5 what `torch.median` gives.
    They are exact when all data are bfloat16 values; otherwise the middle of a bucket, within 2^-8 relative
    (absolute 2^-134 below float32's normal numbers). float64 is rounded to float32 first.
    """

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(NUM_BUCKETS, np.int64)
        self.nan = self.pos_inf = self.neg_inf = 0
        self.only_bfloat16 = True
        """Whether every value so far was a bfloat16, so that a bucket holds one value."""

    @property
    def n(self) -> int:
        """Finite values."""
        return int(self.counts.sum())

    def add(self, x: Tensor) -> None:
        """Take in a tensor of any shape and floating dtype."""
        self.add_finite(self.finite(x.detach()))

    def finite(self, x: Tensor) -> Tensor:
        """x without its NaN and infinities, which are counted; x itself when it has none."""
        if not x.numel() or bool(torch.maximum(x.amax(), -x.amin()) < torch.inf):
            return x
        self.nan += int(x.isnan().sum())
        self.pos_inf += int((x == torch.inf).sum())
        self.neg_inf += int((x == -torch.inf).sum())
        return x[x.isfinite()]

    def add_finite(self, x: Tensor) -> None:
        """Take in values known to be finite."""
        if not x.numel():
            return
        bits = x.float().view(torch.int32)
        if self.only_bfloat16 and x.dtype != torch.bfloat16:
            self.only_bfloat16 = not bool((bits & 0xFFFF).any())
        for shape, parts in chunks(bits, CHUNK):
            buckets = buffer(1, CHUNK, torch.int32, x.device)[0, : math.prod(shape)]
            for part in parts:
                # The sign goes with the mask, so that no |x| is needed.
                torch.bitwise_right_shift(part, 16, out=buckets.view(shape)).bitwise_and_(0x7FFF)
                self.counts += torch.bincount(buckets, minlength=NUM_BUCKETS).cpu().numpy()

    def merge(self, other: "Histogram") -> None:
        """Take in what another has counted."""
        self.counts += other.counts
        self.nan += other.nan
        self.pos_inf += other.pos_inf
        self.neg_inf += other.neg_inf
        self.only_bfloat16 &= other.only_bfloat16

    def quantile(self, q: float) -> float | None:
        """The lower quantile of |x|, 0 <= q <= 1; None when nothing was counted."""
        assert 0 <= q <= 1
        n = self.n
        return self._middle(self.bucket_of(int(q * (n - 1)) if q != 0.5 else (n - 1) // 2)[0]) if n else None

    def bucket_of(self, rank: int) -> tuple[int, int]:
        """The bucket that holds the value of this rank (0 is the smallest), and the rank within the bucket."""
        upto = np.cumsum(self.counts)
        bucket = int(np.searchsorted(upto, rank, side="right"))
        return bucket, rank - int(upto[bucket] - self.counts[bucket])

    def count_above(self, magnitude: float) -> int:
        """Values in buckets that begin above the magnitude."""
        return int(self.counts[np.searchsorted(edges(), magnitude, side="right") :].sum())

    def value(self) -> dict[str, NDArray[Any]]:
        """Columns `magnitude` (lower edge of a bucket, float64) and `count` (int64) of the buckets that hold values."""
        held = np.flatnonzero(self.counts)
        return {"magnitude": edges()[held], "count": self.counts[held]}

    def state_dict(self) -> dict[str, Any]:
        names = ("nan", "pos_inf", "neg_inf", "only_bfloat16")
        return {"counts": self.counts.copy()} | {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts = np.array(state["counts"])
        for name in ("nan", "pos_inf", "neg_inf", "only_bfloat16"):
            setattr(self, name, state[name])

    def _middle(self, bucket: int) -> float:
        pattern = bucket << 16
        return float_of(pattern if self.only_bfloat16 or bucket == 0 else pattern + 0x8000)


def edges() -> NDArray[np.float64]:
    """Lower edges of the buckets, ascending, float64."""
    return (np.arange(NUM_BUCKETS, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)


def float_of(pattern: int) -> float:
    """The float32 with these bits."""
    return float(np.array(pattern, np.uint32).view(np.float32))
