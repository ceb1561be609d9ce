"""One decoder layer at a time: the hidden states of all sequences walk through the model block by block.

    for step in walk_blocks(model, ids_NT, batch_size=8):
        outputs_nTD = step.run(0, 8)        # with the layer as it is now
        ...                                 # what changes the layer here changes what the next step sees

Peak memory is the hidden states and, where a source lends the weights, one layer. What a layer is called with besides
the hidden states is noted by recorders (`recorders`), so no family needs to be known.

Letters: N sequences, T tokens, D hidden channels; n sequences of a call.
"""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from probes.sites import decoder_layers, decoder_stack
from quantlab.calibration.recorders import Call, not_in_a_row, recorded_calls, same_arguments
from quantlab.errors import CalibrationError

__all__ = ["BlockStep", "Source", "batches", "check_ids", "walk_blocks"]


class Source(Protocol):
    """Lends weights to a model whose parameters are on the meta device; they are gone when a block ends."""

    def layer(self, name: str, layer: nn.Module) -> AbstractContextManager[None]:
        """The weights of one decoder layer."""

    def outside(self, ids: Tensor) -> AbstractContextManager[None]:
        """Whatever stands before the layers; of the token embedding only the rows of these ids."""


@dataclass(eq=False)
class BlockStep:
    """One decoder layer and what enters it."""

    name: str
    """Dotted name, `model.layers.3`."""
    layer: nn.Module
    """With its weights; where a source lends them, only until the next step."""
    inputs_NTD: Tensor
    """On the CPU, in the model's dtype. The walker reuses this memory for the outputs when the step is over."""
    _call_of: Callable[[int], Call] = field(repr=False)
    outputs_NTD: Tensor | None = None
    """Set by the consumer where it has them (it may write them over the inputs); else the walker computes them."""

    def run(self, start: int, stop: int) -> Tensor:
        """Outputs [n, T, D] of the sequences start to stop, on the layer's device, with the layer as it is now.

        Gradients are recorded as the caller has it.
        """
        return self.run_on(self.inputs_NTD[start:stop])

    def run_on(self, inputs_nTD: Tensor) -> Tensor:
        """Outputs [n, T, D] for other inputs of whole sequences."""
        call = self._call_of(len(inputs_nTD))
        found = self.layer(inputs_nTD.to(call.hidden.device), *call.args, **call.kwargs)
        output: Tensor = found[0] if isinstance(found, tuple) else found
        return output


def walk_blocks(
    model: nn.Module, ids_NT: Tensor, *, batch_size: int = 8, source: Source | None = None
) -> Generator[BlockStep, None, None]:
    """The decoder layers in order, each with its inputs; after a step its outputs are the next one's inputs.

    Args:
        model: a causal LM in eval mode; inside `attention_sites(model)`, the walk has its sites too.
        ids_NT: token ids, sequences of one length without padding.
        batch_size: sequences in a call, for speed and memory.
        source: lends the weights of a model that is on the meta device; None where it is in memory.

    Where the consumer leaves `outputs_NTD` unset, they are computed when it asks for the next step, with the layer as
    it is then: quantizing the layer inside the loop is how later layers see quantized inputs. The outputs of the last
    layer are left to the consumer.

    Raises:
        CalibrationError: no tokens, layers that do not run one after another, or arguments that depend on the text.
    """
    check_ids(ids_NT)
    assert not model.training, "a walk needs a model in eval mode"
    lender = source or _InMemory()
    entrance = _Entrance(model, ids_NT, lender)
    hidden_NTD = entrance.walk(batch_size)
    for index, (name, layer) in enumerate(entrance.layers):
        with lender.layer(name, layer):
            step = BlockStep(name, layer, hidden_NTD, lambda n, index=index: entrance.calls(n)[index])  # type: ignore[misc]
            yield step
            if step.outputs_NTD is not None:
                hidden_NTD = step.outputs_NTD
            elif index + 1 < len(entrance.layers):
                with torch.no_grad():
                    for start, stop in batches(len(ids_NT), batch_size):
                        hidden_NTD[start:stop] = step.run(start, stop).cpu()


def batches(num_sequences: int, batch_size: int) -> list[tuple[int, int]]:
    """(start, stop) of each batch."""
    return [(start, min(start + batch_size, num_sequences)) for start in range(0, num_sequences, batch_size)]


def check_ids(ids_NT: Tensor) -> None:
    """Refuse what is no text: calibration sees activations of at least two tokens in a row."""
    if ids_NT.ndim != 2 or len(ids_NT) == 0 or ids_NT.shape[1] < 2:
        raise CalibrationError(
            "calibration needs at least one sequence of two tokens, [N, T]: found token ids of shape "
            f"{list(ids_NT.shape)}. Give a longer text."
        )


class _Entrance:
    """The way into the layers: embeddings, and the arguments of every layer for a number of sequences."""

    def __init__(self, model: nn.Module, ids_NT: Tensor, source: Source) -> None:
        self.stack = decoder_stack(model)[1]
        self.layers = decoder_layers(model)
        self.ids_NT, self.source = ids_NT, source
        self.home = next(
            child
            for child in self.stack.children()
            if isinstance(child, nn.ModuleList) and self.layers[0][1] in list(child)
        )
        if list(self.home[:]) != [layer for _, layer in self.layers]:
            raise not_in_a_row(model)
        self._known: dict[int, list[Call]] = {}
        self.gives_tuple = self._first_gives_tuple()

    def walk(self, batch_size: int) -> Tensor:
        """The hidden states [N, T, D] that enter the first layer, on the CPU."""
        hidden_NTD: Tensor | None = None
        with self.source.outside(self.ids_NT):
            for start, stop in batches(len(self.ids_NT), batch_size):
                calls = self._record(self.ids_NT[start:stop])
                self._note(stop - start, calls)
                entered = calls[0].hidden
                if hidden_NTD is None:
                    hidden_NTD = torch.empty(len(self.ids_NT), *entered.shape[1:], dtype=entered.dtype)
                hidden_NTD[start:stop] = entered.cpu()
        assert hidden_NTD is not None
        return hidden_NTD

    def calls(self, num_sequences: int) -> list[Call]:
        """What each layer is called with for so many sequences."""
        if num_sequences not in self._known:
            ids_nT = self.ids_NT[:num_sequences]
            with self.source.outside(ids_nT):
                self._note(num_sequences, self._record(ids_nT))
        return self._known[num_sequences]

    def _note(self, num_sequences: int, calls: list[Call]) -> None:
        """Keep the arguments for this number of sequences; they must be those of any other text."""
        known = self._known.get(num_sequences)
        if known is None:
            # The hidden states themselves are not needed again: an empty tensor keeps their device.
            self._known[num_sequences] = [Call(call.hidden[:0], call.args, call.kwargs) for call in calls]
            return
        for (name, _), old, new in zip(self.layers, known, calls, strict=True):
            if not same_arguments(old, new):
                raise CalibrationError(
                    f"a layer's arguments must not depend on the tokens, to be walked by itself: those of {name} do. "
                    "This architecture cannot be calibrated."
                )

    def _first_gives_tuple(self) -> bool:
        """Whether layers give a tuple, tried on two tokens in the first one."""
        self.gives_tuple = False
        name, layer = self.layers[0]
        ids = self.ids_NT[:1, :2]
        with self.source.outside(ids):
            call = self._record(ids, last=0)[0]
        with self.source.layer(name, layer), torch.no_grad():
            return isinstance(layer(call.hidden, *call.args, **call.kwargs), tuple)

    def _record(self, ids_nT: Tensor, last: int | None = None) -> list[Call]:
        """What each layer up to `last`, the last one of all unless given, is called with for these tokens."""
        end = len(self.layers) - 1 if last is None else last
        return recorded_calls(self.stack, self.home, ids_nT, end, self.gives_tuple)


class _InMemory:
    """The source of a model that holds its weights."""

    def layer(self, name: str, layer: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def outside(self, ids: Tensor) -> AbstractContextManager[None]:
        return nullcontext()
