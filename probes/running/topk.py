"""The k largest magnitudes of a stream, exactly, with where each one stood."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CHUNK = 1 << 16
"""Candidates that are ordered at once."""


class TopK:
    """The k largest |x|, largest first; equal values by their place, smallest first, column by column.

    Args:
        k: how many are kept, 1 to 1000.
        columns: names of the integers that say where a value stood, e.g. `("layer", "position", "channel")`.
    """

    def __init__(self, k: int, columns: Sequence[str]) -> None:
        assert 1 <= k <= 1000, f"k must be 1 to 1000: found {k}"
        self.k, self.columns = k, tuple(columns)
        self.values: NDArray[np.float64] = np.empty(0)
        self.places: NDArray[np.int64] = np.empty((0, len(self.columns)), np.int64)

    @property
    def threshold(self) -> float:
        """A value below this cannot enter; -inf until k are held."""
        return float(self.values[-1]) if len(self.values) == self.k else -np.inf

    def add(self, x: Tensor, place: Callable[[NDArray[np.int64]], NDArray[np.int64]]) -> None:
        """Offer |x|, any shape; NaN and infinities are passed over.

        Args:
            place: positions in the flattened x, int64 [n] -> their places, int64 [n, columns].
        """
        x = x.detach().abs().flatten()
        rows = _candidates(x, max(self.threshold, 0.0), self.k)
        values = x[rows].double().cpu().numpy()
        positions = rows.cpu().numpy()
        for start in range(0, len(values), CHUNK):
            chunk = slice(start, start + CHUNK)
            self._take(
                values[chunk], np.asarray(place(positions[chunk]), np.int64).reshape(-1, len(self.columns))
            )

    def merge(self, other: "TopK") -> None:
        """Take in what another has kept."""
        assert (self.k, self.columns) == (other.k, other.columns)
        self._take(other.values, other.places)

    def value(self) -> dict[str, NDArray[Any]]:
        """Columns: `value` float64, then the place's int64 columns; at most k rows, largest first."""
        return {"value": self.values} | {name: self.places[:, i] for i, name in enumerate(self.columns)}

    def nth(self, n: int) -> float | None:
        """The n-th largest magnitude, n from 1; None when fewer were seen or kept."""
        return float(self.values[n - 1]) if n <= len(self.values) else None

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values.copy(), "places": self.places.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values, self.places = np.array(state["values"]), np.array(state["places"])

    def _take(self, values: NDArray[np.float64], places: NDArray[np.int64]) -> None:
        values = np.concatenate([self.values, values])
        places = np.concatenate([self.places, places])
        order = np.lexsort((*places.T[::-1], -values))[: self.k]
        self.values, self.places = values[order], places[order]


def _candidates(x: Tensor, threshold: float, k: int) -> Tensor:
    """Positions of everything that could be among the k largest of x with the threshold, ties included."""
    rows = (x >= threshold).nonzero().flatten()
    found = x[rows]
    if len(rows) and not bool(found.amax() < torch.inf):
        rows = rows[found < torch.inf]
        found = x[rows]
    if len(rows) > 4 * k:  # a first, empty or small heap: cut by the k-th largest of these
        rows = rows[found >= found.topk(k).values[-1]]
    return rows
