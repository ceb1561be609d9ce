"""The choice under a budget against every choice there is, and against an integer program."""

from itertools import pairwise, product

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from quantlab.allocation.solve import choose


def _instance(
    rng: np.random.Generator, units: int, options: int
) -> tuple[list[list[int]], list[list[float]]]:
    """Costs and losses that need not fall, with ties among costs."""
    costs = rng.integers(1, 30, (units, options)).tolist()
    losses = (10.0 ** rng.uniform(-6, 0, (units, options))).tolist()
    return costs, losses


def _total(table: list[list[float]], choice: list[int]) -> float:
    return sum(row[place] for row, place in zip(table, choice, strict=True))


@pytest.mark.parametrize("seed", range(40))
def test_no_choice_within_the_budget_costs_less(seed: int) -> None:
    rng = np.random.default_rng(seed)
    units, options = int(rng.integers(1, 7)), int(rng.integers(1, 5))
    costs, losses = _instance(rng, units, options)
    least, most = sum(map(min, costs)), sum(map(max, costs))
    for capacity in {least, most, int(rng.integers(least, most + 1)), int(rng.integers(least, most + 1))}:
        found = choose(costs, losses, capacity)
        every = [list(each) for each in product(range(options), repeat=units)]
        best = min(_total(losses, each) for each in every if _total(costs, each) <= capacity)
        assert _total(costs, found) <= capacity
        # the same sum in another order
        assert _total(losses, found) <= best * (1 + 1e-12)


def _layers(rng: np.random.Generator, units: int) -> tuple[list[list[int]], list[list[float]]]:
    """Linears of three shapes at four widths, losses as rounding makes them: about 4^-bits."""
    shapes = [(576, 576), (192, 576), (1536, 576)]
    bits = np.array([8.03, 6.03, 4.25, 3.25])
    sizes = [shapes[i % 3][0] * shapes[i % 3][1] for i in range(units)]
    costs = [[int(size * b) // 16 * 16 for b in bits] for size in sizes]
    scale = np.exp(rng.normal(size=(units, 1)) * 1.5)
    losses = scale * 4.0**-bits * np.exp(rng.normal(size=(units, 4)) * 0.3)
    return costs, losses.tolist()


@pytest.mark.parametrize("seed", range(3))
def test_an_integer_program_finds_no_less_for_a_whole_model(seed: int) -> None:
    costs, losses = _layers(np.random.default_rng(seed), 42)
    capacity = sum(sorted(row)[1] for row in costs) + 12_345
    c, a = np.array(losses).ravel() / np.max(losses), np.array(costs, float).ravel()
    one_each = np.kron(np.eye(42), np.ones(4))
    solved = milp(
        c,
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(a / capacity, -np.inf, 1)],
        integrality=np.ones_like(c),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0},
    )
    found = choose(costs, losses, capacity)
    # HiGHS stops within 1e-6 of the objective, whose scale is 1 here
    assert _total(losses, found) / np.max(losses) <= solved.fun + 1e-6
    assert _total(costs, found) <= capacity


def test_a_larger_budget_never_costs_more() -> None:
    costs, losses = _layers(np.random.default_rng(7), 30)
    least, most = sum(map(min, costs)), sum(map(max, costs))
    sums = [
        _total(losses, choose(costs, losses, capacity))
        for capacity in np.linspace(least, most, 60).astype(int)
    ]
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(sums))
    assert sums[0] > 100 * sums[-1]


def test_the_smallest_budget_takes_the_narrowest_and_a_budget_above_all_the_widest() -> None:
    costs, losses = [[80, 60, 40]] * 3, [[1e-6, 1e-5, 1e-3]] * 3
    assert choose(costs, losses, 120) == [2, 2, 2]
    assert choose(costs, losses, 10**12) == [0, 0, 0]


def test_a_wider_choice_that_measured_worse_is_not_taken() -> None:
    assert choose([[80, 60, 60]], [[2e-5, 1e-5, 3e-5]], 1000) == [1]
