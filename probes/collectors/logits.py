"""Attention logits of every layer and softmax map: scaled, soft-capped, before the mask, masked positions left out.

Letters: B sequences, H heads, q query rows of a block, t keys of a block.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from probes.collectors.base import Cursor
from probes.places import layer_of_attention
from probes.running.magnitudes import Magnitudes
from probes.running.topk import TopK
from probes.sites import QueryBlock, map_of_head

PLACE = ("layer", "head", "map", "sequence", "query", "key")
"""Where a logit stands; equal magnitudes are kept in this order."""


class LogitCollector:
    """`Magnitudes` of each (layer, map), from the site `attn_logits`."""

    def __init__(self, model: nn.Module, top_k: int, cursor: Cursor) -> None:
        layers = layer_of_attention(model)
        self.names = [f"{name}.attn_logits" for name in layers]
        self._layers = {f"{name}.attn_logits": index for name, index in layers.items()}
        self._maps = {f"{name}.attn_logits": _heads_by_map(model.get_submodule(name)) for name in layers}
        self._cursor = cursor
        self.statistics: dict[tuple[int, int], Magnitudes] = {
            (self._layers[name], which): Magnitudes(top_k, PLACE)
            for name in self.names
            for which in self._maps[name]
        }

    def see(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Takes the site's input, so that a quantizer in the site's place does not hide what came in."""
        logits_BHqt, block = args
        layer, maps = self._layers[name], self._maps[name]
        for which, heads in maps.items():
            whole = len(maps) == 1
            x = logits_BHqt if whole else logits_BHqt[:, heads]
            seen = block if whole or block.visible.shape[1] == 1 else block.of_heads(heads)
            self._add(self.statistics[layer, which], x.detach(), seen, (layer, which), heads)

    def result(self) -> dict[str, Any]:
        """Nothing of its own: the profile reads `statistics`."""
        return {}

    def _add(
        self,
        statistics: Magnitudes,
        x_BHqt: Tensor,
        block: QueryBlock,
        at: tuple[int, int],
        heads: Sequence[int],
    ) -> None:
        first_sequence = self._cursor.first_sequence

        def place(positions: NDArray[np.int64]) -> NDArray[np.int64]:
            sequence, head, row, column = np.unravel_index(positions, tuple(x_BHqt.shape))
            fixed = np.full_like(positions, at[0]), np.full_like(positions, at[1])
            # A query's position counts the keys before it, so that it holds with a cache too.
            query = row + block.start + block.num_keys - block.num_queries
            places = (fixed[0], np.asarray(heads)[head], fixed[1], sequence + first_sequence, query)
            return np.stack([*places, column + block.key_start], axis=1)

        def offer(topk: TopK) -> None:
            topk.add(x_BHqt, place, block.visible)

        statistics.add(block.visible_parts(x_BHqt), offer)


def _heads_by_map(attention: nn.Module) -> dict[int, list[int]]:
    """Softmax map -> its heads, in order."""
    heads: dict[int, list[int]] = {}
    for head, which in enumerate(map_of_head(attention)):
        heads.setdefault(which, []).append(head)
    return dict(sorted(heads.items()))
