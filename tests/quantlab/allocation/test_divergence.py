"""KL divergence against float64, down to differences that float32 log-probabilities lose."""

import pytest
import torch

from quantlab.allocation.divergence import Reference


def _exact(p: torch.Tensor, q: torch.Tensor) -> float:
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize("step", [1.0, 1e-2, 1e-4])
def test_divergence_is_that_of_float64(step: float) -> None:
    generator = torch.Generator().manual_seed(0)
    p = 5 * torch.randn(37, 4000, generator=generator)
    q = p + step * torch.randn(37, 4000, generator=generator) + 3 * step
    found, exact = Reference(p).divergence(q), _exact(p, q)
    # d is rounded to 2^-24 of logits up to 20, 1e-6: beside a step of 1e-4 that is 1% of d and averages out
    assert found == pytest.approx(exact, rel=1e-3)
    if step == 1e-4:
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        plain = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
        assert abs(found - exact) < abs(plain - exact)


@pytest.mark.parametrize(("shift", "step"), [(-300.0, 1.0), (300.0, 1.0), (-50.0, 1e-2), (0.0, 150.0)])
def test_logits_that_move_far_still_give_a_number(shift: float, step: float) -> None:
    generator = torch.Generator().manual_seed(1)
    p = 40 * torch.randn(20, 300, generator=generator)
    q = p + step * torch.randn(20, 300, generator=generator) + shift
    # logits up to 500 are rounded to 3e-5, which beside a step of 1e-2 is 0.3% of d and averages out
    assert Reference(p).divergence(q) == pytest.approx(_exact(p, q), rel=1e-2)


def test_a_model_does_not_diverge_from_itself() -> None:
    p = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    assert Reference(p).divergence(p.clone()) == 0.0


def test_logits_that_are_not_finite_give_no_number() -> None:
    p = torch.zeros(2, 4)
    q = p.clone()
    q[0, 0] = torch.inf
    assert not torch.isfinite(torch.tensor(Reference(p).divergence(q)))
