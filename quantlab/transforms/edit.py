"""Edits: a module gives way to a copy with other parameters, under every name that the model has for it.

The old module is noted in an undo list, so that taking a transform off puts back the same objects. New values are
computed in float64 and rounded once, to the dtype of the old ones. O outputs, I inputs of a linear.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quantlab.errors import SchemeError
from quantlab.layers.targets import parents_of

__all__ = [
    "Undo",
    "copy_with",
    "locate",
    "matrix_of",
    "replace_",
    "restore",
    "set_bias_",
    "set_matrix_",
    "set_vector_",
]

Undo = list[tuple[Any, str, Any]]
"""(owner, name, old value) of every attribute that was replaced, in order."""


def restore(undo: Undo, until: int = 0) -> None:
    """Put back what was there, the last replacement first, until `until` of them are left."""
    while len(undo) > until:
        owner, name, old = undo.pop()
        setattr(owner, name, old)


def replace_(model: nn.Module, old: nn.Module, new: nn.Module, undo: Undo) -> None:
    """Put `new` wherever the model holds `old`."""
    for parent, name in list(parents_of(model, old)):
        setattr(parent, name, new)
        undo.append((parent, name, old))


def locate(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module and the name of its parameter: `weight`, where a name is a module's.

    Raises:
        SchemeError: the model has no such module.
    """
    parent, _, last = name.rpartition(".")
    try:
        owner = model.get_submodule(parent)
        found = owner._modules.get(last)
    except AttributeError:
        owner, found = model, None
    if found is not None:
        return found, "weight"
    if last in owner._parameters:
        return owner, last
    raise SchemeError(
        f"the graph of {type(model).__name__} names {name}, which this model has not. Leave the transform out."
    )


def copy_with(module: nn.Module, **parameters: Tensor | None) -> nn.Module:
    """A module that shares everything with the old one but the given parameters, and carries no hooks."""
    new = copy.copy(module)
    for key, value in vars(module).items():
        if isinstance(value, dict | set):
            new.__dict__[key] = type(value)() if "hooks" in key else copy.copy(value)
    for name, value in parameters.items():
        old = module._parameters.get(name)
        trained = any(each.requires_grad for each in module.parameters(recurse=False))
        like = old if old is not None else next(module.parameters(recurse=False))
        new._parameters[name] = None if value is None else _parameter(value, like, trained)
    return new


def _parameter(value: Tensor, like: Tensor, trained: bool) -> nn.Parameter:
    dtype = like.dtype if value.dtype == torch.float64 else value.dtype
    return nn.Parameter(value.to(dtype=dtype, device=like.device).contiguous(), requires_grad=trained)


def matrix_of(module: nn.Module, parameter: str = "weight") -> Tensor:
    """A linear's matrix [O, I] in float64, also of a Conv1D, which stores it transposed, and of a vector, [1, I]."""
    stored = getattr(module, parameter)
    assert isinstance(stored, Tensor)
    value = stored.detach().double()
    if value.ndim == 1:
        return value[None]
    return value.t() if isinstance(module, Conv1D) else value


def set_matrix_(model: nn.Module, name: str, matrix_OI: Tensor, undo: Undo, **others: Tensor | None) -> None:
    """Give the linear `name` another matrix, and other parameters by their names."""
    module, parameter = locate(model, name)
    value = matrix_OI.t() if isinstance(module, Conv1D) else matrix_OI
    value = value.reshape(getattr(module, parameter).shape)
    replace_(model, module, copy_with(module, **{parameter: value}, **others), undo)


def set_bias_(model: nn.Module, name: str, bias_O: Tensor, undo: Undo) -> None:
    """Give the linear `name` another bias, where it had none too."""
    module, _ = locate(model, name)
    replace_(model, module, copy_with(module, bias=bias_O), undo)


def set_vector_(model: nn.Module, name: str, undo: Undo, **parameters: Tensor) -> None:
    """Give the module or the owner of the parameter `name` other parameters."""
    module, _ = locate(model, name)
    replace_(model, module, copy_with(module, **parameters), undo)


def check_scales(scales: Tensor, count: int, where: str) -> Tensor:
    """The scales in float64, once they are known to be `count` positive numbers.

    Raises:
        SchemeError: they are not.
    """
    wide = scales.detach().double()
    if wide.shape != (count,):
        raise SchemeError(
            f"{where} takes {count} scales: found {list(wide.shape)}. Give one for each channel."
        )
    if not bool((torch.isfinite(wide) & (wide > 0)).all()):
        raise SchemeError(f"scales must be finite and above 0: {where} got {float(wide.min())} among others.")
    return wide
