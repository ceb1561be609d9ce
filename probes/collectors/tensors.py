"""Infinity norm and kurtosis of the tensors of a block, per sequence, as Quantizable Transformers measures them."""

from typing import Any

from torch import Tensor, nn

from probes import measures
from probes.collectors.base import tensor_of
from probes.places import ATTENTION_OUTPUTS, FFN_OUTPUTS, final_norm, norms, parts
from probes.running.moments import Moments
from probes.sites import decoder_layers


class TensorCollector:
    """Per sequence, flattened: ||x||_inf and kurtosis of the norms, attention output, FFN output and layer output."""

    def __init__(self, model: nn.Module) -> None:
        last = final_norm(model)
        self.names = [
            *(name for name, _ in decoder_layers(model)),
            *norms(model),
            *parts(model, ATTENTION_OUTPUTS, attention=True),
            *parts(model, FFN_OUTPUTS, attention=False),
            *([last] if last else []),
        ]
        self._inf_norms: dict[str, list[float]] = {}
        self._kurtoses: dict[str, list[float]] = {}

    def see(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Takes the output, sequence by sequence."""
        for x_TD in tensor_of(output):
            moments = Moments()
            moments.add(x_TD)
            self._inf_norms.setdefault(name, []).append(_inf_norm(x_TD))
            self._kurtoses.setdefault(name, []).append(measures.kurtosis(moments.value()))

    def result(self) -> dict[str, Any]:
        """inf_norm and kurtosis."""
        return {
            "inf_norm": measures.over_tensors(self._inf_norms, "max"),
            "kurtosis": measures.over_tensors(self._kurtoses, "mean"),
        }


def _inf_norm(x: Tensor) -> float:
    """Largest finite magnitude."""
    largest = float(x.abs().amax())
    return largest if largest < float("inf") else float(x.abs().nan_to_num(0.0, posinf=0.0).amax())
