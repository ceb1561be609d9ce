"""The file of one decoder layer's statistics.

    gram.0 ...                          one Gram matrix for each distinct input of the layer's linears
    LINEAR.minimum_I, maximum_I, mean_I
    ATTENTION.query.minimum_HC ...      both ends of query, key and value

The metadata's `about` is JSON: of each linear the name of its Gram matrix, its dtype, and what a method may stumble
over; and the names of the attention layers.

Letters: I inputs of a linear; H heads, C channels of a head.
"""

import json
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from safetensors import safe_open
from torch import Tensor

from quantlab.calibration.accumulators import unseen
from quantlab.calibration.statistics import AttentionStats, BlockStats, LinearStats, Ranges
from quantlab.calibration.whole_files import check_digest, write_tensors

__all__ = ["LayerFile", "about_layer", "name_of", "write_layer"]

_VALUES = ("minimum_I", "maximum_I", "mean_I")
_RANGES = ("query", "key", "value")


def write_layer(folder: Path, block: BlockStats) -> None:
    """Store the statistics of one layer in a folder, under the layer's name."""
    tensors: dict[str, Tensor] = {}
    grams: dict[int, str] = {}
    linears: dict[str, Any] = {}
    for name, stats in block.linears.items():
        gram = None
        if stats.num_tokens:
            gram = grams.setdefault(id(stats.gram_II), f"gram.{len(grams)}")
            tensors[gram] = stats.gram_II
        linears[name] = {"gram": gram, "dtype": name_of(stats.gram_II.dtype), **_facts(stats)}
        tensors |= {f"{name}.{value}": getattr(stats, value).clone() for value in _VALUES}
    for name, attention in block.attention.items():
        for which in _RANGES:
            ranges = getattr(attention, which)
            tensors[f"{name}.{which}.minimum_HC"] = ranges.minimum_HC
            tensors[f"{name}.{which}.maximum_HC"] = ranges.maximum_HC
    about = json.dumps({"linears": linears, "attention": list(block.attention)})
    write_tensors(folder / f"{block.name}.safetensors", tensors, {"about": about})


class LayerFile:
    """The statistics of one layer on disk."""

    def __init__(self, path: Path, digest: str) -> None:
        self.path, self.digest = path, digest
        self._about: dict[str, Any] | None = None
        # Linears that share a Gram matrix are given one tensor, as long as someone holds it.
        self._grams: WeakValueDictionary[str, Tensor] = WeakValueDictionary()

    def linear(self, name: str) -> LinearStats:
        """Statistics of one linear."""
        about = self._checked()["linears"][name]
        with safe_open(self.path, framework="pt") as file:
            minimum_I, maximum_I, mean_I = (file.get_tensor(f"{name}.{value}").clone() for value in _VALUES)
            if about["gram"] is None:
                return unseen(len(mean_I), getattr(torch, about["dtype"]))
            gram_II = self._grams.get(about["gram"])
            if gram_II is None:
                self._grams[about["gram"]] = gram_II = file.get_tensor(about["gram"]).clone()
        return LinearStats(gram_II, minimum_I, maximum_I, mean_I, about["num_tokens"])

    def attention(self, name: str) -> AttentionStats:
        """Ranges of one attention layer."""
        self._checked()
        with safe_open(self.path, framework="pt") as file:
            ranges = [
                Ranges(
                    *(file.get_tensor(f"{name}.{which}.{end}_HC").clone() for end in ("minimum", "maximum"))
                )
                for which in _RANGES
            ]
        return AttentionStats(*ranges)

    def _checked(self) -> dict[str, Any]:
        """What the file says of itself, once its content is known to be what was written."""
        if self._about is None:
            check_digest(self.path, self.digest)
            self._about = about_layer(self.path)
        return self._about


def about_layer(file: Path) -> dict[str, Any]:
    """What a layer's file says of itself: `linears` and `attention`."""
    with safe_open(file, framework="pt") as opened:
        about: dict[str, Any] = json.loads(opened.metadata()["about"])
    return about


def name_of(dtype: torch.dtype) -> str:
    """A dtype as files and keys say it: `float32`."""
    return str(dtype).removeprefix("torch.")


def _facts(stats: LinearStats) -> dict[str, int]:
    """What a method may stumble over: zero and constant channels, too few tokens."""
    dead_I = stats.absmax_I == 0
    return {
        "in_features": len(dead_I),
        "num_tokens": stats.num_tokens,
        "num_dead": int(dead_I.sum()),
        "num_constant": int(((stats.minimum_I == stats.maximum_I) & ~dead_I).sum()),
    }
