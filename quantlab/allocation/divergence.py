"""Divergence of next-token distributions from those of the 16-bit model: KL(p || q), in nats.

With d = logits of q - logits of p, KL(p || q) = log E_p[exp(d)] - E_p[d] = log(1 + E_p[exp(d) - 1]) - E_p[d]: whatever
both logits share cancels before anything is rounded, so that divergences of 1e-8 nats are numbers and no noise.

R rows (one a token), V entries of the vocabulary.
"""

import torch
from torch import Tensor

__all__ = ["Reference"]

_ROWS = 16
"""Rows at a time, so that they stay in a CPU's cache."""


class Reference:
    """The next-token distributions that others are compared with."""

    def __init__(self, logits_RV: Tensor) -> None:
        """logits_RV: of the 16-bit model, any float dtype."""
        self._logits_RV = logits_RV
        self._probs_RV = torch.cat([rows.float().softmax(-1) for rows in logits_RV.split(_ROWS)])

    def divergence(self, logits_RV: Tensor) -> float:
        """Mean over rows of KL(p || q) of other logits, same shape; rounding is about 1e-6 of it."""
        parts = zip(
            *(tensor.split(_ROWS) for tensor in (logits_RV, self._logits_RV, self._probs_RV)), strict=True
        )
        total = sum(_divergence(*rows).double().sum() for rows in parts)
        return float(total) / len(logits_RV)


def _divergence(logits_RV: Tensor, reference_RV: Tensor, probs_RV: Tensor) -> Tensor:
    """KL of each row, float32."""
    difference_RV = logits_RV.float() - reference_RV.float()
    mean_R = torch.linalg.vecdot(probs_RV, difference_RV)
    excess_R: Tensor = torch.linalg.vecdot(probs_RV, difference_RV.expm1_())
    found_R: Tensor = excess_R.log1p_() - mean_R
    return found_R
