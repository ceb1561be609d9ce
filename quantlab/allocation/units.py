"""Units: the matrices that get a width each, what each takes at each width, and what a budget leaves for them.

Sizes are those of `Changes`: codes packed densely, scales at the bits of the dtype that they are rounded to, everything
that is not quantized at 16 bits. O outputs, I inputs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from quantlab.allocation.config import AllocationConfig
from quantlab.changes import UNTOUCHED_BITS
from quantlab.errors import ConfigError
from quantlab.layers.targets import Target, choose_targets
from quantlab.schemes import Scheme, TensorSpec, check_shapes

__all__ = ["Budget", "Unit", "budget_of", "storage_bits", "units_of"]


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


@dataclass(frozen=True)
class Budget:
    """How many bits there are for the units."""

    capacity: int
    """Storage bits of all units together at most."""
    num_weights: int
    """Weights of the decoder, those that stay at 16 bits included."""
    fixed_decoder_bits: int
    """Storage of the decoder's matrices that are no units."""
    other_bits: int
    """Storage of everything outside these matrices: embeddings, lm_head, norms, biases."""

    def average_bits(self, units_bits: int) -> float:
        """`Changes.average_storage_bits` where the units take so many bits."""
        return (units_bits + self.fixed_decoder_bits) / self.num_weights

    def weights_bytes(self, units_bits: int) -> int:
        """`Changes.weights_bytes` where the units take so many bits."""
        return (units_bits + self.fixed_decoder_bits + self.other_bits + 7) // 8


def units_of(model: nn.Module, config: AllocationConfig, scale_bits: int) -> list[Unit]:
    """Every matrix that gets a width, in the model's order.

    Raises:
        SchemeError: the decoder has no linears, all are skipped, or a width's groups do not divide a linear.
        ProbeError: the model has no decoder layers.
    """
    chosen = choose_targets(model, config.skip).chosen
    specs = {width: _spec(width) for width in config.widths}
    shapes = {target.name: (target.shape[0], target.shape[1]) for target in chosen}
    for width in config.widths:
        check_shapes(Scheme.parse(width), shapes)
    first = {target.tied_to or target.name: target for target in reversed(chosen)}
    return [_unit(target, chosen, specs, scale_bits) for target in chosen if target in first.values()]


def storage_bits(shape: tuple[int, int], spec: TensorSpec | None, scale_bits: int) -> int:
    """Bits of a matrix [O, I] on a uniform grid, as `QuantizedTensor.storage_bits`; None is 16 bits a weight."""
    num_weights = math.prod(shape)
    if spec is None:
        return UNTOUCHED_BITS * num_weights
    num_scales = {"channel": shape[0], "tensor": 1, "group": num_weights // (spec.group_size or 1)}
    zero_point_bits = 0 if spec.symmetric else spec.bits
    return num_weights * spec.bits + num_scales[spec.granularity] * (scale_bits + zero_point_bits)


def budget_of(model: nn.Module, config: AllocationConfig, units: Sequence[Unit]) -> Budget:
    """What the budget leaves for the units.

    Raises:
        ConfigError: less than the narrowest widths take; names the smallest budget that is enough.
    """
    targets = choose_targets(model, config.skip).targets
    names = {name for unit in units for name in unit.names}
    decoder = [target for target in targets if target.sort != "outside"]
    num_weights = sum(target.num_weights for target in decoder)
    fixed = UNTOUCHED_BITS * sum(target.num_weights for target in decoder if target.name not in names)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    other = UNTOUCHED_BITS * (num_parameters - num_weights)
    if config.bits is not None:
        capacity = math.floor(config.bits * num_weights) - fixed
    else:
        assert config.megabytes is not None
        capacity = 8 * math.floor(config.megabytes * 1e6) - fixed - other
    budget = Budget(capacity, num_weights, fixed, other)
    _check_feasible(budget, config, sum(min(unit.bits.values()) for unit in units))
    return budget


def _check_feasible(budget: Budget, config: AllocationConfig, least: int) -> None:
    if least <= budget.capacity:
        return
    if config.bits is not None:
        asked, smallest = f"{config.bits:g} bits", f"--bits {_up(budget.average_bits(least), 4)}"
    else:
        asked, smallest = (
            f"{config.megabytes:g} MB",
            f"--megabytes {_up(budget.weights_bytes(least) / 1e6, 3)}",
        )
    raise ConfigError(
        f"a budget must hold every linear at the narrowest of {', '.join(config.widths)}: {asked} do not. The smallest "
        f"that does is {smallest}; ask for that, or add a narrower width."
    )


def _up(value: float, digits: int) -> str:
    """The value rounded up to so many decimals, so that asking for it is enough."""
    return f"{math.ceil(value * 10**digits) / 10**digits:.{digits}f}"


def _spec(width: str) -> TensorSpec | None:
    weights = Scheme.parse(width).weights
    assert weights is None or isinstance(weights, TensorSpec)
    return weights


def _unit(
    target: Target, chosen: Sequence[Target], specs: Mapping[str, TensorSpec | None], scale_bits: int
) -> Unit:
    key = target.tied_to or target.name
    names = tuple(each.name for each in chosen if (each.tied_to or each.name) == key)
    shape = (target.shape[0], target.shape[1])
    bits = {width: storage_bits(shape, spec, scale_bits) for width, spec in specs.items()}
    return Unit(target.name, names, math.prod(shape), bits)
