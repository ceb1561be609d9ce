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

    def add(
        self,
        x: Tensor,
        place: Callable[[NDArray[np.int64]], NDArray[np.int64]],
        visible: Tensor | None = None,
    ) -> None:
        """Offer |x|, any shape with at least one axis; NaN and infinities are passed over.

        Args:
            place: positions in the flattened x, int64 [n] -> their places, int64 [n, columns].
            visible: bool, broadcastable to x with as many axes; the rest is left out.
        """
        x = x.detach()
        rows = x.reshape(-1, x.shape[-1])
        kept = torch.arange(len(rows), device=x.device)
        if self.threshold > 0:  # most rows hold nothing large enough
            kept = (
                torch.maximum(rows.amax(-1), -rows.amin(-1))
                .nan_to_num(torch.inf)
                .ge(self.threshold)
                .nonzero()[:, 0]
            )
            if not len(kept):
                return
            rows = rows[kept]
        magnitudes = rows.abs()
        if visible is not None:
            magnitudes = magnitudes.masked_fill(~_rows_of(visible, x.shape, kept), torch.nan)
        found = _candidates(magnitudes.flatten(), max(self.threshold, 0.0), self.k)
        values = magnitudes.flatten()[found].double().cpu().numpy()
        positions = (kept[found // x.shape[-1]] * x.shape[-1] + found % x.shape[-1]).cpu().numpy()
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


def _rows_of(visible: Tensor, shape: torch.Size, rows: Tensor) -> Tensor:
    """The rows of `visible`, broadcast to the shape, by their number: [n, last axis]."""
    places = torch.unravel_index(rows, shape[:-1]) if len(shape) > 1 else ()
    index = tuple(at if size > 1 else at * 0 for at, size in zip(places, visible.shape[:-1], strict=True))
    return visible[index].expand(len(rows), shape[-1]) if index else visible.expand(1, shape[-1])


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
