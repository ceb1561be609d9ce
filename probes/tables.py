"""A profile's statistics as JSON-ready tables: pooled, per layer, per map, and the largest values with their place."""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probes.measures import table5
from probes.running.magnitudes import Magnitudes

Decode = Callable[[list[int]], str]
ByLayerAndMap = Mapping[tuple[int, int], Magnitudes]


def of_logits(statistics: ByLayerAndMap, ids_NT: NDArray[np.int64], decode: Decode | None) -> dict[str, Any]:
    """Attention logits: per layer with `map` None for all maps together, and each map by itself where there are two."""
    layers = sorted({layer for layer, _ in statistics})
    maps = sorted({which for _, which in statistics})
    rows = []
    for layer in layers:
        own = {which: each for (of, which), each in statistics.items() if of == layer}
        rows.append({"layer": layer, "map": None} | table5(merged(own.values())))
        rows += [{"layer": layer, "map": w} | table5(each) for w, each in own.items() if len(own) > 1]
    per_map = [
        {"map": which} | table5(merged(each for (_, of), each in statistics.items() if of == which))
        for which in maps
        if len(maps) > 1
    ]
    pooled = merged(statistics.values())
    tokens = {"query_token": "query", "key_token": "key"}
    return table5(pooled) | {
        "per_layer": rows,
        "per_map": per_map,
        "top": _top(pooled, tokens, ids_NT, decode),
    }


def of_hidden(
    statistics: Mapping[int, Magnitudes], ids_NT: NDArray[np.int64], decode: Decode | None
) -> dict[str, Any]:
    """Hidden states: pooled, per layer, and the largest with the token they stand at."""
    pooled = merged(statistics.values())
    rows = [{"layer": layer} | table5(each) for layer, each in sorted(statistics.items())]
    return table5(pooled) | {"per_layer": rows, "top": _top(pooled, {"token": "position"}, ids_NT, decode)}


def histograms(logits: ByLayerAndMap, hidden: Mapping[int, Magnitudes]) -> dict[str, NDArray[Any]]:
    """Columns tensor, layer, map, magnitude, count: one row per bucket that holds values."""
    sources = [("attention_logits", layer, which, each) for (layer, which), each in sorted(logits.items())]
    sources += [("hidden_states", layer, 0, each) for layer, each in sorted(hidden.items())]
    columns: dict[str, list[NDArray[Any]]] = {
        "tensor": [],
        "layer": [],
        "map": [],
        "magnitude": [],
        "count": [],
    }
    for tensor, layer, which, each in sources:
        buckets = each.histogram.value()
        size = len(buckets["count"])
        fixed = {"tensor": np.full(size, tensor), "layer": np.full(size, layer), "map": np.full(size, which)}
        for name, column in (fixed | buckets).items():
            columns[name].append(column)
    return {name: np.concatenate(parts) if parts else np.empty(0) for name, parts in columns.items()}


def merged(statistics: Iterable[Magnitudes]) -> Magnitudes:
    """One statistic of all; the given ones stay as they are."""
    first, *others = statistics
    total = deepcopy(first)
    for other in others:
        total.merge(other)
    return total


def _top(
    statistics: Magnitudes, tokens: Mapping[str, str], ids_NT: NDArray[np.int64], decode: Decode | None
) -> list[dict[str, Any]]:
    """The largest values with their place, and the text of the tokens there: name of the text -> its position."""
    columns = statistics.topk.value()
    rows = []
    for i in range(len(columns["value"])):
        row: dict[str, Any] = {name: column[i].item() for name, column in columns.items()}
        for name, position in tokens.items():
            token = int(ids_NT[row["sequence"], row[position]])
            row[name] = decode([token]) if decode is not None else None
        rows.append(row)
    return rows
