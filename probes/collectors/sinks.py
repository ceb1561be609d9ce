"""Attention sinks: how much of the attention of the first 64 queries the first key draws.

Letters: B sequences, H heads, q query rows of a block, t keys of a block.
"""

from typing import Any

import torch
from torch import Tensor, nn

from probes import measures
from probes.places import layer_of_attention
from probes.sites import QueryBlock, map_of_head


class SinkCollector:
    """Sink rate of every softmax map, from the site `attn_probs`; for DiffLlama also of A1 - lambda A2.

    The difference has rows that sum to 1 - lambda and entries of both signs, so its sink rate is taken of |D| over the
    row's sum of magnitudes, and the signed weight on the first key is given beside it. Sequences shorter than 64 tokens
    are measured at their own length; rates of different lengths do not compare.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = layer_of_attention(model)
        self._modules = {f"{name}.attn_probs": model.get_submodule(name) for name in layers}
        self.names = list(self._modules)
        self._sums: dict[tuple[str, str], list[Tensor]] = {}
        self._length = 0

    def see(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Takes the rows among the first 64 of each block."""
        probs_BHqt, block = args
        rows = min(measures.SINK_LENGTH - block.start, probs_BHqt.shape[2])
        if rows <= 0 or block.num_keys != block.num_queries or block.key_start:
            return
        self._length = min(measures.SINK_LENGTH, block.num_queries)
        probs = probs_BHqt[:, :, :rows].detach().double()
        for kind, first in first_key_shares(probs, self._modules[name]).items():
            self._take((name, kind), first.sum(2), block)

    def result(self) -> dict[str, Any]:
        """attention_sink_rate: percent, by map and for the difference."""
        found: dict[str, Any] = {"length": self._length, "threshold": measures.SINK_THRESHOLD}
        for kind in dict.fromkeys(kind for _, kind in self._sums):
            sums = [each.flatten() for (_, of), list_ in self._sums.items() if of == kind for each in list_]
            shares = torch.cat(sums) / self._length
            if kind == "signed_difference":
                found["signed_difference_mean"] = float(shares.mean())
            else:
                found[kind] = measures.sink_rate(shares)
        return {"attention_sink_rate": found} if self._length else {}

    def _take(self, at: tuple[str, str], sums_BH: Tensor, block: QueryBlock) -> None:
        batches = self._sums.setdefault(at, [])
        if block.start == 0:
            batches.append(sums_BH)
        else:
            batches[-1] = batches[-1] + sums_BH


def first_key_shares(probs_BHqt: Tensor, attention: nn.Module) -> dict[str, Tensor]:
    """Weight of each query on key 0, [B, heads, q], by kind: all maps, each map of a pair, and their difference."""
    maps = torch.tensor(map_of_head(attention))
    found = {"all_maps": probs_BHqt[..., 0]}
    if not bool(maps.any()):
        return found
    found |= {f"map_{which}": probs_BHqt[:, maps == which, :, 0] for which in (0, 1)}
    weight = differential_lambda(attention)
    if weight is None:
        return found
    difference = probs_BHqt[:, maps == 0] - weight * probs_BHqt[:, maps == 1]
    share = difference[..., 0].abs() / difference.abs().sum(-1)
    return found | {"difference": share, "signed_difference": difference[..., 0]}


def differential_lambda(attention: nn.Module) -> float | None:
    """DiffLlama's lambda: exp(lq1 . lk1) - exp(lq2 . lk2) + lambda_init; None where a module has no such vectors.

    Source: Ye et al. 2024, arXiv:2410.05258, equation 2.
    """
    names = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
    vectors = [getattr(attention, name, None) for name in names]
    first = getattr(attention, "lambda_init", None)
    if not isinstance(first, float) or not all(isinstance(vector, Tensor) for vector in vectors):
        return None
    q1, k1, q2, k2 = (vector.detach().double() for vector in vectors if isinstance(vector, Tensor))
    return float(torch.exp((q1 * k1).sum()) - torch.exp((q2 * k2).sum())) + first
