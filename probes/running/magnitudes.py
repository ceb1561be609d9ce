"""What a profile keeps of a tensor: largest |x| with place, histogram of |x|, moments of x, in one sweep of a tile."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from probes.running.histogram import Histogram
from probes.running.moments import Moments
from probes.running.topk import TopK


class Magnitudes:
    """A `TopK`, a `Histogram` and `Moments` of the same stream, fed together while a tile is in the cache."""

    def __init__(self, k: int, columns: Sequence[str]) -> None:
        self.topk, self.histogram, self.moments = TopK(k, columns), Histogram(), Moments()

    def add(self, parts: Sequence[Tensor], offer: Callable[[TopK], None]) -> None:
        """Take in values, any shapes.

        Args:
            offer: adds the same values with their places to the `TopK`; called only when one of them could enter,
                which is rare after the first tiles.
        """
        peak = -1.0
        for part in parts:
            largest = float(torch.maximum(part.amax(), -part.amin()))
            if largest < torch.inf:
                self.histogram.add_finite(part)
            else:
                self.histogram.add(part)
                largest = torch.inf
            self.moments.add(part)
            peak = max(peak, largest)
        if peak >= self.topk.threshold:
            offer(self.topk)

    def merge(self, other: "Magnitudes") -> None:
        """Take in what another has seen."""
        for name, statistic in self._all().items():
            statistic.merge(other._all()[name])

    def value(self) -> dict[str, Any]:
        """The values of the three."""
        return {name: statistic.value() for name, statistic in self._all().items()}

    def state_dict(self) -> dict[str, Any]:
        return {name: statistic.state_dict() for name, statistic in self._all().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, statistic in self._all().items():
            statistic.load_state_dict(state[name])

    def _all(self) -> dict[str, Any]:
        return {"topk": self.topk, "histogram": self.histogram, "moments": self.moments}
