"""Descent over rotations: every step is a rotation, and the best of those judged is given."""

import math

import pytest
import torch
from torch import Tensor

from quantlab.errors import SchemeError
from quantlab.transforms.cayley import cayley_step, learn_rotation
from quantlab.transforms.hadamard import random_rotation

U = 2.0**-53
"""Relative rounding of float64."""


def test_a_step_turns_downhill_by_about_its_angle() -> None:
    generator = torch.Generator().manual_seed(0)
    start = random_rotation(32, generator).matrix
    gradient = torch.randn(32, 32, generator=generator, dtype=torch.float64)
    end = cayley_step(start, gradient, 0.03)
    # n u for the sums of this check, 3 n u for the start (its own sums, a QR, signs), and 6 n u for the step: a solve
    # by LU is exact for a matrix that is off by 3 n |L| |U| u, here about I, and that counts on either side of Q Q^T
    assert (end @ end.T - torch.eye(32)).abs().max() <= 10 * 32 * U
    assert (gradient * (end - start)).sum() < 0
    largest = float(torch.linalg.matrix_norm(end - start, 2))
    assert 0.03 / 2**0.5 < largest < 0.03 * 2**0.5
    # neither the size of the gradient nor what would stretch counts
    assert torch.allclose(
        cayley_step(start, 9 * gradient + 5 * start, 0.03), end, rtol=0, atol=2 * 6 * 32 * U
    )


def test_a_step_without_a_gradient_stays() -> None:
    start = random_rotation(16, torch.Generator().manual_seed(0)).matrix
    assert torch.allclose(cayley_step(start, torch.zeros_like(start), 0.1), start, rtol=0, atol=1e-15)


def lost(q_DD: Tensor, x_ND: Tensor) -> Tensor:
    """Mean over vectors of the part that rounding to 4 bits loses."""
    turned_ND = x_ND @ q_DD
    scale_N1 = turned_ND.abs().amax(-1, keepdim=True) / 7
    codes_ND = (turned_ND / scale_N1).round().detach()
    found: Tensor = ((turned_ND - scale_N1 * codes_ND).square().sum(-1) / x_ND.square().sum(-1)).mean()
    return found


def test_learning_lowers_the_error_on_other_vectors() -> None:
    """Vectors that mix 4 directions: a rotation that turns these well serves others of their kind."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4, 16, generator=generator)
    learn, judge = (torch.randn(512, 4, generator=generator) @ directions for _ in range(2))
    start = random_rotation(16, generator).matrix
    q, found = learn_rotation(start, lost, learn, judge, num_steps=20, batch_size=512, learning_rate=0.1)
    assert len(found) == 5
    assert min(found) < 0.95 * found[0]
    assert float(lost(q.float(), judge)) == pytest.approx(min(found), rel=1e-6)
    # as above, after 20 solves
    assert (q @ q.T - torch.eye(16)).abs().max() <= (4 + 20 * 6) * 16 * U


def test_a_step_too_large_keeps_the_start() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.eye(16)[torch.randint(0, 16, (64,), generator=generator)]
    away = torch.randn(16, 16, generator=generator)
    start = torch.eye(16, dtype=torch.float64)  # rounds unit vectors without error
    error = lambda q, x: lost(q, x) + 0 * (q * away).sum()  # noqa: E731
    q, found = learn_rotation(start, error, x, x, num_steps=3, batch_size=64, learning_rate=10.0)
    assert found[0] == 0
    assert torch.equal(q, start)


def test_every_example_is_learned_from_in_turn() -> None:
    seen: list[float] = []

    def error(q_DD: Tensor, x_ND: Tensor) -> Tensor:
        if q_DD.requires_grad:
            seen.extend(x_ND[:, 0].tolist())
        return lost(q_DD, x_ND)

    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    x[:, 0] = torch.arange(5)
    start = torch.eye(8, dtype=torch.float64)
    learn_rotation(start, error, x, x, num_steps=4, batch_size=2, learning_rate=0.1)
    assert seen == [0, 1, 2, 3, 4, 0, 1, 2]


def test_the_end_is_judged_where_the_gradient_vanishes() -> None:
    def hinge(q_DD: Tensor, x_N: Tensor) -> Tensor:
        return (q_DD[0, 0] - 0.95).relu() * x_N.mean()

    turned = torch.tensor([[math.cos(0.1), math.sin(0.1)], [-math.sin(0.1), math.cos(0.1)]])
    _, found = learn_rotation(
        turned, hinge, torch.ones(4), torch.ones(2), num_steps=3, batch_size=1, learning_rate=0.5
    )
    assert found[0] > 0 and found[-1] == 0


@pytest.mark.parametrize("bad", ["error", "gradient"])
def test_what_is_not_finite_is_refused(bad: str) -> None:
    def error(q_DD: Tensor, x_N: Tensor) -> Tensor:
        if bad == "error":
            return q_DD.sum() * torch.inf
        return (q_DD - q_DD.detach()).square().sum().sqrt()  # 0, whose slope is 0 / 0

    with pytest.raises(SchemeError, match=r"with a finite gradient: found (nan|inf|-inf)\. Use rotate"):
        learn_rotation(
            torch.eye(4), error, torch.ones(2), torch.ones(2), num_steps=5, batch_size=1, learning_rate=0.1
        )
