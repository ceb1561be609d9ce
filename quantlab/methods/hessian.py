"""Feedback: how the rounding error of one input channel is made good by the channels that come after it.

The loss of a layer over the calibration tokens is tr(D H D^T), D = W - What and H = X^T X. With H = U diag(d) U^T, U
upper triangular with ones on its diagonal, the loss is sum_k d_k |(D U)_k|^2, and column k of D U is what rounding
adds at channel k once the target of k is w_k + sum_{j<k} D_j U_jk. So U alone steers GPTQ: one Cholesky, no inverse.
Source: Frantar et al. 2022, arXiv:2210.17323; this form of it: Chee et al. 2023, arXiv:2307.13304, theorem 6.

I: input channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RAISED_DAMPING", "Feedback", "feedback_of"]

RAISED_DAMPING = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Parts of the mean diagonal that are tried, in this order, where the configured one leaves H singular."""


@dataclass(frozen=True)
class Feedback:
    """What a column loop needs of the Hessian."""

    order_I: Tensor
    """Input channels in the order in which they are quantized, int64."""
    dead_I: Tensor
    """bool, of the original channels: the input was 0 on every calibration token."""
    upper_II: Tensor
    """U in the order of `order_I`, float32 or float64; the identity, which is RTN, where no damping helped."""
    pivots_I: Tensor
    """d of the original channels, float32, largest 1, 0 for dead ones: what a squared rounding error at a channel costs
    once all channels after it have made good what they can."""
    notes: tuple[str, ...]
    """Fallbacks taken, in words; none where every channel is dead, which `needs` says."""


def feedback_of(gram_II: Tensor, *, damping: float, act_order: bool) -> Feedback:
    """Factorize the damped Hessian; never fails on a finite matrix.

    Tried in turn: `damping` in float32; the same in float64; each larger step of RAISED_DAMPING in float64; no
    feedback. A dead channel takes part in nothing: its row and column are 0, so any code of it costs nothing here.

    Args:
        gram_II: X^T X, finite.
        damping: part of the mean diagonal, over channels that are not dead, added to the diagonal.
        act_order: channels in the order of falling diagonal, dead ones last, ties in their own order.
    """
    diagonal_I = gram_II.diagonal()
    dead_I = diagonal_I == 0
    count = int(dead_I.sum())
    notes = (f"gptq: {count} dead input channels take their nearest codes",) if count else ()
    order_I = torch.arange(len(gram_II), device=gram_II.device)
    if act_order:
        order_I = diagonal_I.argsort(descending=True, stable=True)
    if count == len(gram_II):
        notes, factor_II, note = (), torch.eye(len(gram_II)).to(gram_II), ""
    else:
        factor_II, note = _climb(_ordered(gram_II, order_I, dead_I), damping)
    roots_I = factor_II.diagonal()
    pivots_I = torch.empty_like(roots_I)
    pivots_I[order_I] = roots_I.square()
    pivots_I = pivots_I.masked_fill(dead_I, 0.0).float()
    if count < len(gram_II):
        pivots_I = pivots_I / pivots_I.max()
    return Feedback(order_I, dead_I, factor_II / roots_I, pivots_I, (*notes, note) if note else notes)


def _ordered(gram_II: Tensor, order_I: Tensor, dead_I: Tensor) -> Tensor:
    """H with a live diagonal of mean 0.5 .. 1 and dead channels cut loose, rows and columns in `order_I`.

    Divided by powers of two, that is exactly: any rounding could cost a nearly singular matrix its definiteness.
    """
    hessian_II = gram_II[order_I][:, order_I]
    diagonal_I = hessian_II.diagonal()
    live_I = ~dead_I[order_I]
    # By the largest first: the sum of diagonals near the largest float32 would overflow.
    for size in (torch.max, torch.mean):
        hessian_II.ldexp_(-torch.frexp(size(diagonal_I[live_I].abs())).exponent)
    diagonal_I[~live_I] = diagonal_I[live_I].abs().mean()
    return hessian_II


def _climb(hessian_II: Tensor, damping: float) -> tuple[Tensor, str]:
    """U diag(d)^(1/2) at the first rung of the ladder that is positive definite, and the note of that rung."""
    mean = float(hessian_II.diagonal().abs().mean())
    rungs = [(torch.float32, damping, "")] if hessian_II.dtype == torch.float32 else []
    rungs.append((torch.float64, damping, "gptq: float64 after a failed float32 Cholesky" if rungs else ""))
    larger = [step for step in RAISED_DAMPING if step > damping]
    rungs += [(torch.float64, step, f"gptq: damping raised to {step:g}") for step in larger]
    for dtype, step, note in rungs:
        factor_II = _factor(hessian_II.to(dtype), step * mean)
        if factor_II is not None:
            return factor_II, note
    identity_II = torch.eye(len(hessian_II)).to(hessian_II)
    return identity_II, "rtn: X^T X is not positive definite at any damping"


def _factor(hessian_II: Tensor, damping: float) -> Tensor | None:
    """U diag(d)^(1/2) of H + damping * identity, or None where the matrix is not positive definite.

    Cholesky peels a matrix from its first channel, U from its last: so the matrix is turned round before and after.
    """
    turned_II = hessian_II.flip(0, 1)
    turned_II.diagonal().add_(damping)
    lower_II, failed = torch.linalg.cholesky_ex(turned_II)
    if failed or not lower_II.isfinite().all():
        return None
    factor_II: Tensor = lower_II.flip(0, 1)
    return factor_II
