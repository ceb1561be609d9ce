"""The benchmark of attention statistics compares two ways to the same numbers."""

import pytest
import torch

from benchmarks.attention_statistics import check_same, eager, make_model, ours, queries_and_keys


@pytest.mark.parametrize("median", [False, True])
def test_both_sides_find_the_same(median: bool) -> None:
    with torch.random.fork_rng(), torch.no_grad():
        model, ids = make_model(300)
        theirs = eager(*queries_and_keys(model, ids), median=median)
        mine = ours(model, ids, median=median)
    check_same(theirs, mine)
    assert mine["moments"][0] == 2 * 300 * 301 // 2
    assert (mine["median"] is not None) == median
