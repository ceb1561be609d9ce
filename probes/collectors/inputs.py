"""Inputs of the linears that are quantized first: attention projections and the FFN's expansion.

Letters: P positions (all sequences of a batch), D channels.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from probes import measures
from probes.collectors.base import tensor_of
from probes.places import ATTENTION_INPUTS, FFN_INPUTS, parts
from probes.running.absmax import AbsMax


class InputCollector:
    """LLM.int8's outlier features and channel absmax, of what attention and the FFN read."""

    def __init__(self, model: nn.Module) -> None:
        attention = parts(model, ATTENTION_INPUTS, attention=True)
        self._layers = attention | parts(model, FFN_INPUTS, attention=False)
        self.names = list(self._layers)
        self._hits: dict[str, Tensor] = {}
        self._absmax = {name: AbsMax(axis=-1) for name in self.names}
        self._positions = dict.fromkeys(self.names, 0)

    def see(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Takes the linear's input."""
        x_PD = tensor_of(args[0]).flatten(0, -2)
        hits = (x_PD.abs() >= measures.INT8_MAGNITUDE).sum(0).cpu()
        self._hits[name] = self._hits[name] + hits if name in self._hits else hits
        self._absmax[name].add(x_PD)
        self._positions[name] += len(x_PD)

    def result(self) -> dict[str, Any]:
        """llm_int8_outlier_features and channel_absmax; absent where no linear was called."""
        names = [name for name in self.names if self._positions[name]]
        widths = {len(self._hits[name]) for name in names}
        if len(widths) != 1:
            return {}
        hits = np.stack([self._hits[name].numpy() for name in names])
        ratios = [measures.max_over_median(self._absmax[name].value()) for name in names]
        return {
            "llm_int8_outlier_features": measures.llm_int8_outlier_features(
                hits, self._positions[names[0]], [self._layers[name] for name in names]
            ),
            "channel_absmax": {
                "largest": float(torch.stack([self._absmax[name].value() for name in names]).max()),
                "max_over_median": measures.spread(ratio for ratio in ratios if ratio is not None),
            },
        }
