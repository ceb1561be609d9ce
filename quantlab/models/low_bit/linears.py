"""Linears on the codes of a folder."""

from collections.abc import Mapping
from math import prod
from typing import cast

import torch
from torch import nn

from quantlab.changes import Change
from quantlab.kernels.choice import Kernel, check_integers, check_packed, choose_kernel
from quantlab.layers.linear import QuantLinear
from quantlab.layers.rotated import HadamardTransform
from quantlab.methods.solved import Quantized
from quantlab.models.low_bit.architecture import disagrees, shape_of
from quantlab.models.low_bit.carried import Carried
from quantlab.models.low_bit.codes import as_quantized
from quantlab.models.low_bit.ranges import fixed_inputs
from quantlab.reading.decoded import Decoded
from quantlab.reading.readers import decoder_of
from quantlab.schemes import TensorSpec, WeightFormat
from quantlab.transforms.edit import replace_

__all__ = ["put_linear_"]


def put_linear_(
    model: nn.Module, name: str, stored: str, carried: Carried, place: torch.device, kernel: str
) -> Change:
    """Put a QuantLinear with the folder's codes in the place of one linear, under every name that it has.

    Args:
        stored: what the folder calls it.
    """
    linear = model.get_submodule(name)
    if isinstance(linear, QuantLinear):  # a linear that the model holds twice
        return Change(name, "swapped", f"{carried.linears[stored]}, held twice", 16, 0, linear.kernel)
    shape, owner = shape_of(linear), carried.linears[stored]
    decoded = None if owner is None else _decoded(carried, stored, owner, shape)
    quantized = None if decoded is None else as_quantized(decoded)
    inputs, weights = carried.inputs_of(stored), carried.weights_of(stored, quantized)
    runs = _kernel(carried, {name: shape}, weights, inputs, place, kernel)
    if (factors := carried.rotation(stored)) is not None:
        linear.before = HadamardTransform(factors)
    swapped = QuantLinear(
        linear,
        cast("Quantized | None", quantized),
        inputs,
        runs,
        name,
        fixed=fixed_inputs(carried, stored),
        bias=carried.corrected_bias(stored),
    )
    replace_(model, linear, swapped, [])
    return Change(
        name,
        "swapped",
        "as it is" if decoded is None else f"codes of a folder in {carried.method}'s format",
        16 if decoded is None else decoded.bits,
        prod(shape) if owner in (None, stored) else 0,
        runs,
        carried.storage_bits(stored),
    )


def _decoded(carried: Carried, name: str, owner: str, shape: tuple[int, int]) -> Decoded:
    """The codes of a linear, which are those of its owner, of the shape that the architecture asks for."""
    decoded = decoder_of(carried.raw).decode(carried.raw, owner)
    if decoded.codes_OI.shape != shape:
        raise disagrees(name, decoded.codes_OI.shape, shape, carried.raw.path)
    return decoded


def _kernel(
    carried: Carried,
    shapes: Mapping[str, tuple[int, int]],
    weights: TensorSpec | WeightFormat | None,
    inputs: TensorSpec | None,
    place: torch.device,
    kernel: str,
) -> Kernel:
    """What the linear runs as, which can take its shape."""
    runs, _ = choose_kernel(weights, inputs, place.type, kernel)
    if runs == "int8_mm":
        assert isinstance(weights, TensorSpec) and inputs is not None
        check_integers(weights, inputs, shapes)
        # Its zero points are no whole numbers.
        return "simulated" if carried.scheme is not None and carried.scheme.method == "hqq" else runs
    if runs in ("int4_packed", "int8_packed"):
        assert isinstance(weights, TensorSpec)
        check_packed(runs, weights, shapes)
    return runs
