"""Hidden states: the output of every decoder layer, the residual stream after the FFN's add, before any norm.

Letters: L layers, N sequences, B sequences of a batch, T positions, D channels.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from probes import measures
from probes.collectors.base import Cursor, tensor_of
from probes.running.absmax import AbsMax
from probes.running.histogram import Histogram
from probes.running.magnitudes import Magnitudes
from probes.running.topk import TopK
from probes.sites import decoder_layers

PLACE = ("layer", "sequence", "position", "channel")
"""Where a value stands; equal magnitudes are kept in this order."""


class HiddenCollector:
    """`Magnitudes`, channel absmax and massive activations of each layer's output."""

    def __init__(self, model: nn.Module, top_k: int, cursor: Cursor) -> None:
        self.names = [name for name, _ in decoder_layers(model)]
        self._cursor = cursor
        self._layers = {name: index for index, name in enumerate(self.names)}
        self.statistics = {index: Magnitudes(top_k, PLACE) for index in self._layers.values()}
        self.absmax = [AbsMax(axis=-1) for _ in self.names]
        self._top3: list[list[list[float]]] = [[] for _ in self.names]
        self._medians: list[list[float]] = [[] for _ in self.names]
        self._massive = [0] * len(self.names)

    def see(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Takes the output, sequence by sequence."""
        layer = self._layers[name]
        for number, x_TD in enumerate(tensor_of(output)):
            self._add(layer, self._cursor.first_sequence + number, x_TD)

    def result(self) -> dict[str, Any]:
        """massive_activations."""
        top3, medians = np.array(self._top3), np.array(self._medians)
        return {"massive_activations": measures.massive_activations(top3, medians, self._massive)}

    def _add(self, layer: int, sequence: int, x_TD: Tensor) -> None:
        def place(positions: NDArray[np.int64]) -> NDArray[np.int64]:
            position, channel = np.divmod(positions, x_TD.shape[1])
            return np.stack(
                [np.full_like(positions, layer), np.full_like(positions, sequence), position, channel], axis=1
            )

        def offer(topk: TopK) -> None:
            topk.add(x_TD, place)

        own = Magnitudes(
            1, PLACE
        )  # of this sequence alone: its histogram gives the median that Sun et al. take
        own.add([x_TD], lambda topk: None)
        statistics = self.statistics[layer]
        statistics.histogram.merge(own.histogram)
        statistics.moments.merge(own.moments)
        self.absmax[layer].add(x_TD)
        self._add_massive(layer, x_TD, own.histogram)
        if self._top3[layer][-1][0] >= statistics.topk.threshold:
            offer(statistics.topk)

    def _add_massive(self, layer: int, x_TD: Tensor, histogram: Histogram) -> None:
        magnitudes = x_TD.abs().nan_to_num(0.0, posinf=0.0).flatten()
        median = histogram.quantile(0.5) or 0.0
        top3 = magnitudes.topk(min(3, magnitudes.numel())).values.double().tolist()
        self._top3[layer].append((top3 + [0.0] * 3)[:3])
        self._medians[layer].append(median)
        threshold = measures.massive_threshold(median)
        if top3[0] > threshold:
            self._massive[layer] += int((magnitudes > threshold).sum())


class ChannelCollector:
    """Outlier features of the layers' outputs: kurtosis over channels, and each position's largest over its median."""

    def __init__(self, model: nn.Module) -> None:
        self.names = [name for name, _ in decoder_layers(model)]
        self._squares: dict[str, Tensor] = {}
        self._positions: dict[str, int] = dict.fromkeys(self.names, 0)
        self._ratios: dict[str, tuple[float, int]] = dict.fromkeys(self.names, (0.0, 0))

    def see(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Takes channel second moments in float64 and the ratio of every position whose median is not zero."""
        x_PD = tensor_of(output).flatten(0, -2)
        squares = x_PD.double().square().sum(0)
        self._squares[name] = self._squares[name] + squares if name in self._squares else squares
        self._positions[name] += len(x_PD)
        magnitudes = x_PD.abs()
        ratios = magnitudes.amax(-1) / magnitudes.median(-1).values
        ratios = ratios[ratios.isfinite()].double()
        total, count = self._ratios[name]
        self._ratios[name] = (total + float(ratios.sum()), count + len(ratios))

    def result(self) -> dict[str, Any]:
        """outlier_features."""
        moments = [self._squares[name] / self._positions[name] for name in self.names]
        kurtoses = [measures.outlier_feature_kurtosis(moment_D) for moment_D in moments]
        ratios = [total / count for total, count in self._ratios.values() if count]
        found = {"kurtosis": measures.spread(kurtoses)}
        return {"outlier_features": found | ({"max_over_median": measures.spread(ratios)} if ratios else {})}
