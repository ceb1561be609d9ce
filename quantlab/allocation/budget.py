"""What a budget leaves for the matrices that get a width, and whether it is enough. No torch.

Sizes are those of `Changes`: codes packed densely, scales at the bits of the dtype that they are rounded to, everything
that is not quantized at 16 bits.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from quantlab.allocation.config import AllocationConfig
from quantlab.changes import UNTOUCHED_BITS
from quantlab.errors import ConfigError
from quantlab.schemes import Scheme, TensorSpec, check_shapes

__all__ = ["Budget", "budget_for", "check_budget", "spec_of_width", "storage_bits"]


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


def budget_for(
    config: AllocationConfig,
    *,
    num_weights: int,
    num_fixed: int,
    num_parameters: int,
    least: int,
    enough: int | None = None,
) -> Budget:
    """What the budget leaves for the units.

    Args:
        num_weights: weights of the decoder; `num_fixed` of them in matrices that are no units.
        least: storage bits of all units at their narrowest.
        enough: the same where `least` is a lower bound and this is known to do.

    Raises:
        ConfigError: less than that; names the smallest budget that is enough.
    """
    fixed, other = UNTOUCHED_BITS * num_fixed, UNTOUCHED_BITS * (num_parameters - num_weights)
    if config.bits is not None:
        capacity = math.floor(config.bits * num_weights) - fixed
    else:
        assert config.megabytes is not None
        capacity = 8 * math.floor(config.megabytes * 1e6) - fixed - other
    budget = Budget(capacity, num_weights, fixed, other)
    if least > budget.capacity:
        raise _too_small(budget, config, enough or least)
    return budget


def check_budget(
    config: AllocationConfig,
    linears: Mapping[str, tuple[int, int]],
    num_parameters: int,
    scale_bits: int,
) -> None:
    """Refuse widths that do not fit the linears, and a budget that headers show to be too small.

    Scales are counted at 16 bits and matrices that headers do not tell are left out, so that what is refused here is
    refused with the model in hand too.

    Args:
        linears: name -> (O, I) of every linear of the decoder.
        scale_bits: of a scale at most; the budget that an error names is enough for these.

    Raises:
        ConfigError: as `budget_for`.
        SchemeError: a width's groups do not divide a linear.
    """
    for width in config.widths:
        check_shapes(Scheme.parse(width), linears, config.skip)
    specs = [spec_of_width(width) for width in config.widths]
    units = [
        shape
        for name, shape in linears.items()
        if not any(fnmatchcase(name, pattern) for pattern in config.skip)
    ]
    num_weights, num_units = (sum(map(math.prod, shapes)) for shapes in (linears.values(), units))
    least, enough = (
        sum(min(storage_bits(shape, spec, bits) for spec in specs) for shape in units)
        for bits in (UNTOUCHED_BITS, scale_bits)
    )
    if num_units:
        budget_for(
            config,
            num_weights=num_weights,
            num_fixed=num_weights - num_units,
            num_parameters=num_parameters,
            least=least,
            enough=enough,
        )


def storage_bits(shape: tuple[int, int], spec: TensorSpec | None, scale_bits: int) -> int:
    """Bits of a matrix [O, I] on a uniform grid, as `QuantizedTensor.storage_bits`; None is 16 bits a weight."""
    num_weights = math.prod(shape)
    if spec is None:
        return UNTOUCHED_BITS * num_weights
    num_scales = {"channel": shape[0], "tensor": 1, "group": num_weights // (spec.group_size or 1)}
    zero_point_bits = 0 if spec.symmetric else spec.bits
    return num_weights * spec.bits + num_scales[spec.granularity] * (scale_bits + zero_point_bits)


def spec_of_width(width: str) -> TensorSpec | None:
    """The grid that a candidate's name means; None where it leaves a linear at 16 bits."""
    weights = Scheme.parse(width).weights
    assert weights is None or isinstance(weights, TensorSpec)
    return weights


def _too_small(budget: Budget, config: AllocationConfig, least: int) -> ConfigError:
    if config.bits is not None:
        asked, smallest = f"{config.bits:g} bits", f"--bits {_up(budget.average_bits(least), 4)}"
    else:
        asked, smallest = (
            f"{config.megabytes:g} MB",
            f"--megabytes {_up(budget.weights_bytes(least) / 1e6, 3)}",
        )
    return ConfigError(
        f"a budget must hold every linear at the narrowest of {', '.join(config.widths)}: {asked} do not. The smallest "
        f"that does is {smallest}; ask for that, or add a narrower width."
    )


def _up(value: float, digits: int) -> str:
    """The value rounded up to so many decimals, so that asking for it is enough."""
    return f"{math.ceil(value * 10**digits) / 10**digits:.{digits}f}"
