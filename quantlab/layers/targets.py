"""Targets: every weight matrix of a model, what a scheme can do with it, and which ones it is to quantize.

linear    nn.Linear, GPT-2's Conv1D or a subclass that computes the same, inside a decoder layer
fused     any other large matrix of a decoder layer, mostly the experts of a layer in one parameter: refused
other     any further matrix of a decoder layer (routers, relative positions): stays at 16 bits
outside   embeddings, lm_head and whatever else lies outside the decoder layers: stays at 16 bits

Large means as many values as hidden_size x hidden_size, in two dimensions or more that are no 1.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from probes.sites import decoder_layers
from quantlab.errors import SchemeError, nearest

__all__ = ["Choice", "Target", "check_skip", "choose_targets", "find_targets", "is_skipped", "parents_of"]

_SAME_AS_LINEAR = ("FalconLinear", "RotatedLinear")
"""Subclasses of nn.Linear with a forward of their own that computes x W^T + b all the same, or of rotated x."""


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

    @property
    def is_meant(self) -> bool:
        """Whether it is to be quantized where no pattern skips it; what cannot be is then refused."""
        return self.sort in ("linear", "fused") or (self.sort == "other" and not self.real)


@dataclass(frozen=True)
class Choice:
    """What becomes of the matrices of a model."""

    targets: tuple[Target, ...]
    """All of them."""
    chosen: tuple[Target, ...]
    """Linears to quantize."""
    skipped: tuple[Target, ...]
    """Matrices of the decoder that would be quantized but for a pattern."""


def choose_targets(model: nn.Module, skip: Sequence[str]) -> Choice:
    """The decoder's linears that a scheme of weights or of inputs quantizes, and those that patterns keep from it.

    Raises:
        SchemeError: a pattern matches nothing, nothing is left, a matrix is no linear or holds codes already, or a
            matrix that goes by several names is to be quantized under one and kept under another.
        ProbeError: the model has no decoder layers.
    """
    targets = check_skip(model, skip)
    meant = [target for target in targets if target.is_meant]
    chosen = [target for target in meant if not is_skipped(target, skip)]
    for target in chosen:
        _check_quantizable(target)
    _check_shared(targets, chosen)
    if not chosen:
        name = type(model).__name__
        found = f"the {len(meant)} of {name} are all skipped. Skip less" if meant else f"{name} has none"
        raise SchemeError(f"a scheme must quantize some linear of the decoder layers: {found}.")
    return Choice(
        tuple(targets), tuple(chosen), tuple(target for target in meant if is_skipped(target, skip))
    )


def check_skip(model: nn.Module, skip: Sequence[str]) -> list[Target]:
    """Every target of the model, once each pattern is known to match one.

    Raises:
        SchemeError: a pattern matches nothing; the message names matrices of the decoder.
    """
    targets = find_targets(model)
    names = [target.name for target in targets if target.sort != "outside"]
    for pattern in skip:
        if not any(fnmatchcase(target.name, pattern) for target in targets):
            short = dict.fromkeys("*." + name.rpartition(".")[2] for name in names)
            hint = nearest(pattern, [*short, *names]) or f" There are {', '.join(short)}."
            raise SchemeError(f"a skip pattern must match a weight matrix: {pattern!r} matches none.{hint}")
    return targets


def is_skipped(target: Target, skip: Sequence[str]) -> bool:
    """Whether a pattern keeps the target as it is."""
    return any(fnmatchcase(target.name, pattern) for pattern in skip)


def _check_quantizable(target: Target) -> None:
    if not target.real:
        raise SchemeError(
            f"weights must be floating point to be quantized: {target.name} holds codes already. Load the "
            f'checkpoint dequantized, or add "{target.name}" to skip.'
        )
    if target.sort == "fused":
        raise SchemeError(
            "large matrices that are no nn.Linear, as experts fused into one parameter, cannot be quantized in this "
            f"version: {target.name} is {list(target.shape)}. "
            f'Add "*.{target.name.rpartition(".")[2]}" to skip, and they stay at 16 bits.'
        )


def _check_shared(targets: Sequence[Target], chosen: Sequence[Target]) -> None:
    """Refuse a matrix that is quantized under one of its names only."""
    names = {target.name for target in chosen}
    chosen_name = {target.tied_to or target.name: target.name for target in reversed(chosen)}
    for target in targets:
        other = chosen_name.get(target.tied_to or target.name)
        if other is None or target.name in names:
            continue
        instead = "Skip both or neither" if target.is_meant else f'Add "{other}" to skip'
        raise SchemeError(
            f"a matrix must be quantized under all of its names or under none: {other} and {target.name} are one "
            f"matrix, and the latter is to stay at 16 bits. {instead}."
        )


def find_targets(model: nn.Module) -> list[Target]:
    """Every parameter of two or more dimensions, in the model's order.

    Raises:
        ProbeError: the model has no decoder layers.
    """
    prefixes = tuple(f"{name}." for name, _ in decoder_layers(model))
    hidden_size = _hidden_size(model)
    found: dict[int, Target] = {}
    targets = []
    for owner_name, owner in model.named_modules(remove_duplicate=False):
        for parameter_name, parameter in owner.named_parameters(recurse=False):
            if parameter.ndim < 2:
                continue
            full = f"{owner_name}.{parameter_name}" if owner_name else parameter_name
            name = owner_name if parameter_name == "weight" else full
            inside = full.startswith(prefixes)
            sort = _sort(owner, parameter, parameter_name, hidden_size) if inside else "outside"
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


def _hidden_size(model: nn.Module) -> int:
    """Channels of the residual stream; 0 where the model does not say, and every matrix counts as large."""
    config = getattr(model, "config", None)
    if isinstance(config, PretrainedConfig):
        config = config.get_text_config()
    return int(getattr(config, "hidden_size", 0))


def _sort(
    owner: nn.Module, parameter: nn.Parameter, name: str, hidden_size: int
) -> Literal["linear", "fused", "other"]:
    if name == "weight" and _is_linear(owner):
        return "linear"
    is_matrix = sum(size > 1 for size in parameter.shape) >= 2
    if is_matrix and parameter.numel() >= hidden_size**2 and not isinstance(owner, nn.Embedding):
        return "fused"
    return "other"


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, Conv1D) or type(module).__name__ in _SAME_AS_LINEAR:
        return True
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
