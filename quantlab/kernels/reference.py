"""The reference: a quantized linear as float arithmetic on dequantized values. It defines what every kernel computes.

inputs [.., T, I], weight_OI the real matrix that the codes stand for, bias [O]; all in the model's dtype.
"""

from torch import Tensor
from torch.nn import functional

from quantlab.numerics.dynamic import dynamic_range, fake_quantize_in_range
from quantlab.numerics.static import Fixed
from quantlab.schemes import TensorSpec

__all__ = ["fake_quantize_inputs", "linear"]


def fake_quantize_inputs(x: Tensor, spec: TensorSpec, fixed: Fixed | None = None) -> Tensor:
    """Inputs of a linear, quantized and dequantized, in the range `fixed` or their own; same shape and dtype."""
    return fake_quantize_in_range(x, *(fixed or dynamic_range(x, "inputs", spec)), spec)


def linear(
    x: Tensor,
    weight_OI: Tensor,
    bias: Tensor | None,
    inputs: TensorSpec | None = None,
    fixed: Fixed | None = None,
) -> Tensor:
    """x times the dequantized weights; inputs are fake-quantized first where a spec is given."""
    return functional.linear(x if inputs is None else fake_quantize_inputs(x, inputs, fixed), weight_OI, bias)
