"""Cayley: gradient descent over rotations, whose steps stay orthogonal.

    A = G Q^T - Q G^T,  Q' = (I + t A / 2)^-1 (I - t A / 2) Q,  t |A|_2 about `learning_rate`, falling to 0

G is the gradient of an error by Q. A is skew-symmetric, which makes the quotient orthogonal, and is what G says of
rotations alone: whatever would stretch Q has no part in it. The size of G has none in the step either. Source: Li et
al. 2020, arXiv:2002.01113; without momentum.

Letters: D channels.
"""

from collections.abc import Callable
from math import isfinite

import torch
from torch import Tensor

from quantlab.errors import SchemeError

__all__ = ["cayley_step", "learn_rotation"]

_EVERY = 5
"""Steps between two judgements."""

Error = Callable[[Tensor, Tensor], Tensor]
"""Of a rotation [D, D], float32, and of a few examples; a scalar, the mean over them, with a gradient."""


def learn_rotation(
    start_DD: Tensor,
    error: Error,
    learn: Tensor,
    judge: Tensor,
    *,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
) -> tuple[Tensor, list[float]]:
    """Lower a function of a rotation by its gradient.

    Args:
        start_DD: where to start; orthogonal.
        learn, judge: examples, along the first dimension; the first give gradients, in turn, the others choose.

    Returns:
        the rotation with the lowest error on `judge`, float64, orthogonal to rounding; that error at the start, every
        5 steps and at the end.

    Raises:
        SchemeError: an error or a gradient that is not finite.
    """
    q_DD = best_DD = start_DD.double()
    found: list[float] = []
    for step in range(num_steps + 1):
        if step % _EVERY == 0 or step == num_steps:
            found.append(_mean(error, q_DD, judge, batch_size))
            if found[-1] <= min(found):
                best_DD = q_DD
        if step < num_steps:
            batch = learn[torch.arange(step * batch_size, (step + 1) * batch_size) % len(learn)]
            q_DD = cayley_step(q_DD, _gradient(error, q_DD, batch), learning_rate * (1 - step / num_steps))
    return best_DD, found


def cayley_step(q_DD: Tensor, gradient_DD: Tensor, angle: float) -> Tensor:
    """Q' in float64, about `angle` radians away from Q; Q itself where the gradient is that of no rotation."""
    skew_DD = gradient_DD @ q_DD.T - q_DD @ gradient_DD.T
    # sqrt(2) times the root mean square of its singular values: between the typical one and the largest.
    size = float(torch.linalg.matrix_norm(skew_DD)) * (2 / len(q_DD)) ** 0.5
    half_DD = skew_DD * (angle / 2 / (size or 1.0))
    identity = torch.eye(len(q_DD), dtype=q_DD.dtype, device=q_DD.device)
    end_DD: Tensor = torch.linalg.solve(identity + half_DD, (identity - half_DD) @ q_DD)
    return end_DD


@torch.no_grad()
def _mean(error: Error, q_DD: Tensor, examples: Tensor, size: int) -> float:
    parts = examples.split(size)
    return sum(_finite(float(error(q_DD.float(), part))) * len(part) for part in parts) / len(examples)


def _gradient(error: Error, q_DD: Tensor, examples: Tensor) -> Tensor:
    leaf_DD = q_DD.float().requires_grad_()
    with torch.enable_grad():
        (gradient_DD,) = torch.autograd.grad(error(leaf_DD, examples), leaf_DD)
    _finite(float(gradient_DD.abs().max()))
    return gradient_DD.double()


def _finite(found: float) -> float:
    if not isfinite(found):
        raise SchemeError(
            f"a rotation is learned from an error that is finite, with a finite gradient: found {found}. Use rotate."
        )
    return found
