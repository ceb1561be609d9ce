"""The exact float32 median of a stream in two passes: a radix select on the bit pattern.

The first pass is a `Histogram`: it tells in which bucket (16 high bits) the median lies and at which rank inside. The
second pass counts the 16 low bits of the values of that bucket.
"""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probes.running.chunks import buffer, chunks
from probes.running.histogram import CHUNK, Histogram, float_of


class ExactQuantile:
    """Second pass over the data that a `Histogram` has seen: the exact lower quantile of |x|, the median by default."""

    def __init__(self, first_pass: Histogram, q: float = 0.5) -> None:
        n = first_pass.n
        assert n > 0, "the first pass saw no value"
        rank = (n - 1) // 2 if q == 0.5 else int(q * (n - 1))
        self.bucket, self.rank = first_pass.bucket_of(rank)
        self.num_expected = int(first_pass.counts[self.bucket])
        self.counts = np.zeros(1 << 16, np.int64)

    def add(self, x: Tensor) -> None:
        """Take in a tensor of any shape, of the same stream as the first pass."""
        low = [np.empty(0, np.int32)]
        for shape, parts in chunks(x.detach().float(), CHUNK):
            magnitudes = buffer(1, CHUNK, torch.float32, x.device)[0, : math.prod(shape)]
            for part in parts:
                torch.abs(part, out=magnitudes.view(shape))
                low.append(self._low_bits(magnitudes.view(torch.int32)))
        self.counts += np.bincount(np.concatenate(low), minlength=1 << 16)

    def merge(self, other: "ExactQuantile") -> None:
        """Take in what another has counted for the same bucket."""
        assert (self.bucket, self.rank) == (other.bucket, other.rank)
        self.counts += other.counts

    def value(self) -> float:
        """The quantile, exactly as it stood in the data."""
        found = int(self.counts.sum())
        assert found == self.num_expected, f"the passes saw different data: {self.num_expected} then {found}"
        low = int(np.searchsorted(np.cumsum(self.counts), self.rank, side="right"))
        return float_of((self.bucket << 16) | low)

    def state_dict(self) -> dict[str, Any]:
        return {
            "bucket": self.bucket,
            "rank": self.rank,
            "expected": self.num_expected,
            "counts": self.counts.copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bucket, self.rank, self.num_expected = state["bucket"], state["rank"], state["expected"]
        self.counts = np.array(state["counts"])

    def _low_bits(self, bits: Tensor) -> NDArray[np.int32]:
        """The low bits of the patterns in the bucket. Changes `bits`."""
        # The high bits equal the bucket's just where xor leaves only low bits; NaN and infinities never do.
        bits.bitwise_xor_(self.bucket << 16)
        if bits.device.type == "cpu":  # numpy compares and selects in half of torch's time
            found: NDArray[np.int32] = bits.numpy()
            return found[found < 1 << 16]
        return np.asarray(bits[bits < 1 << 16].cpu())
