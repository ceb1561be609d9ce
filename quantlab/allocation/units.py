"""Units: the matrices that get a width each, what each takes at each width, and what a budget leaves for them.

O outputs, I inputs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from quantlab.allocation.budget import Budget, budget_for, spec_of_width, storage_bits
from quantlab.allocation.config import AllocationConfig
from quantlab.layers.targets import Target, choose_targets
from quantlab.schemes import Scheme, TensorSpec, check_shapes

__all__ = ["Unit", "budget_of", "units_of"]


@dataclass(frozen=True)
class Unit:
    """One matrix of the decoder, under all of its names."""

    name: str
    """Dotted name of its linear."""
    names: tuple[str, ...]
    """The same and every other linear that is this matrix."""
    num_weights: int
    bits: Mapping[str, int]
    """Width -> storage bits of the whole matrix, scales and zero points included."""


def units_of(model: nn.Module, config: AllocationConfig, scale_bits: int) -> list[Unit]:
    """Every matrix that gets a width, in the model's order.

    Raises:
        SchemeError: the decoder has no linears, all are skipped, or a width's groups do not divide a linear.
        ProbeError: the model has no decoder layers.
    """
    chosen = choose_targets(model, config.skip).chosen
    specs = {width: spec_of_width(width) for width in config.widths}
    shapes = {target.name: (target.shape[0], target.shape[1]) for target in chosen}
    for width in config.widths:
        check_shapes(Scheme.parse(width), shapes)
    first = {target.tied_to or target.name: target for target in reversed(chosen)}
    return [_unit(target, chosen, specs, scale_bits) for target in chosen if target in first.values()]


def budget_of(model: nn.Module, config: AllocationConfig, units: Sequence[Unit]) -> Budget:
    """What the budget leaves for the units.

    Raises:
        ConfigError: less than the narrowest widths take; names the smallest budget that is enough.
    """
    targets = choose_targets(model, config.skip).targets
    names = {name for unit in units for name in unit.names}
    decoder = [target for target in targets if target.sort != "outside"]
    return budget_for(
        config,
        num_weights=sum(target.num_weights for target in decoder),
        num_fixed=sum(target.num_weights for target in decoder if target.name not in names),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        least=sum(min(unit.bits.values()) for unit in units),
    )


def _unit(
    target: Target, chosen: Sequence[Target], specs: Mapping[str, TensorSpec | None], scale_bits: int
) -> Unit:
    key = target.tied_to or target.name
    names = tuple(each.name for each in chosen if (each.tied_to or each.name) == key)
    shape = (target.shape[0], target.shape[1])
    bits = {width: storage_bits(shape, spec, scale_bits) for width, spec in specs.items()}
    return Unit(target.name, names, math.prod(shape), bits)
