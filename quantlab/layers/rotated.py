"""Linears and attention sites whose inputs are rotated as they arrive, so that no channel stands out when quantized.

    y = W x = (W H)(H^T x),    q . k = (H^T q) . (H^T k)

`RotatedLinear.before` is the rotation; what quantizes inputs does so behind it. Source: QuaRot, arXiv:2404.00456,
section 4 (before down_proj, and on queries and keys after rotary positions).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantlab.transforms.edit import matrix_of
from quantlab.transforms.hadamard import apply_factors, factors_of

__all__ = ["HadamardTransform", "HeadHadamard", "RotatedLinear"]


class HadamardTransform(nn.Module):
    """x [..., n] times an orthogonal matrix given as Kronecker factors; computed in float32 or wider."""

    def __init__(self, factors: Sequence[Tensor]) -> None:
        """factors: float64, kept in float32; those of a Hadamard matrix are +-1 times one number."""
        super().__init__()
        self.num_factors = len(factors)
        for index, factor in enumerate(factors):
            self.register_buffer(f"factor_{index}", factor.float(), persistent=False)

    @property
    def factors(self) -> list[Tensor]:
        """The factors, as they are applied."""
        return [self.get_buffer(f"factor_{index}") for index in range(self.num_factors)]

    def forward(self, x: Tensor) -> Tensor:
        """[..., n], dtype of x."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return apply_factors(x.to(wide), [factor.to(wide) for factor in self.factors]).to(x.dtype)


class RotatedLinear(nn.Linear):
    """A linear, or a Conv1D, that rotates its inputs and has the rotation in its weight."""

    def __init__(self, linear: nn.Module) -> None:
        """The same function as `linear`, whose weight is rotated in float64 and rounded once."""
        matrix_OI, bias = matrix_of(linear), linear.bias
        assert isinstance(linear.weight, Tensor) and (bias is None or isinstance(bias, Tensor))
        super().__init__(matrix_OI.shape[1], matrix_OI.shape[0], bias=bias is not None, device="meta")
        factors = [factor.to(matrix_OI.device) for factor in factors_of(matrix_OI.shape[1])]
        rotated_OI = apply_factors(matrix_OI, factors).to(linear.weight.dtype)
        self.weight = nn.Parameter(rotated_OI, requires_grad=linear.weight.requires_grad)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
        self.before = HadamardTransform(factors)
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        return F.linear(self.before(x), self.weight, self.bias)


class HeadHadamard(HadamardTransform):
    """Stands at a site of queries or of keys: each head's d channels are rotated by the same Hadamard matrix.

    Both sites of a layer must have one, or the products change.
    """

    def __init__(self, head_dim: int, then: nn.Module | None = None) -> None:
        """`then` stands behind the rotation, as what quantizes queries or keys does; none gives them as they are."""
        super().__init__(factors_of(head_dim))
        self.then = then

    def forward(self, x_BHTd: Tensor, *where: Any) -> Any:
        """[B, H, T, d], dtype of x; where `then` stands, what it gives for the turned tensor."""
        turned = super().forward(x_BHTd)
        return turned if self.then is None else self.then(turned, *where)
