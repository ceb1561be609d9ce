"""QuantLinear: one linear under a scheme, computed by the kernel that it names. O outputs, I inputs."""

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quantlab.errors import SchemeError
from quantlab.kernels import integer, llm_int8, packed_int4, packed_int8, reference
from quantlab.kernels.choice import Kernel
from quantlab.methods.solved import Quantized
from quantlab.numerics.affine import QuantizedTensor
from quantlab.numerics.codebook import CodebookTensor
from quantlab.numerics.static import Fixed
from quantlab.schemes import TensorSpec

__all__ = ["QuantLinear", "outlier_columns", "weight_of"]

_Codes = integer.Int8Weight | llm_int8.LlmInt8Weight | packed_int4.Int4Weight | packed_int8.PackedInt8Weight
"""Weights as the kernels that need no real matrix take them."""

_PACKED: dict[Kernel, type[packed_int4.Int4Weight] | type[packed_int8.PackedInt8Weight]] = {
    "int4_packed": packed_int4.Int4Weight,
    "int8_packed": packed_int8.PackedInt8Weight,
}


def weight_of(linear: nn.Module) -> Tensor:
    """The matrix [O, I] of an nn.Linear, or of a GPT-2 Conv1D, which stores it transposed; a view of the parameter."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight.t() if isinstance(linear, Conv1D) else weight


def outlier_columns(model: nn.Module) -> dict[str, dict[str, float]]:
    """Of every linear under llm_int8: input columns of a sequence that stayed at 16 bits, on average and at most."""
    return {
        name: {
            "mean": round(module.codes.outliers.mean, 3),
            "most": module.codes.outliers.most,
            "sequences": module.codes.outliers.num_sequences,
        }
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear) and isinstance(module.codes, llm_int8.LlmInt8Weight)
    }


class QuantLinear(nn.Module):
    """A linear's function with quantized weights, inputs, or both."""

    bias: Tensor | None
    real_weight: Tensor | None
    low: Tensor | None
    high: Tensor | None
    """The range of inputs under a static spec."""

    def __init__(
        self,
        linear: nn.Module,
        quantized: Quantized | None,
        inputs: TensorSpec | None,
        kernel: Kernel,
        name: str = "linear",
        fixed: Fixed | None = None,
        bias: Tensor | None = None,
    ) -> None:
        """quantized None keeps the linear's own weights; inputs None keeps its inputs at 16 bits.

        `fixed` is the range of inputs whose spec is static, from `numerics.static.static_range`. `bias` [O] stands for
        the linear's own. What a rotated linear does to its inputs first (`before`) is done here too.

        Dequantized weights are rounded to the linear's dtype; integer and packed kernels keep codes and scales instead.
        `name` is the place in the model, for messages.

        Raises:
            SchemeError: a packed kernel cannot take the matrix.
        """
        super().__init__()
        self.kernel, self.inputs, self.name = kernel, inputs, name
        weight_OI, own_bias = weight_of(linear).detach(), linear.bias
        assert own_bias is None or isinstance(own_bias, Tensor)
        bias = own_bias if bias is None else bias.to(weight_OI.dtype)
        before = getattr(linear, "before", None)
        assert before is None or isinstance(before, nn.Module)
        self.before = before
        self.out_features, self.in_features = weight_OI.shape
        self.dtype = weight_OI.dtype
        assert inputs is None or inputs.static == (fixed is not None), "static inputs go with a range"
        low, high = fixed or (None, None)
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("high", high, persistent=False)
        self.codes: _Codes | None = None
        if kernel == "int8_mm":
            assert isinstance(quantized, QuantizedTensor) and inputs is not None, (
                "an integer product takes codes on both sides"
            )
            self.codes = integer.Int8Weight(quantized)
        elif kernel == "llm_int8":
            assert isinstance(quantized, CodebookTensor), "llm_int8 takes its own codes"
            self.codes = llm_int8.LlmInt8Weight(quantized)
        elif kernel in _PACKED:
            assert isinstance(quantized, QuantizedTensor) and inputs is None, (
                "packed kernels take 16-bit inputs"
            )
            self.codes = _PACKED[kernel](quantized, name)
        elif quantized is not None:
            weight_OI = quantized.dequantize().to(self.dtype)
        self.register_buffer("real_weight", None if self.codes else weight_OI, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The real matrix [O, I] that this linear multiplies by, in the model's dtype."""
        if self.real_weight is not None:
            return self.real_weight
        assert self.codes is not None
        return self.codes.dequantize().to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[.., I] to [.., O]."""
        if self.before is not None:
            x = self.before(x)
        fixed = None if self.low is None or self.high is None else (self.low, self.high)
        spans_tokens = self.inputs is not None and self.inputs.granularity in ("tensor", "channel")
        if self.inputs is not None and spans_tokens and fixed is None and x.ndim < 3:
            raise SchemeError(
                f"a scale per sequence needs inputs [batch, tokens, channels]: {self.name} gets {list(x.shape)}, "
                f"where sequences cannot be told apart. Use one scale per token (a{self.inputs.bits}), or add "
                f'"*.{self.name.rpartition(".")[2]}" to skip.'
            )
        if isinstance(self.codes, llm_int8.LlmInt8Weight):
            return llm_int8.linear(x, self.codes, self.bias)
        if isinstance(self.codes, packed_int4.Int4Weight):
            return packed_int4.linear(x, self.codes, self.bias)
        if isinstance(self.codes, packed_int8.PackedInt8Weight):
            return packed_int8.linear(x, self.codes, self.bias)
        if self.codes is not None and self.inputs is not None:
            return integer.linear(x, self.codes, self.bias, self.inputs, fixed)
        return reference.linear(x, self.weight, self.bias, self.inputs, fixed)

    def extra_repr(self) -> str:
        """What stands in the printed model: `in_features=64, out_features=96, kernel=int8_mm`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, kernel={self.kernel}"
