"""Which kernel a linear runs on: chosen from the scheme and the device before anything runs, and recorded."""

from collections.abc import Mapping
from typing import Literal

import torch

from quantlab.errors import SchemeError
from quantlab.kernels import integer
from quantlab.numerics.qtype import QType
from quantlab.schemes import TensorSpec, WeightFormat

__all__ = ["KERNELS", "Kernel", "check_integers", "choose_kernel"]

Kernel = Literal["weight_only", "simulated", "int8_mm", "llm_int8"]
"""The names of `quantlab.kernels`."""

KERNELS = {
    "integer": "real integer products where both sides are codes and the product is the faster path",
    "simulated": "float arithmetic on dequantized values: the reference",
}
"""What a user may ask for; which kernel a linear then runs on stands in its row of the changes."""


def choose_kernel(
    weights: TensorSpec | WeightFormat | None,
    inputs: TensorSpec | None,
    device: str,
    kernel: str = "integer",
) -> tuple[Kernel, str]:
    """The kernel of a linear under these specs, and the reason where it is not the one asked for.

    Args:
        device: `cpu` or `cuda`.
        kernel: a name of `KERNELS`.
    """
    if isinstance(weights, WeightFormat) and weights.name == "llm_int8":
        return "llm_int8", ""
    if inputs is None:
        return "weight_only", ""
    if kernel == "simulated":
        return "simulated", ""
    if weights is None:
        return "simulated", "16-bit weights have no integer product"
    if isinstance(weights, WeightFormat):
        return "simulated", f"codes of {weights.name} are no integers"
    if inputs.granularity in ("channel", "group"):
        return "simulated", f"a scale per {inputs.granularity} of inputs cannot leave an integer sum"
    if weights.group_size is not None and (
        device != "cpu" or weights.group_size < integer.INTEGER_GROUP_SIZE
    ):
        return "simulated", f"float is faster than integers at {weights.group_size} weights per scale"
    return "int8_mm", ""


def check_integers(
    weights: TensorSpec, inputs: TensorSpec, linears: Mapping[str, tuple[int, int]], device: torch.device
) -> None:
    """Refuse integer sums that this machine cannot form or int32 cannot hold.

    Args:
        linears: name -> (out_features, in_features).

    Raises:
        SchemeError: says which, and that the simulated kernel gives the numbers of the same scheme.
    """
    if not integer.sums_are_exact(str(device)):
        raise SchemeError(
            f"integer kernels need exact int8 products: {device} has none. Use kernel=simulated, the same scheme in "
            "float arithmetic."
        )
    most = integer.max_in_features(QType.of_weights(weights), QType.of_activations(inputs))
    for name, (_, in_features) in linears.items():
        summed = weights.group_size or in_features
        if summed > most:
            raise SchemeError(
                f"sums of w{weights.bits}a{inputs.bits} fit int32 up to {most} inputs: {name} has {summed}. Use "
                "kernel=simulated."
            )
