"""LLM.int8(): int8 products, but for the inputs where a sequence has an outlier; those stay real.

An input (a column of x) is an outlier of a sequence where any of its tokens reaches the threshold. With codes q of
x and c of w, scaled by s_x (largest magnitude of a token that is below the threshold) and s_w (of an output):

    y = s_x s_w / 127^2 sum over the others (q c)  +  s_w / 127 sum over outliers (x c)

Which inputs are outliers depends on one sequence alone, never on its batch, so a batch gives every sequence the
bits that it gets by itself. x is rounded to float16 for threshold and codes, as in bitsandbytes; the outliers' sum
is float32 and rounded once, to x's dtype. Source: Dettmers et al. 2022, arXiv:2208.07339, section 3.

B sequences, T tokens, K inputs, N outputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantlab.errors import SchemeError
from quantlab.kernels.product import exact_product, full_precision
from quantlab.numerics.codebook import CodebookTensor

__all__ = ["THRESHOLD", "LlmInt8Weight", "OutlierCount", "linear", "quantize_inputs"]

THRESHOLD = 6.0
"""Magnitude from which an input is an outlier: the paper's."""


@dataclass
class OutlierCount:
    """How many inputs were outliers, over the sequences seen so far."""

    num_sequences: int = 0
    total: int = 0
    """Outlier columns of all sequences together."""
    most: int = 0
    """Outlier columns of the sequence that has most."""

    @property
    def mean(self) -> float:
        """Outlier columns of a sequence, on average; 0 before the first one."""
        return self.total / max(self.num_sequences, 1)

    def add(self, num_columns: int) -> None:
        """Count one sequence."""
        self.num_sequences += 1
        self.total += num_columns
        self.most = max(self.most, num_columns)


class LlmInt8Weight(nn.Module):
    """The weights of `methods.llm_int8` as `linear` takes them, and the outliers that it met."""

    codes: Tensor
    """[N, K] int8."""
    scale: Tensor
    """[N] float32: the largest magnitude of each output, bitsandbytes' SCB."""

    def __init__(self, weight: CodebookTensor) -> None:
        super().__init__()
        self.register_buffer("codes", weight.codes.view(torch.int8).contiguous(), persistent=False)
        self.register_buffer("scale", weight.scale.flatten(), persistent=False)
        self.outliers = OutlierCount()

    def dequantize(self) -> Tensor:
        """The real matrix [N, K], float32."""
        return self.codes.float() / 127 * self.scale.unsqueeze(-1)


def quantize_inputs(x_BTK: Tensor, threshold: float = THRESHOLD) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [B, T, K] int8, 0 in outlier columns; scale [B, T, 1] float32; outlier columns [B, K] bool.

    A magnitude that equals the threshold in float16 is an outlier. As in bitsandbytes, tokens of an outlier column
    that are themselves below the threshold still count for their token's scale.
    """
    half = x_BTK.half()
    outlier = half.abs() >= threshold
    columns_BK = outlier.any(-2)
    rest = half.masked_fill(outlier, 0.0).float()
    scale = rest.abs().amax(-1, keepdim=True)
    units = rest * (127.0 / scale)
    codes = units.masked_fill_((scale == 0) | columns_BK.unsqueeze(-2), 0.0).round_()
    return codes.to(torch.int8), scale, columns_BK


def linear(
    x: Tensor, weight: LlmInt8Weight, bias: Tensor | None = None, threshold: float = THRESHOLD
) -> Tensor:
    """x [.., T, K] times the weights, every sequence by itself; [.., T, N] in x's dtype. NaN of a token stays NaN.

    Two dimensions are one sequence. Counts the outlier columns of every sequence in `weight.outliers`.

    Error bound: against exact arithmetic on the same codes, (C + 5) u of the outliers' sum of magnitudes for C outlier
    columns, 5 u of the integer part, one rounding for the bias and one to x's dtype; u = 2^-24.

    Raises:
        SchemeError: x has no dimension of tokens.
    """
    if x.ndim < 2:
        raise SchemeError(f"llm_int8 needs inputs [.., tokens, channels]: found {list(x.shape)}.")
    x_BTK = x.reshape(-1, *x.shape[-2:])
    codes, scale, columns_BK = quantize_inputs(x_BTK, threshold)
    sums = exact_product(codes.flatten(0, 1), weight.codes)
    out = sums.float().mul_(scale.flatten(0, 1) / 127).mul_(weight.scale / 127)
    out = out.view(*x_BTK.shape[:-1], -1)
    for out_TN, x_TK, columns_K in zip(out, x_BTK, columns_BK, strict=True):
        columns = columns_K.nonzero().squeeze(-1)
        weight.outliers.add(len(columns))
        if len(columns):
            out_TN.add_(_outlier_sums(x_TK[:, columns], weight, columns))
    if bias is not None:
        out.add_(bias)
    return out.view(*x.shape[:-1], -1).to(x.dtype)


def _outlier_sums(x_TC: Tensor, weight: LlmInt8Weight, columns: Tensor) -> Tensor:
    """What C outlier columns of one sequence add, [T, N] float32."""
    with full_precision(x_TC.device.type):
        return (x_TC.float() @ weight.codes[:, columns].float().t()).mul_(weight.scale / 127)
