"""Tails: forward passes of one sequence that begin at a decoder layer, on what the layers before it gave.

A clean pass keeps every layer's output. To run from layer l, stand-ins that give back those outputs take the places of
the layers before it, so masks, final norm and head are the model's own, whatever its family. A tail is used where it
gives the clean pass's logits bit for bit; elsewhere (layers that are called twice, or integrated over depth) the pass
begins at the first layer. T tokens, V entries of the vocabulary.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from probes.hooks import watch
from probes.sites import decoder_layers
from quantlab.layers.targets import parents_of

__all__ = ["Tails", "swapped"]


class Tails:
    """Logits of one sequence, from any decoder layer on."""

    def __init__(self, model: nn.Module, ids_T: Tensor) -> None:
        """model: a causal LM in eval mode, whole and unquantized."""
        self.model, self.ids_T = model, ids_T
        self.layers = decoder_layers(model)
        # A layer that stands in the list twice is one module, which runs twice.
        names = [name for name, _ in model.named_modules() if name in dict(self.layers)]
        kept: dict[str, list[Any]] = {name: [] for name in names}
        with watch(model, names, lambda name, _module, _args, output: kept[name].append(_copy(output))):
            self.clean_TV = self._forward()
        """Logits [T, V] of the model as it is."""
        once = all(len(outputs) == 1 for outputs in kept.values())
        self._kept = [outputs[0] for outputs in kept.values()] if once else []
        self._begins = {index for index in range(len(self._kept)) if self._is_exact(index)}

    def logits(self, layer: int) -> Tensor:
        """Logits [T, V] of the model as it is now, where nothing before this layer differs from the clean pass."""
        return self._from(layer if layer in self._begins else 0)

    def _is_exact(self, index: int) -> bool:
        """Whether the pass from a layer on is the clean one."""
        return torch.equal(self._from(index), self.clean_TV)

    def _from(self, index: int) -> Tensor:
        with ExitStack() as stack:
            for (_, layer), output in zip(self.layers[:index], self._kept, strict=False):
                stack.enter_context(swapped(self.model, layer, _StandIn(layer, output)))
            return self._forward()

    @torch.no_grad()
    def _forward(self) -> Tensor:
        logits: Tensor = self.model(self.ids_T[None], use_cache=False).logits[0]
        return logits


@contextmanager
def swapped(model: nn.Module, old: nn.Module, new: nn.Module) -> Iterator[None]:
    """One module in the place of another, wherever the model holds it, for the span of the block."""
    places = list(parents_of(model, old))
    try:
        for parent, name in places:
            setattr(parent, name, new)
        yield
    finally:
        for parent, name in places:
            setattr(parent, name, old)


class _StandIn(nn.Module):
    """Gives what a layer gave; has the layer's other attributes."""

    def __init__(self, layer: nn.Module, output: Any) -> None:
        super().__init__()
        # Not as a child: the model's modules are those that run.
        object.__setattr__(self, "_layer", layer)
        self._output = output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer gave, in memory of its own."""
        return _copy(self._output)


def _copy(output: Any) -> Any:
    """The same with tensors of its own."""
    if isinstance(output, Tensor):
        return output.clone()
    return tuple(map(_copy, output)) if isinstance(output, tuple) else output
