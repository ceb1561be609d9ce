"""Bias correction: what quantizing a linear changes on average is added back.

    b' = b + (W - W_hat) E[x],  so that E[W_hat x + b'] = E[W x + b]

Source: Nagel et al. 2019, arXiv:1906.04721, section 4.2. O outputs, I inputs.
"""

import torch
from torch import Tensor

from quantlab.errors import SchemeError

__all__ = ["correct_bias"]


def correct_bias(weight_OI: Tensor, quantized_OI: Tensor, bias_O: Tensor | None, mean_I: Tensor) -> Tensor:
    """The bias [O] that makes the mean output what it was, in the dtype of the weight.

    Args:
        quantized_OI: the matrix that will be multiplied by, dequantized.
        bias_O: none counts as zeros.
        mean_I: mean of each input channel over calibration tokens.

    Raises:
        SchemeError: a mean that is not finite, or matrices of other shapes.
    """
    if weight_OI.shape != quantized_OI.shape or mean_I.shape != weight_OI.shape[1:]:
        raise SchemeError(
            "bias correction takes two matrices of one shape and a mean for each column: found "
            f"{list(weight_OI.shape)}, {list(quantized_OI.shape)} and {list(mean_I.shape)}. Calibrate this model."
        )
    if not bool(torch.isfinite(mean_I).all()):
        raise SchemeError("bias correction takes finite mean inputs: found NaN or infinity. Calibrate anew.")
    shift_O = (weight_OI.double() - quantized_OI.double()) @ mean_I.double()
    bias_O = shift_O if bias_O is None else bias_O.double() + shift_O
    return bias_O.to(weight_OI.dtype)
