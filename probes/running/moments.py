"""The first four moments of a stream, in float64, and merging that rounds nothing.

A tensor gives its sums of powers in float64, around its mean where that is far from 0, so that an offset costs no
digits. They are turned into power sums as exact dyadic rationals, which add without rounding: merging is associative,
and the only rounding is inside one tensor: relative to sum |x - mean|^p of the whole below 1e-13, for any split.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probes.running.chunks import buffer, chunks

CHUNK = 1 << 16
"""Values that are summed at once: half a MiB in float64, which stays in a core's cache."""


@dataclass(frozen=True)
class MomentValues:
    """What `Moments` yields. Kurtosis is not excess: a normal distribution has 3."""

    n: int
    mean: float
    variance: float
    """Divided by n."""
    skewness: float
    kurtosis: float

    @property
    def unbiased_variance(self) -> float:
        """Divided by n - 1."""
        return self.variance * self.n / max(1, self.n - 1)

    @property
    def fourth(self) -> float:
        """Mean of (x - mean)^4."""
        return self.kurtosis * self.variance**2


class Moments:
    """Count, mean, variance, skewness and kurtosis of the finite values of a stream.

    `_sums` are sum x^p for p = 1..4, each an integer times 2^-(1074 p): a float64 is an integer times 2^-1074.
    """

    def __init__(self) -> None:
        self.n = 0
        self._sums = [0, 0, 0, 0]

    def add(self, x: Tensor) -> None:
        """Take in a tensor of any shape; NaN and infinities are passed over."""
        x = x.detach()
        n, shift, sums = x.numel(), 0.0, _power_sums(x, 0.0)
        if not all(map(math.isfinite, sums)):
            x = x[x.isfinite()]
            n, sums = x.numel(), _power_sums(x, 0.0)
        # Around 0, an offset of two standard deviations costs no more than two digits; a larger one is taken off.
        if n and sums[0] ** 2 > 4 * (n * sums[1] - sums[0] ** 2):
            shift = sums[0] / n
            sums = _power_sums(x, shift)
        self._take(n, shift, *sums)

    def merge(self, other: "Moments") -> None:
        """Take in what another has seen; exact."""
        self.n += other.n
        self._sums = [ours + theirs for ours, theirs in zip(self._sums, other._sums, strict=True)]

    def value(self) -> MomentValues:
        """The moments; zeros when nothing, or only one value again and again, was seen."""
        n, (s1, s2, s3, s4) = self.n, self._sums
        # n^p times the central sums over n, all integers: what cancels here cancels exactly.
        c2 = n * s2 - s1**2
        c3 = n**2 * s3 - 3 * n * s1 * s2 + 2 * s1**3
        c4 = n**3 * s4 - 4 * n**2 * s1 * s3 + 6 * n * s1**2 * s2 - 3 * s1**4
        mean = s1 / (n << 1074) if n else 0.0
        if c2 <= 0:
            return MomentValues(n, mean, 0.0, 0.0, 0.0)
        skewness = float(c3**2 / c2**3) ** 0.5 * (1 if c3 > 0 else -1)
        return MomentValues(n, mean, c2 / (n**2 << 2148), skewness, c4 / c2**2)

    def state_dict(self) -> dict[str, Any]:
        """Counts and exact sums as hexadecimal text, since they exceed 64 bits."""
        return {"n": self.n, "sums": [hex(value) for value in self._sums]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n, self._sums = int(state["n"]), [int(value, 16) for value in state["sums"]]

    def _take(self, n: int, shift: float, d1: float, d2: float, d3: float, d4: float) -> None:
        """Add n values given by sums of powers of their deviation from `shift`, with x = shift + deviation expanded."""
        m = _scaled(shift)
        e1, e2, e3, e4 = (_scaled(d) << (1074 * p) for p, d in enumerate((d1, d2, d3, d4)))
        self.n += n
        self._sums[0] += n * m + e1
        self._sums[1] += n * m**2 + 2 * m * e1 + e2
        self._sums[2] += n * m**3 + 3 * m**2 * e1 + 3 * m * e2 + e3
        self._sums[3] += n * m**4 + 4 * m**3 * e1 + 6 * m**2 * e2 + 4 * m * e3 + e4


def _power_sums(x: Tensor, shift: float) -> tuple[float, float, float, float]:
    """sum (x - shift)^p for p = 1..4, in float64, chunk by chunk in one buffer."""
    first, products = [], x.new_zeros(2, 2, dtype=torch.float64)
    for shape, parts in chunks(x, CHUNK):
        powers = buffer(2, CHUNK, torch.float64, x.device)[:, : math.prod(shape)]
        (deviation, square), transposed = powers, powers.t()
        target = deviation.view(shape)
        for part in parts:
            target.copy_(part)
            if shift:
                deviation -= shift
            torch.mul(deviation, deviation, out=square)
            first.append(deviation.sum())
            products.addmm_(powers, transposed)  # of (x - shift) and its square, with each other
    (d2, d3), (_, d4) = products.tolist()
    return float(torch.stack(first).sum()) if first else 0.0, d2, d3, d4


def _scaled(value: float) -> int:
    """value * 2^1074, an exact integer."""
    numerator, denominator = value.as_integer_ratio()
    return numerator * ((1 << 1074) // denominator)
