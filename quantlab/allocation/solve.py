"""The choice of one width a unit that costs least in sum under a budget: a multiple-choice knapsack, solved exactly.

Partial choices are extended unit by unit, and only those are kept that no other beats in both cost and loss (dynamic
programming over lists: Nemhauser and Ullmann 1969). A partial choice is dropped as soon as the linear relaxation of
what remains (Dyer 1984, Zemel 1984: segments of the units' lower convex hulls, steepest first) says that it cannot
end below the best known choice. Nothing is rounded: costs are integers, losses float64, whose sums are compared to
one part in 10^12.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

__all__ = ["choose"]

_SLACK = 1e-12
"""Relative difference of losses that rounding of sums can make."""


def choose(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], capacity: int) -> list[int]:
    """The position of each unit's choice: the least sum of losses among those whose costs sum to `capacity` at most.

    Args:
        costs, losses: of each unit's options, finite; every unit has one at least.
        capacity: in the units of the costs; the cheapest choice must fit.
    """
    assert sum(map(min, costs)) <= capacity, "the cheapest choice must fit"
    units = [_efficient(*options) for options in zip(costs, losses, strict=True)]
    # The widest first: small units then fill what is left, and few states live long.
    order = sorted(range(len(units)), key=lambda i: int(units[i].cost[0] - units[i].cost[-1]))
    limit = _greedy(units, capacity)
    places = _extend([units[i] for i in order], capacity, limit + _SLACK * abs(limit))
    return [units[i].position[place] for i, place in sorted(zip(order, places, strict=True))]


@dataclass(frozen=True)
class _Options:
    """A unit's options that no other beats, cheapest first: losses fall strictly."""

    cost: NDArray[np.int64]
    loss: NDArray[np.float64]
    position: list[int]
    """Where each stands among all options of the unit."""

    def hull(self) -> list[int]:
        """Places on the lower convex hull, cheapest first."""
        hull: list[int] = []
        for place in range(len(self.cost)):
            while len(hull) > 1 and self.slope(hull[-2], hull[-1]) >= self.slope(hull[-1], place):
                hull.pop()
            hull.append(place)
        return hull

    def slope(self, first: int, last: int) -> float:
        """Loss by cost from one option to another; negative."""
        return float((self.loss[last] - self.loss[first]) / (self.cost[last] - self.cost[first]))


@dataclass(frozen=True)
class _Relaxed:
    """The least loss of some units, were fractions of a choice allowed, by what they may cost."""

    least: int
    """Cost of the cheapest choice."""
    cost: NDArray[np.int64]
    """Of the corners, above `least`."""
    loss: NDArray[np.float64]
    """At the corners."""

    def at(self, slack: NDArray[np.int64]) -> NDArray[np.float64]:
        """The bound where so much may be spent above `least`."""
        return np.interp(slack, self.cost, self.loss)


def _efficient(costs: Sequence[int], losses: Sequence[float]) -> _Options:
    """The options that no other beats."""
    kept: list[int] = []
    for place in sorted(range(len(costs)), key=lambda i: (costs[i], losses[i])):
        if not kept or losses[place] < losses[kept[-1]]:
            kept.append(place)
    return _Options(np.array([costs[i] for i in kept]), np.array([losses[i] for i in kept], float), kept)


def _segments(units: Sequence[_Options]) -> list[tuple[float, int, int, int]]:
    """(slope, unit, from, to) of every segment of the hulls, steepest first; a unit's own in its order."""
    found = []
    for index, unit in enumerate(units):
        hull = unit.hull()
        found += [(unit.slope(a, b), index, a, b) for a, b in pairwise(hull)]
    return sorted(found)


def _tails(units: Sequence[_Options]) -> Iterator[_Relaxed]:
    """The linear relaxation of what follows each unit."""
    segments = _segments(units)
    owner = np.array([i for _, i, _, _ in segments], np.int64)
    costs = np.array([units[i].cost[b] - units[i].cost[a] for _, i, a, b in segments], np.int64)
    losses = np.array([units[i].loss[b] - units[i].loss[a] for _, i, a, b in segments])
    least, base = sum(int(unit.cost[0]) for unit in units), sum(float(unit.loss[0]) for unit in units)
    for index, unit in enumerate(units):
        least, base = least - int(unit.cost[0]), base - float(unit.loss[0])
        after = owner > index
        yield _Relaxed(
            least, np.cumsum(np.insert(costs[after], 0, 0)), np.cumsum(np.insert(losses[after], 0, base))
        )


def _greedy(units: Sequence[_Options], capacity: int) -> float:
    """The loss of a good choice: steps along the hulls, steepest first, as long as they fit."""
    places = [0] * len(units)
    left = capacity - sum(int(unit.cost[0]) for unit in units)
    for _, index, first, last in _segments(units):
        step = int(units[index].cost[last] - units[index].cost[first])
        if places[index] == first and step <= left:
            places[index], left = last, left - step
    return sum(float(unit.loss[place]) for unit, place in zip(units, places, strict=True))


def _extend(units: Sequence[_Options], capacity: int, limit: float) -> list[int]:
    """Extend choices unit by unit; returns the place of each unit's option in the best one.

    Args:
        limit: loss of a known choice, which no choice that is kept need exceed.
    """
    cost, loss = np.zeros(1, np.int64), np.zeros(1)
    history: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for unit, tail in zip(units, _tails(units), strict=True):
        costs = (cost[:, None] + unit.cost).ravel()
        losses = (loss[:, None] + unit.loss).ravel()
        slack = capacity - tail.least - costs
        keep = np.flatnonzero((slack >= 0) & (losses + tail.at(slack) <= limit))
        keep = keep[np.lexsort((losses[keep], costs[keep]))]
        keep = keep[_falls(losses[keep])]
        history.append((keep // len(unit.cost), keep % len(unit.cost)))
        cost, loss = costs[keep], losses[keep]
    return _trace(history, int(np.argmin(loss)))


def _falls(losses: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Where a loss is below all before it."""
    before = np.concatenate([[np.inf], np.minimum.accumulate(losses)[:-1]])
    return losses < before


def _trace(history: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]], state: int) -> list[int]:
    """The options that led to a state, first unit first."""
    places = []
    for parent, place in reversed(history):
        places.append(int(place[state]))
        state = int(parent[state])
    return places[::-1]
