"""Whether linears in low bits are called: some models read a linear's weight and multiply by themselves.

Jamba's `dt_proj` is one: `self.dt_proj.weight @ x`. Such a linear counts as quantized, its inputs are not rounded, and
calibration sees none. Only a forward pass tells, so the first one of the decoder is watched, by hooks that go with it.

An expert that no token chose is another matter. An expert is an element of a list inside a decoder layer; what lies in
it is missed only where the expert itself ran, and everything else where its decoder layer did.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from probes.sites import decoder_layers, decoder_stack
from quantlab.errors import SchemeError
from quantlab.transforms.edit import Undo

__all__ = ["expect_calls_"]


def expect_calls_(model: nn.Module, names: Sequence[str], undo: Undo) -> None:
    """Make the decoder's next forward pass refuse to end where it has not called one of these linears.

    The forward raises SchemeError, which names the linear.
    """
    undo.append((_Calls(model, names), "watching", False))


class _Calls:
    """What has run since the linears were put in place."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        layers = [name for name, _ in decoder_layers(model)]
        self.waiting = {name: _gate(model, name, layers) for name in names}
        self.ran: set[str] = set()
        gates = set(self.waiting.values())
        self._handles = [
            model.get_submodule(name).register_forward_pre_hook(partial(self._begun, name))
            for name in [*names, *sorted(gates - set(names))]
        ]
        self._handles.append(decoder_stack(model)[1].register_forward_hook(self._ended))

    @property
    def watching(self) -> bool:
        """Whether the hooks are there; set to False, they go."""
        return bool(self._handles)

    @watching.setter
    def watching(self, value: bool) -> None:
        assert not value
        while self._handles:
            self._handles.pop().remove()

    def _begun(self, name: str, *_: Any) -> None:
        self.ran.add(name)

    def _ended(self, *_: Any) -> None:
        if not self.watching:  # a copy of the model keeps its hooks
            return
        missed = [name for name, gate in self.waiting.items() if gate in self.ran and name not in self.ran]
        if missed:
            name = missed[0]
            raise SchemeError(
                f"a linear in low bits must be called: {name} is not, though {self.waiting[name]} ran, so nothing of "
                f"the scheme reaches what the model does with its weight ({len(missed)} of {len(self.waiting)} "
                f'linears). Add "*.{name.rpartition(".")[2]}" to skip.'
            )
        self.watching = False


def _gate(model: nn.Module, name: str, layers: Sequence[str]) -> str:
    """The module whose run means that the linear was to run: the innermost element of a list around it or itself."""
    layer = next((layer for layer in layers if name.startswith(f"{layer}.")), "")
    gate = name
    while gate != layer and gate:
        parent = gate.rpartition(".")[0]
        if parent != layer and isinstance(model.get_submodule(parent), nn.ModuleList | nn.ModuleDict):
            return gate
        gate = parent
    return layer
