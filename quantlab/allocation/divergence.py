"""Divergence of next-token distributions from those of the 16-bit model: KL(p || q), in nats.

With d = logits of q - logits of p, less its mean under p, KL(p || q) = log E_p[exp(d)] = log(1 + E_p[exp(d) - 1]):
whatever both logits share cancels before anything is rounded, so that divergences of 1e-8 nats are numbers, no noise.

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
    d_RV = logits_RV.float() - reference_RV.float()
    d_RV -= torch.linalg.vecdot(probs_RV, d_RV).unsqueeze(-1)
    # Not quite 0: probabilities sum to 1 up to rounding, which many nats of shift would multiply.
    rest_R: Tensor = torch.linalg.vecdot(probs_RV, d_RV)
    found_R: Tensor = torch.linalg.vecdot(probs_RV, d_RV.expm1()).log1p_()
    far_R = ~found_R.isfinite()
    if (
        far_R.any()
    ):  # exp(d) overflows: the same sum in logarithms, which is off by 1e-6 nats where those matter little
        log_p_RV = reference_RV[far_R].float().log_softmax(-1)
        found_R[far_R] = (log_p_RV + d_RV[far_R]).logsumexp(-1)
    return found_R.sub_(rest_R)
