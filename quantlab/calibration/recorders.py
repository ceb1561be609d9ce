"""What each decoder layer is called with, noted in one forward of the stack in which recorders stand for the layers.

No layer runs: a recorder gives the hidden states back as they came. So every call carries the hidden states that enter
the first layer, and the masks by layer type, rotary tables and biases of position of its own layer.

Letters: n sequences of a call, T tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantlab.errors import CalibrationError

__all__ = ["Call", "not_in_a_row", "recorded_calls", "same_arguments"]


@dataclass(frozen=True)
class Call:
    """What a layer was called with."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def recorded_calls(
    stack: nn.Module, home: nn.ModuleList, ids_nT: Tensor, last: int, gives_tuple: bool
) -> list[Call]:
    """What the layers up to number `last` are called with for these tokens.

    Args:
        stack: the decoder stack; whatever stands before its layers has its weights.
        home: the list within it that holds the layers.
        gives_tuple: whether layers give a tuple, so that recorders do too.

    Raises:
        CalibrationError: the layers do not run one after another.
    """
    seen: list[Call] = []
    device = next(each.device for each in stack.parameters() if not each.is_meta)
    with suppress(_Arrived), _recording(home, seen, last, gives_tuple), torch.no_grad():
        # Not a call of the module: hooks on it expect the layers to run.
        stack.forward(input_ids=ids_nT.to(device), use_cache=False)
    # No layer changes its hidden states here, so layers that run in a row are given one tensor.
    if len(seen) != last + 1 or any(call.hidden is not seen[0].hidden for call in seen):
        raise not_in_a_row(stack)
    return seen


def same_arguments(first: Call, second: Call) -> bool:
    """Whether two calls are alike in all but their hidden states."""
    return _alike((first.args, first.kwargs), (second.args, second.kwargs))


def not_in_a_row(model: nn.Module) -> CalibrationError:
    """The complaint about layers that cannot be walked one at a time."""
    return CalibrationError(
        "decoder layers must run one after another, each on the outputs of the one before, to be calibrated one at a "
        f"time: those of {type(model).__name__} do not. Methods that need no calibration are left, such as rtn and hqq."
    )


class _Arrived(Exception):  # noqa: N818  not an error: the layers have been seen
    """Ends a forward at the last layer."""


class _Recorder(nn.Module):
    """Stands for a layer: notes what it is called with and gives the hidden states back; other attributes are its."""

    def __init__(self, layer: nn.Module, note: Callable[[Call], None], gives_tuple: bool) -> None:
        super().__init__()
        self.stood_for, self.note, self.gives_tuple = layer, note, gives_tuple

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("stood_for"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        self.note(Call(hidden, args, kwargs))
        return (hidden, None) if self.gives_tuple else hidden


@contextmanager
def _recording(home: nn.ModuleList, seen: list[Call], last: int, gives_tuple: bool) -> Iterator[None]:
    """Recorders in the places of the layers for the span of the block."""

    def note(call: Call) -> None:
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


def _alike(first: Any, second: Any) -> bool:
    """Whether two trees of arguments hold the same tensors; rules and flags are taken as they come."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_alike(first[name], second[name]) for name in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(_alike, first, second))
    return True
