"""Which kernel a linear runs on: chosen from the scheme and the device before anything runs, and recorded."""

from collections.abc import Mapping
from typing import Literal

from quantlab.errors import SchemeError
from quantlab.kernels import integer, packed_int4, packed_int8
from quantlab.numerics.qtype import QType
from quantlab.schemes import TensorSpec, WeightFormat

__all__ = ["KERNELS", "Kernel", "check_integers", "check_packed", "choose_kernel"]

Kernel = Literal["weight_only", "simulated", "int8_mm", "llm_int8", "int4_packed", "int8_packed"]
"""The names of `quantlab.kernels`."""

KERNELS = {
    "integer": "real integer products where both sides are codes and the product is the faster path",
    "simulated": "float arithmetic on dequantized values: the reference",
    "packed": "weights stay packed in memory; bf16 inputs; CPU",
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

    Raises:
        SchemeError: `packed` was asked for, and no packed kernel takes these specs on this device.
    """
    if kernel == "packed":
        return _packed_kernel(weights, inputs, device), ""
    if isinstance(weights, WeightFormat) and weights.name == "llm_int8":
        return "llm_int8", ""
    if inputs is None:
        return "weight_only", ""
    if kernel == "simulated":
        return "simulated", ""
    if weights is None:
        return "simulated", "16-bit weights have no integer product"
    if isinstance(weights, WeightFormat):
        return "simulated", f"{weights.name} has no integer product"
    if inputs.granularity in ("channel", "group"):
        return "simulated", f"a scale per {inputs.granularity} of inputs cannot leave an integer sum"
    if weights.group_size is not None and (
        device != "cpu" or weights.group_size < integer.INTEGER_GROUP_SIZE
    ):
        return "simulated", f"float is faster than integers at {weights.group_size} weights per scale"
    return "int8_mm", ""


def check_integers(weights: TensorSpec, inputs: TensorSpec, linears: Mapping[str, tuple[int, int]]) -> None:
    """Refuse integer sums that int32 cannot hold.

    Args:
        linears: name -> (out_features, in_features).

    Raises:
        SchemeError: says which, and that the simulated kernel gives the numbers of the same scheme.
    """
    most = integer.max_in_features(QType.of_weights(weights), QType.of_activations(inputs))
    for name, (_, in_features) in linears.items():
        summed = weights.group_size or in_features
        if summed > most:
            raise SchemeError(
                f"sums of w{weights.bits}a{inputs.bits} fit int32 up to {most} inputs: {name} has {summed}. Use "
                "kernel=simulated."
            )


def check_packed(kernel: Kernel, weights: TensorSpec, linears: Mapping[str, tuple[int, int]]) -> None:
    """Refuse matrices that the packed kernel cannot take, by their shapes and this machine's layout alone.

    Args:
        kernel: `int4_packed` or `int8_packed`.
        linears: name -> (out_features, in_features).

    Raises:
        SchemeError: names the first such matrix, and what the kernel needs.
    """
    if kernel == "int4_packed":
        packed_int4.block_size()
    for name, shape in linears.items():
        reason = _packed_reason(kernel, weights, shape)
        if reason is not None:
            raise SchemeError(
                f"{kernel} needs {reason}, in {name}. Use kernel=integer, or add "
                f'"*.{name.rpartition(".")[2]}" to skip.'
            )


def _packed_reason(kernel: Kernel, weights: TensorSpec, shape: tuple[int, int]) -> str | None:
    if kernel == "int4_packed":
        return packed_int4.why_not(weights.bits, weights.group_size, shape)
    return packed_int8.why_not(weights.symmetric, weights.group_size, shape)


def _packed_kernel(
    weights: TensorSpec | WeightFormat | None, inputs: TensorSpec | None, device: str
) -> Kernel:
    """The kernel that keeps codes in memory; 16-bit weights and inputs stay what they are."""
    if device != "cpu":
        raise SchemeError(
            f"packed kernels run on the CPU: found {device}. Use kernel=integer, or device=cpu."
        )
    if isinstance(weights, WeightFormat):
        if weights.name != "llm_int8":
            raise SchemeError(
                f"packed kernels need integer codes: those of {weights.name} are none. Use kernel=integer."
            )
        return "llm_int8"
    if inputs is not None:
        kernel, reason = choose_kernel(weights, inputs, device)
        if kernel != "int8_mm":
            raise SchemeError(
                f"packed kernels take low-bit inputs in integer products only: {reason}. Use kernel=integer."
            )
        return kernel
    if weights is None:
        return "weight_only"
    packed: Kernel = "int4_packed" if weights.bits <= packed_int4.MAX_BITS else "int8_packed"
    # Rows that no kernel refuses, so that only the grid can be at fault.
    fault = _packed_reason(packed, weights, (256, 256 if weights.group_size is None else weights.group_size))
    if packed == "int8_packed" and weights.group_size is not None:
        fault = f"one scale per output: it has one per {weights.group_size} inputs"
    if fault is not None:
        raise SchemeError(f"{packed} needs {fault}. Use kernel=integer.")
    return packed
