"""Running statistics: any split of the data, added and merged in any order, gives what the whole gives."""

import copy
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from probes.running.absmax import AbsMax
from probes.running.histogram import NUM_BUCKETS, Histogram, edges
from probes.running.magnitudes import Magnitudes
from probes.running.median import ExactQuantile
from probes.running.moments import Moments
from probes.running.topk import TopK

EXAMPLES = settings(deadline=None, max_examples=30, derandomize=True)
special = st.sampled_from([0.0, -0.0, 1.0, -1.0, 3e38, -1e-45, float("inf"), float("-inf"), float("nan")])
floats = st.one_of(special, st.floats(width=32, allow_subnormal=True), st.integers(-3, 3).map(float))
lists = st.lists(floats, min_size=1, max_size=60)
seeds = st.integers(0, 2**32 - 1)


def pieces(size: int, seed: int) -> list[slice]:
    """A random cut of range(size) into consecutive pieces, in random order."""
    source = random.Random(seed)
    cuts = sorted({0, size, *(source.randrange(size + 1) for _ in range(source.randrange(6)))})
    parts = [slice(a, b) for a, b in pairwise(cuts)]
    source.shuffle(parts)
    return parts


def over_pieces(make: Callable[[], Any], add: Callable[[Any, slice], None], size: int, seed: int) -> Any:
    """The statistic of the pieces: some added to one, others merged in as a tree, through state_dict on the way."""
    source, heap = random.Random(seed), []
    for part in pieces(size, seed):
        if not heap or source.random() < 0.6:
            heap.append(make())
        add(source.choice(heap), part)
    while len(heap) > 1:
        other, target = heap.pop(source.randrange(len(heap))), source.choice(heap)
        through = make()
        through.load_state_dict(copy.deepcopy(other.state_dict()))
        target.merge(through)
    return heap[0]


def add_topk(x: Tensor) -> Callable[[TopK, slice], None]:
    """Places are (index // 7, index % 7): two columns in which order matters."""

    def place(offset: int) -> Callable[[NDArray[np.int64]], NDArray[np.int64]]:
        return lambda at: np.stack([(at + offset) // 7, (at + offset) % 7], axis=1)

    return lambda statistic, part: statistic.add(x[part], place(part.start))


def sorted_places(x: Tensor, k: int) -> list[tuple[float, int, int]]:
    """The k largest finite magnitudes by hand: largest first, then by place."""
    rows = [(abs(v), i // 7, i % 7) for i, v in enumerate(x.tolist()) if np.isfinite(v)]
    return sorted(rows, key=lambda row: (-row[0], row[1], row[2]))[:k]


@EXAMPLES
@given(values=lists, k=st.integers(1, 40), seed=seeds)
def test_topk_of_any_split_is_the_sorted_top(values: list[float], k: int, seed: int) -> None:
    x = torch.tensor(values)
    found = over_pieces(lambda: TopK(k, ("a", "b")), add_topk(x), len(x), seed).value()
    rows = list(zip(found["value"].tolist(), found["a"].tolist(), found["b"].tolist(), strict=True))
    assert rows == sorted_places(x, k)


def test_topk_of_a_thousand_among_many_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-20, 20, (200_000,), generator=generator).float()
    statistic = TopK(1000, ("a", "b"))
    add = add_topk(x)
    for start in range(150_000, -1, -50_000):  # last piece first
        add(statistic, slice(start, start + 50_000))
    found = statistic.value()
    rows = list(zip(found["value"].tolist(), found["a"].tolist(), found["b"].tolist(), strict=True))
    assert rows == sorted_places(x, 1000)
    assert statistic.nth(1000) == statistic.threshold == 20.0
    assert TopK(5, ("a",)).nth(1) is None


@EXAMPLES
@given(values=lists, seed=seeds, q=st.sampled_from([0.0, 0.1, 0.5, 0.99, 1.0]))
def test_histogram_of_any_split(values: list[float], seed: int, q: float) -> None:
    x = torch.tensor(values)
    found = over_pieces(Histogram, lambda h, part: h.add(x[part]), len(x), seed)
    whole = Histogram()
    whole.add(x)
    assert np.array_equal(found.counts, whole.counts)
    assert (found.nan, found.pos_inf, found.neg_inf) == tuple(
        int(count) for count in (x.isnan().sum(), (x == torch.inf).sum(), (x == -torch.inf).sum())
    )
    finite = x[x.isfinite()].abs().double().sort().values
    assert found.n == len(finite)
    if not len(finite):
        assert found.quantile(q) is None
        return
    exact = float(finite[(len(finite) - 1) // 2 if q == 0.5 else int(q * (len(finite) - 1))])
    assert abs(found.quantile(q) - exact) <= 2**-8 * exact + 2**-134
    assert found.quantile(q) == whole.quantile(q)


@EXAMPLES
@given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=60))
def test_the_median_of_bfloat16_is_exact_and_the_lower_one(values: list[float]) -> None:
    x = torch.tensor(values).bfloat16()
    x = x[x.isfinite()]
    for same in (x, x.float()):
        histogram = Histogram()
        histogram.add(same)
        if len(x):
            assert histogram.quantile(0.5) == x.float().abs().median().item()


@EXAMPLES
@given(values=lists, seed=seeds)
def test_two_passes_give_the_exact_float32_median(values: list[float], seed: int) -> None:
    x = torch.tensor(values)
    first = over_pieces(Histogram, lambda h, part: h.add(x[part]), len(x), seed)
    finite = x[x.isfinite()].abs()
    if len(finite):
        second = over_pieces(lambda: ExactQuantile(first), lambda s, part: s.add(x[part]), len(x), seed + 1)
        assert second.value() == finite.median().item()


def test_the_exact_median_notices_other_data() -> None:
    first = Histogram()
    first.add(torch.tensor([1.0, 2.0, 3.0]))
    second = ExactQuantile(first)
    second.add(torch.tensor([1.0, 3.0]))
    with pytest.raises(AssertionError, match="different data"):
        second.value()


def test_buckets_are_the_bfloat16_numbers() -> None:
    lower = edges()
    assert len(lower) == NUM_BUCKETS
    assert (np.diff(lower) > 0).all()
    assert np.array_equal(torch.from_numpy(lower).bfloat16().double().numpy(), lower)
    assert lower[-1] == torch.finfo(torch.bfloat16).max
    histogram = Histogram()
    histogram.add(torch.tensor([0.75, -0.75, 1e-3, 5.0, float("nan")]))
    columns = histogram.value()
    assert columns["count"].tolist() == [1, 2, 1]
    assert columns["magnitude"][1] == 0.75
    assert histogram.count_above(0.75) == 1


@EXAMPLES
@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=200),
    offset=st.sampled_from([0.0, 1.0, 1000.0]),
    seed=seeds,
)
def test_moments_of_any_split_agree(values: list[float], offset: float, seed: int) -> None:
    x = torch.tensor(values) + offset
    found = over_pieces(Moments, lambda m, part: m.add(x[part]), len(x), seed)
    whole = Moments()
    whole.add(x)
    assert_close(found, whole, x)


@EXAMPLES
@given(seed=seeds, offset=st.sampled_from([0.0, 30.0]), heavy=st.booleans())
def test_moments_of_larger_splits_agree_and_are_scipys(seed: int, offset: float, heavy: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(20_000, generator=generator) + offset
    x = x**3 if heavy else x
    found = over_pieces(Moments, lambda m, part: m.add(x[part]), len(x), seed)
    whole = Moments()
    whole.add(x)
    assert_close(found, whole, x)
    value, wide = found.value(), x.double().numpy()
    expected = (wide.mean(), wide.var(), stats.skew(wide), stats.kurtosis(wide, fisher=False))
    assert np.allclose((value.mean, value.variance, value.skewness, value.kurtosis), expected, rtol=1e-9)
    assert value.unbiased_variance == pytest.approx(wide.var(ddof=1), rel=1e-11)
    assert value.fourth == pytest.approx(((wide - wide.mean()) ** 4).mean(), rel=1e-9)


def assert_close(one: Moments, other: Moments, x: Tensor) -> None:
    """Within 1e-12 of each moment's own scale: the mean of magnitudes, and standard deviations."""
    a, b = one.value(), other.value()
    assert a.n == b.n == len(x)
    assert abs(a.mean - b.mean) <= 1e-12 * float(x.double().abs().mean())
    assert abs(a.variance - b.variance) <= 1e-12 * b.variance
    assert abs(a.skewness - b.skewness) <= 1e-12 * max(1.0, abs(b.skewness))
    assert abs(a.kurtosis - b.kurtosis) <= 1e-12 * b.kurtosis


def test_merging_moments_rounds_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = []
    for _ in range(40):
        part = Moments()
        part.add(torch.randn(50, generator=generator) * 1e3)
        parts.append(part)
    forward, backward = Moments(), Moments()
    for part in parts:
        forward.merge(part)
    for part in reversed(parts):
        backward.merge(part)
    assert forward.state_dict() == backward.state_dict()
    assert forward.value() == backward.value()


def test_moments_pass_over_nan_and_infinities_and_keep_their_input() -> None:
    moments, x = (
        Moments(),
        torch.tensor([1.0, 3.0, float("inf"), float("nan"), float("-inf")], dtype=torch.float64),
    )
    moments.add(x)
    moments.add(torch.empty(0))
    assert (moments.n, moments.value().mean, moments.value().variance) == (2, 2.0, 1.0)
    assert x[:2].tolist() == [1.0, 3.0]
    constant = Moments()
    constant.add(torch.full((100,), 0.1))
    assert constant.value().variance == 0.0
    assert constant.value().kurtosis == 0.0
    assert Moments().value().n == 0


@EXAMPLES
@given(seed=seeds, axis=st.sampled_from([None, -1, 1]), spoiled=st.booleans())
def test_absmax_of_any_split(seed: int, axis: int | None, spoiled: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(9, 4, 5, 6, generator=generator)
    if spoiled:
        x[0, 1, 2, 3], x[3, 0, 0, 0], x[4] = float("inf"), float("nan"), float("nan")
    found = over_pieces(lambda: AbsMax(axis), lambda s, part: s.add(x[part]), len(x), seed).value()
    expected = x.double().abs().nan_to_num(0.0, posinf=0.0)
    kept = [i for i in range(4) if axis is None or i != axis % 4]
    assert torch.equal(found, expected.amax(kept))


def test_absmax_counts_only_the_visible() -> None:
    x = torch.tensor([[1.0, -9.0], [2.0, 3.0]])
    absmax = AbsMax(axis=-1)
    assert absmax.value().numel() == 0
    absmax.add(x, torch.tensor([[True, False], [True, True]]))
    assert absmax.value().tolist() == [2.0, 3.0]


@EXAMPLES
@given(values=lists, seed=seeds)
def test_magnitudes_are_its_parts(values: list[float], seed: int) -> None:
    x = torch.tensor(values)

    def add(statistic: Magnitudes, part: slice) -> None:
        statistic.add([x[part]] if part.stop > part.start else [], lambda topk: add_topk(x)(topk, part))

    found = over_pieces(lambda: Magnitudes(5, ("a", "b")), add, len(x), seed)
    histogram = Histogram()
    histogram.add(x)
    assert np.array_equal(found.histogram.counts, histogram.counts)
    assert (found.histogram.nan, found.histogram.pos_inf) == (histogram.nan, histogram.pos_inf)
    assert found.moments.n == histogram.n
    columns = found.value()["topk"]
    assert list(zip(columns["value"], columns["a"], columns["b"], strict=True)) == sorted_places(x, 5)
