"""Targets: every weight matrix of a model, and what a scheme can do with it.

linear    nn.Linear, GPT-2's Conv1D or a subclass that computes the same, inside a decoder layer
fused     a three-dimensional parameter that holds one matrix per expert, inside a decoder layer
other     any further matrix of a decoder layer (routers, relative positions): stays at 16 bits
outside   embeddings, lm_head and whatever else lies outside the decoder layers: stays at 16 bits
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from probes.sites import decoder_layers

__all__ = ["Target", "find_targets", "parents_of"]

_SAME_AS_LINEAR = ("FalconLinear",)
"""Subclasses of nn.Linear with a forward of their own that computes x W^T + b all the same."""


@dataclass(frozen=True)
class Target:
    """One weight matrix, or one stack of them."""

    name: str
    """The module's dotted name where the matrix is its `weight`, else the parameter's."""
    sort: Literal["linear", "fused", "other", "outside"]
    num_weights: int
    """Values in it; 0 for one that is tied to an earlier one."""
    shape: tuple[int, ...]
    """Of a linear (out_features, in_features), else of the parameter."""
    tied_to: str | None = None
    """The earlier target whose values these are."""
    real: bool = True
    """Whether the values are floating point, and not codes of some format."""


def find_targets(model: nn.Module) -> list[Target]:
    """Every parameter of two or more dimensions, in the model's order.

    Raises:
        ProbeError: the model has no decoder layers.
    """
    prefixes = tuple(f"{name}." for name, _ in decoder_layers(model))
    found: dict[int, Target] = {}
    targets = []
    for owner_name, owner in model.named_modules(remove_duplicate=False):
        for parameter_name, parameter in owner.named_parameters(recurse=False):
            if parameter.ndim < 2:
                continue
            full = f"{owner_name}.{parameter_name}" if owner_name else parameter_name
            name = owner_name if parameter_name == "weight" else full
            sort = _sort(owner, parameter, parameter_name) if full.startswith(prefixes) else "outside"
            first = found.get(id(parameter))
            targets.append(
                Target(
                    name,
                    sort,
                    0 if first else parameter.numel(),
                    tuple(reversed(parameter.shape)) if isinstance(owner, Conv1D) else tuple(parameter.shape),
                    first.name if first else None,
                    parameter.is_floating_point(),
                )
            )
            found.setdefault(id(parameter), targets[-1])
    return targets


def parents_of(model: nn.Module, module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Every (parent, child name) under which the model holds a module."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is module:
                yield parent, name


def _sort(owner: nn.Module, parameter: nn.Parameter, name: str) -> Literal["linear", "fused", "other"]:
    if name == "weight" and _is_linear(owner):
        return "linear"
    if parameter.ndim == 3 and not type(owner).__module__.startswith("torch."):
        return "fused"
    return "other"


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, Conv1D) or type(module).__name__ in _SAME_AS_LINEAR:
        return True
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
