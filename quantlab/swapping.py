"""Swapping linears: a QuantLinear in the place of each one that a scheme quantizes, and the row that says so.

Letters: O outputs, I inputs of a linear.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from quantlab.changes import Change
from quantlab.errors import CalibrationError
from quantlab.kernels.choice import choose_kernel
from quantlab.layers.linear import QuantLinear, weight_of
from quantlab.layers.targets import Target, is_skipped
from quantlab.methods.solved import Solved
from quantlab.numerics.block import BlockTensor
from quantlab.numerics.static import Fixed, static_range
from quantlab.schemes import Scheme
from quantlab.solving.asked import Asked
from quantlab.solving.seen import Inputs
from quantlab.transforms.bias import correct_bias
from quantlab.transforms.edit import Undo, replace_

__all__ = ["Work", "corrected", "stays", "swap_linear"]


@dataclass(frozen=True)
class Work:
    """What is known of the linears when they are swapped."""

    asked: Asked
    solved: Mapping[str, Solved] = field(default_factory=dict)
    inputs: Inputs = field(default_factory=dict)


def swap_linear(model: nn.Module, target: Target, work: Work, undo: Undo) -> Change:
    """Put a QuantLinear in the place of one linear, under every name that it has."""
    scheme, dtype = work.asked.scheme, work.asked.scale_dtype
    linear = model.get_submodule(target.name)
    weights = work.asked.weights_of(target.name)
    device = next(linear.parameters(), torch.empty(0)).device
    kernel, reason = choose_kernel(weights, scheme.activations, device.type, work.asked.config.kernel)
    # A matrix of several names has the codes of its first.
    solved = work.solved.get(target.tied_to or target.name)
    if kernel == "int8_mm" and scheme.method == "hqq":
        kernel, reason = "simulated", "zero points of hqq are real numbers"
    assert weights is None or solved is not None, f"{target.name} was not solved"
    storage_bits = 16 * target.num_weights
    if solved is not None:
        storage_bits = 0 if target.tied_to else solved.quantized.storage_bits(8 * dtype.itemsize)
    if not isinstance(linear, QuantLinear):  # a linear that the model holds twice was swapped the first time
        swapped = QuantLinear(
            linear,
            None if solved is None else solved.quantized,
            scheme.activations,
            kernel,
            target.name,
            fixed=_fixed(target.name, work, device),
            bias=corrected(linear, target, work),
        )
        replace_(model, linear, swapped.train(linear.training), undo)
    why = Scheme(weights, scheme.activations).name
    if weights is not None and solved is not None and scheme.method != "rtn":
        why += f"-{scheme.method}"
    why = ": ".join(filter(None, (why, reason)))
    bits = 16 if weights is None else weights.bits
    if solved is not None and isinstance(solved.quantized, BlockTensor):
        # Of the type that is stored, which may be another than the one asked for.
        bits = solved.quantized.bits
    note = solved.note if solved else ""
    return Change(target.name, "swapped", why, bits, target.num_weights, kernel, storage_bits, note=note)


def stays(target: Target, skip: Sequence[str]) -> Change:
    """The row of a matrix that stays at 16 bits."""
    reasons = {
        "outside": "outside the decoder layers (embeddings and lm_head stay at 16 bits)",
        "other": "not a linear",
    }
    why = "skip" if is_skipped(target, skip) else reasons.get(target.sort, "")
    if target.tied_to:
        why += f"; tied to {target.tied_to}"
    in_decoder = target.sort != "outside"
    return Change(
        target.name, "skipped", why, 16, target.num_weights, "", 16 * target.num_weights, in_decoder
    )


def corrected(linear: nn.Module, target: Target, work: Work) -> torch.Tensor | None:
    """The linear's bias with what makes up for the mean error of its weights; None leaves it as it is."""
    solved = work.solved.get(target.tied_to or target.name)
    if "bias" not in work.asked.scheme.transforms or solved is None:
        return None
    mean_I = work.inputs[target.name].mean_I.to(weight_of(linear).device)
    return correct_bias(weight_of(linear), solved.quantized.dequantize(), linear.bias, mean_I)  # type: ignore[arg-type]


def _fixed(name: str, work: Work, device: torch.device) -> Fixed | None:
    """The range of a linear's inputs under a static spec."""
    spec = work.asked.scheme.activations
    if spec is None or not spec.static:
        return None
    stats = work.inputs[name]
    if stats.num_tokens == 0:
        raise CalibrationError(
            f"static scales need inputs that calibration has seen: no token reached {name}. Calibrate on more text, "
            f"leave the 's' out, or add \"*.{name.rpartition('.')[2]}\" to skip."
        )
    low, high = static_range(spec, stats.minimum_I, stats.maximum_I)
    return low.to(device), high.to(device)
