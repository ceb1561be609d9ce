"""One decoder layer at a time: the hidden states of all sequences walk through the model block by block.

    for step in walk_blocks(model, ids_NT, batch_size=8):
        outputs_nTD = step.run(0, 8)        # with the layer as it is now
        ...                                 # what changes the layer here changes what the next step sees

Peak memory is the hidden states and, where a source lends the weights, one layer. What a layer is called with besides
the hidden states (masks by layer type, rotary tables, biases of position) is noted in a forward of the decoder stack
in which recorders stand for the layers, so no family needs to be known.

Letters: N sequences, T tokens, D hidden channels; n sequences of a call.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from probes.sites import decoder_layers, decoder_stack
from quantlab.errors import CalibrationError

__all__ = ["BlockStep", "Source", "walk_blocks"]


class Source(Protocol):
    """Lends weights to a model whose parameters are on the meta device; they are gone when a block ends."""

    def layer(self, name: str, layer: nn.Module) -> AbstractContextManager[None]:
        """The weights of one decoder layer."""

    def outside(self, ids: Tensor) -> AbstractContextManager[None]:
        """Whatever stands before the layers; of the token embedding only the rows of these ids."""


@dataclass(frozen=True)
class _Call:
    """What a layer was called with."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(eq=False)
class BlockStep:
    """One decoder layer and what enters it."""

    name: str
    """Dotted name, `model.layers.3`."""
    layer: nn.Module
    """With its weights; where a source lends them, only until the next step."""
    inputs_NTD: Tensor
    """On the CPU, in the model's dtype. The walker reuses this memory for the outputs when the step is over."""
    _call_of: Callable[[int], _Call] = field(repr=False)
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
            raise _not_in_a_row(model)
        self._known: dict[int, list[_Call]] = {}
        self.gives_tuple = self._first_gives_tuple()

    def walk(self, batch_size: int) -> Tensor:
        """The hidden states [N, T, D] that enter the first layer, on the CPU."""
        hidden_NTD: Tensor | None = None
        with self.source.outside(self.ids_NT):
            for start, stop in batches(len(self.ids_NT), batch_size):
                calls = self._forward(self.ids_NT[start:stop])
                self._note(stop - start, calls)
                entered = calls[0].hidden
                if hidden_NTD is None:
                    hidden_NTD = torch.empty(len(self.ids_NT), *entered.shape[1:], dtype=entered.dtype)
                hidden_NTD[start:stop] = entered.cpu()
        assert hidden_NTD is not None
        return hidden_NTD

    def calls(self, num_sequences: int) -> list[_Call]:
        """What each layer is called with for so many sequences."""
        if num_sequences not in self._known:
            ids_nT = self.ids_NT[:num_sequences]
            with self.source.outside(ids_nT):
                self._note(num_sequences, self._forward(ids_nT))
        return self._known[num_sequences]

    def _note(self, num_sequences: int, calls: list[_Call]) -> None:
        """Keep the arguments for this number of sequences; they must be those of any other text."""
        known = self._known.get(num_sequences)
        if known is None:
            # The hidden states themselves are not needed again: an empty tensor keeps their device.
            self._known[num_sequences] = [_Call(call.hidden[:0], call.args, call.kwargs) for call in calls]
            return
        for (name, _), old, new in zip(self.layers, known, calls, strict=True):
            if not _alike((old.args, old.kwargs), (new.args, new.kwargs)):
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
            call = self._forward(ids, last=0)[0]
        with self.source.layer(name, layer), torch.no_grad():
            return isinstance(layer(call.hidden, *call.args, **call.kwargs), tuple)

    def _forward(self, ids_nT: Tensor, last: int | None = None) -> list[_Call]:
        """A forward of the decoder stack in which recorders stand for the layers; it ends at layer `last`."""
        end = len(self.layers) - 1 if last is None else last
        seen: list[_Call] = []
        device = next(each.device for each in self.stack.parameters() if not each.is_meta)
        with suppress(_Arrived), _recording(self.home, seen, end, self.gives_tuple), torch.no_grad():
            # Not a call of the module: hooks on it expect the layers to run.
            self.stack.forward(input_ids=ids_nT.to(device), use_cache=False)
        # No layer changes its hidden states here, so layers that run in a row are given one tensor.
        if len(seen) != end + 1 or any(call.hidden is not seen[0].hidden for call in seen):
            raise _not_in_a_row(self.stack)
        return seen


def _not_in_a_row(model: nn.Module) -> CalibrationError:
    return CalibrationError(
        "decoder layers must run one after another, each on the outputs of the one before, to be calibrated one at a "
        f"time: those of {type(model).__name__} do not. Methods that need no calibration are left, such as rtn and hqq."
    )


class _Arrived(Exception):  # noqa: N818  not an error: the layers have been seen
    """Ends a forward at the last layer."""


class _Recorder(nn.Module):
    """Stands for a layer: notes what it is called with and gives the hidden states back; other attributes are its."""

    def __init__(self, layer: nn.Module, note: Callable[[_Call], None], gives_tuple: bool) -> None:
        super().__init__()
        self.stood_for, self.note, self.gives_tuple = layer, note, gives_tuple

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("stood_for"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        self.note(_Call(hidden, args, kwargs))
        return (hidden, None) if self.gives_tuple else hidden


@contextmanager
def _recording(home: nn.ModuleList, seen: list[_Call], last: int, gives_tuple: bool) -> Iterator[None]:
    """Recorders in the places of the layers for the span of the block."""

    def note(call: _Call) -> None:
        seen.append(call)
        if len(seen) == last + 1:
            raise _Arrived

    layers = dict(home.named_children())
    try:
        for name, layer in layers.items():
            home._modules[name] = _Recorder(layer, note, gives_tuple)
        yield
    finally:
        home._modules.update(layers)


class _InMemory:
    """The source of a model that holds its weights."""

    def layer(self, name: str, layer: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def outside(self, ids: Tensor) -> AbstractContextManager[None]:
        return nullcontext()


def _alike(first: Any, second: Any) -> bool:
    """Whether two trees of arguments hold the same tensors; rules and flags are taken as they come."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_alike(first[name], second[name]) for name in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(_alike, first, second))
    return True
