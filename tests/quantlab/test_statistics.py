"""Intervals cover what they promise, agree with published examples, and are honest where data say nothing."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from quantlab.statistics import (
    Estimate,
    difference_of_changes,
    effective_documents,
    holm,
    mcnemar_exact,
    mean,
    minimum_detectable_effect,
    p_of_zero,
    paired_difference,
    paired_text_difference,
    proportion,
    ratio,
    text_ratio,
)

finite = st.floats(-1e6, 1e6)
rows = st.lists(finite, min_size=2, max_size=30)
outcome_pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40)


def ones(num_ones: int, n: int) -> list[int]:
    return [1] * num_ones + [0] * (n - num_ones)


# ---- published and hand-computed values


def test_mean_of_six_by_hand():
    estimate = mean([1.0, 2.0, 4.0] * 2)
    assert estimate.value == pytest.approx(7 / 3)
    # The squares of the distances to 7/3 sum to 2 * 14/3, over 5 and over 6.
    assert estimate.stderr == pytest.approx(math.sqrt(28 / 90))
    low, high = stats.t.interval(0.95, 5, loc=7 / 3, scale=math.sqrt(28 / 90))
    assert (estimate.low, estimate.high) == (pytest.approx(low), pytest.approx(high))
    assert (estimate.n, estimate.df, estimate.note) == (6, 5, "")


@pytest.mark.parametrize(
    ("num_ones", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_is_newcombes_table(num_ones, n, low, high):
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3.
    estimate = proportion(ones(num_ones, n))
    assert (round(estimate.low, 4), round(estimate.high, 4)) == (low, high)


def test_wilson_interval_is_scipys():
    for num_ones, n in [(0, 5), (3, 5), (5, 5), (40, 64), (2511, 10042)]:
        reference = stats.binomtest(num_ones, n).proportion_ci(method="wilson")
        estimate = proportion(ones(num_ones, n))
        assert (estimate.low, estimate.high) == pytest.approx((reference.low, reference.high), abs=1e-12)


def test_proportions_stderr_is_sample_std_over_root_n():
    outcomes = ones(30, 100)
    assert proportion(outcomes).stderr == pytest.approx(np.std(outcomes, ddof=1) / 10, rel=1e-14)


def test_ratio_of_six_items_by_hand():
    # R = 9/15, residuals y - R x = -0.2 and 0.2, stderr^2 = 6/5 * 0.24 / 225
    estimate = ratio([1.0, 2.0] * 3, [2, 3] * 3)
    assert estimate.value == pytest.approx(0.6)
    assert estimate.stderr == pytest.approx(math.sqrt(0.00128))
    assert estimate.high - 0.6 == pytest.approx(stats.t.ppf(0.975, 5) * math.sqrt(0.00128))


def test_ratio_of_equal_blocks_is_the_mean_of_their_rates():
    nats = np.random.default_rng(0).gamma(5, size=12)
    by_block, by_mean = ratio(nats * 7, np.full(12, 7)), mean(nats)
    for name in ("value", "stderr", "low", "high"):
        assert getattr(by_block, name) == pytest.approx(getattr(by_mean, name))


def test_paired_binary_interval_by_hand():
    # 21 items, 1 only by a, 7 only by b: p10 = 2/23, p01 = 8/23.
    a = [1] + [0] * 7 + [1] * 1 + [0] * 12
    b = [0] + [1] * 7 + [1] * 1 + [0] * 12
    estimate = paired_difference(a, b)
    assert estimate.value == pytest.approx(-6 / 21)
    half = stats.norm.ppf(0.975) * math.sqrt((10 / 23 - (6 / 23) ** 2) / 23)
    assert (estimate.low, estimate.high) == pytest.approx((-6 / 23 - half, -6 / 23 + half))


def test_paired_difference_is_the_one_sample_t():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=20), rng.normal(size=20)
    reference = stats.ttest_rel(a, b).confidence_interval(0.95)
    estimate = paired_difference(a, b)
    assert (estimate.low, estimate.high) == pytest.approx((reference.low, reference.high))


def test_a_difference_of_changes_is_the_one_sample_t_of_both_changes():
    a, a_before, b, b_before = np.random.default_rng(2).normal(size=(4, 20))
    reference = stats.ttest_rel(a - a_before, b - b_before)
    estimate = difference_of_changes(a, a_before, b, b_before)
    assert estimate.value == pytest.approx((a - a_before).mean() - (b - b_before).mean())
    interval = reference.confidence_interval(0.95)
    assert (estimate.low, estimate.high) == pytest.approx((interval.low, interval.high))
    assert p_of_zero(estimate) == pytest.approx(reference.pvalue)


@pytest.mark.parametrize(("won", "lost"), [(5, 1), (0, 6), (0, 0)])
def test_against_one_that_does_not_change_it_is_bonett_and_prices(won, lost):
    n = won + lost + 9
    a, before = ones(won, n), [0] * won + [1] * lost + [0] * 9
    still = ones(4, n)
    assert difference_of_changes(a, before, still, still) == paired_difference(a, before)


def test_opposite_flips_of_one_document_by_hand():
    # Three documents of six that a wins and b loses: d = 2, 2, 2, 0, 0, 0.
    estimate = difference_of_changes(ones(3, 6), [0] * 6, [0] * 6, ones(3, 6))
    half = stats.norm.ppf(0.975) * math.sqrt((14 / 8 - (6 / 8) ** 2) / 8)
    assert estimate.value == 1.0 and (estimate.low, estimate.high) == pytest.approx(
        (6 / 8 - half, 6 / 8 + half)
    )


@pytest.mark.parametrize("df", [3, 30, math.inf])
def test_p_is_five_percent_where_the_interval_touches_zero(df):
    assert p_of_zero(Estimate(1.0, 0.5, 0.0, 2.0, 6, df)) == pytest.approx(0.05)
    assert (
        p_of_zero(Estimate(1.0, 0.5, 0.1, 1.9, 6, df))
        < 0.05
        < p_of_zero(Estimate(1.0, 0.5, -0.1, 2.1, 6, df))
    )


def test_p_without_a_spread():
    assert p_of_zero(Estimate(0.0, 0.0, 0.0, 0.0, 6, 5)) == 1.0
    assert p_of_zero(Estimate(0.5, 0.0, 0.5, 0.5, 6, 5)) == 0.0
    assert math.isnan(p_of_zero(Estimate(0.5, math.inf, -math.inf, math.inf, 1, 0)))


def test_p_of_the_normal_interval_is_the_z_test():
    z = stats.norm.ppf(0.975)
    assert p_of_zero(Estimate(3.0, 1.0, 3.0 - z, 3.0 + z, 9)) == pytest.approx(2 * stats.norm.sf(3.0))


@pytest.mark.parametrize(("won", "lost"), [(5, 1), (0, 6), (9, 9), (1, 0), (0, 0), (300, 251)])
def test_mcnemar_is_the_exact_binomial_test(won, lost):
    a, b = ones(won, won + lost + 3), [0] * won + [1] * lost + [0] * 3
    reference = stats.binomtest(won, won + lost).pvalue if won + lost else 1.0
    assert mcnemar_exact(a, b) == pytest.approx(reference, rel=1e-10)


def test_mcnemar_of_five_against_one_by_hand():
    assert mcnemar_exact(ones(5, 6), [0] * 5 + [1]) == pytest.approx(2 * (1 + 6) / 64)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.04, 0.01, 0.02, 0.03]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([]).shape == (0,)


@pytest.mark.parametrize(
    ("n", "changed", "level"), [(64, 20, 0.05), (64, 20, 0.005), (40, 30, 0.01), (400, 30, 0.05)]
)
def test_minimum_detectable_effect_is_where_mcnemar_has_80_percent(n, changed, level):
    share, delta = changed / n, minimum_detectable_effect(n, changed, level)
    won, lost = (share - delta) / 2, (share + delta) / 2
    power = 0.0
    for d in range(n + 1):
        k = np.arange(d // 2 + 1)
        significant = 2 * stats.binom.cdf(k, d, 0.5) <= level
        power += stats.binom.pmf(d, n, share) * float(significant @ stats.binom.pmf(k, d, won / share))
    assert won + lost == pytest.approx(share) and 0 < delta <= share
    assert power == pytest.approx(0.8, abs=1e-6)


def test_simulated_documents_meet_the_promised_power():
    rng, delta = np.random.default_rng(2), minimum_detectable_effect(64, 20, 0.05)
    won, lost = (20 / 64 - delta) / 2, (20 / 64 + delta) / 2
    counts = rng.multinomial(64, [won, lost, 1 - won - lost], 2000)
    found = [mcnemar_exact(ones(w, w + x + 1), [0] * w + [1] * x + [0]) <= 0.05 for w, x, _ in counts]
    assert abs(np.mean(found) - 0.8) < 3 * math.sqrt(0.8 * 0.2 / 2000)


@pytest.mark.parametrize("changed", [0, 1, 2, 4, 5])
def test_five_changes_never_resolve_anything(changed):
    # 2 / 2^5 = 0.0625: not even five changes that all go one way are significant at 5%.
    assert mcnemar_exact(ones(5, 64), [0] * 64) > 0.05
    assert minimum_detectable_effect(64, changed) == math.inf


def test_a_stricter_level_needs_a_larger_difference():
    levels = [minimum_detectable_effect(400, 60, 0.05 / m) for m in (1, 3, 10)]
    assert levels == sorted(levels) and levels[0] < levels[-1] <= 60 / 400
    assert minimum_detectable_effect(64, 10, 0.05) < minimum_detectable_effect(64, 10, 0.05 / 10) == math.inf
    assert minimum_detectable_effect(10_042, 900) < 0.01


# ---- coverage: share of simulated sets whose interval holds the truth

NUM_SETS = 2000
NOISE = 3 * math.sqrt(0.95 * 0.05 / NUM_SETS)  # three standard errors of a coverage of 95%


def coverage(draw, truth: float) -> float:
    rng = np.random.default_rng(3)
    estimates = [draw(rng) for _ in range(NUM_SETS)]
    return float(np.mean([e.low <= truth <= e.high for e in estimates]))


@pytest.mark.parametrize("n", [5, 64])
def test_t_interval_covers_95_percent(n):
    assert abs(coverage(lambda rng: mean(rng.normal(2.0, 3.0, n)), 2.0) - 0.95) < NOISE


@pytest.mark.parametrize("p", [0.25, 0.5, 0.95])
def test_wilson_interval_covers_about_95_percent(p):
    # Discrete outcomes cannot meet 95% exactly: Wilson's coverage at n = 64 stays within 2.5 points of it.
    assert abs(coverage(lambda rng: proportion(rng.random(64) < p), p) - 0.95) < NOISE + 0.025


def test_ratio_covers_although_tokens_of_a_block_hang_together():
    def draw(rng):
        tokens = rng.integers(50, 150, 40)
        level = rng.normal(3.0, 0.5, 40)  # shared by all tokens of a block
        return ratio(tokens * level, tokens)

    assert abs(coverage(draw, 3.0) - 0.95) < NOISE + 0.01


@pytest.mark.parametrize(("won", "lost"), [(0.02, 0.02), (0.1, 0.03), (0.3, 0.1)])
def test_paired_binary_interval_covers_at_least_94_percent(won, lost):
    def draw(rng):
        u = rng.random(64)
        return paired_difference(u < won, (u >= won) & (u < won + lost))

    assert coverage(draw, won - lost) > 0.94 - NOISE


@pytest.mark.parametrize(("won", "lost"), [(0.05, 0.15), (0.02, 0.02), (0.0, 0.3)])
def test_interval_of_binary_changes_covers_at_least_94_percent(won, lost):
    def draw(rng):
        u, v = rng.random((2, 64))
        # b wins and loses 5% of the documents, whichever they are.
        return difference_of_changes(
            u < won, (u >= won) & (u < won + lost), v < 0.05, (v >= 0.05) & (v < 0.1)
        )

    assert coverage(draw, won - lost) > 0.94 - NOISE


# ---- honesty at the edges


@pytest.mark.parametrize("n", [1, 2, 4])
def test_fewer_than_five_units_have_no_spread_to_speak_of(n):
    """Two blocks once gave "-0.07 to 7.31 nats", which is not known."""
    values, outcomes = np.linspace(1.0, 2.0, n), ones(1, n)
    for estimate in (
        mean(values),
        ratio(values, np.ones(n)),
        paired_difference(values, values / 2),
        proportion(outcomes),
        paired_difference(outcomes, [0] * n),
        difference_of_changes(outcomes, [0] * n, [0] * n, outcomes),
        text_ratio(values, np.ones(n), np.arange(n)),
        text_ratio(values, np.ones(n), np.zeros(n)),
    ):
        assert (estimate.stderr, estimate.low, estimate.high) == (math.inf, -math.inf, math.inf)
        assert estimate.note == "too few" and estimate.n == n
    assert minimum_detectable_effect(1, 1) == math.inf


def test_five_units_have_an_interval():
    assert math.isfinite(mean([1.0, 2.0, 3.0, 4.0, 5.0]).high)
    assert math.isfinite(text_ratio(np.arange(1.0, 6.0), np.ones(5), np.zeros(5)).high)


def test_no_change_among_few_items_is_not_certainty():
    estimate = paired_difference(ones(40, 64), ones(40, 64))
    assert (estimate.value, estimate.stderr) == (0.0, 0.0)
    assert estimate.low < -0.02 and estimate.high > 0.02


def test_summary_is_json_with_null_for_what_is_not_finite():
    summary = mean([2.0]).summary("margin")
    assert summary == {"margin": 2.0, "margin_stderr": None, "margin_interval": [None, None]}
    json.dumps(mean([math.nan, 1.0]).summary("acc"), allow_nan=False)


@pytest.mark.parametrize("call", [lambda: mean([]), lambda: paired_difference([1.0], [1.0, 2.0])])
def test_wrong_shapes_are_our_own_bug(call):
    with pytest.raises(AssertionError, match="items"):
        call()


def test_outcomes_other_than_0_and_1_are_our_own_bug():
    with pytest.raises(AssertionError, match="0 or 1"):
        proportion([0.5])
    with pytest.raises(AssertionError, match="0 or 1"):
        mcnemar_exact([2], [0])


# ---- documents of a text


def test_the_unit_of_a_text_is_the_document():
    """28 blocks of 14 documents: the ratio of the documents' sums."""
    rng = np.random.default_rng(5)
    nats, tokens, documents = rng.gamma(5, size=28), rng.integers(200, 300, 28), np.repeat(np.arange(14), 2)
    sums = [np.bincount(documents, values) for values in (nats, tokens)]
    found, expected = text_ratio(nats, tokens, documents), ratio(*sums)
    assert 13.5 < effective_documents(tokens, documents) <= 14
    assert (found.value, found.stderr) == pytest.approx((expected.value, expected.stderr))
    assert found.n == 14 and found.note == "" and 12 < found.df < 13


def test_equal_documents_count_whole_and_a_long_one_counts_less():
    assert effective_documents(np.full(20, 511), np.arange(20)) == pytest.approx(20)
    # One document of 9 blocks and one of a block: (10)^2 / (81 + 1).
    assert effective_documents(np.full(10, 511), [0] * 9 + [1]) == pytest.approx(100 / 82)


@pytest.mark.parametrize(
    ("documents", "told"), [([0] * 16, "1 document"), ([0] * 8 + [3] * 8, "2 documents")]
)
def test_few_documents_say_that_their_spread_is_hardly_known(documents, told):
    rng = np.random.default_rng(6)
    nats = rng.gamma(5, size=16)
    found, again = (text_ratio(nats, np.full(16, 511), documents) for _ in range(2))
    assert found.note == f"{told}: spread hardly known" and found == again
    assert found.low < found.value < found.high and math.isfinite(found.stderr)


def test_runs_of_blocks_see_that_neighbours_are_alike():
    """The same numbers in an order where neighbours are alike are worth less than in a mixed one."""
    sorted_nats = np.sort(np.random.default_rng(7).normal(3.0, 0.3, 36))
    mixed = np.random.default_rng(8).permutation(sorted_nats)
    in_order, in_any = (text_ratio(each, np.ones(36), np.zeros(36)).stderr for each in (sorted_nats, mixed))
    assert in_order > 1.5 * in_any


# ---- properties


@given(rows)
def test_the_interval_holds_the_value(values):
    estimate = mean(values)
    assert estimate.low <= estimate.value <= estimate.high and estimate.stderr >= 0


@given(st.lists(st.booleans(), min_size=5, max_size=60))
def test_a_proportions_interval_lies_within_0_and_1_and_holds_it(outcomes):
    estimate = proportion(outcomes)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1


@given(outcome_pairs)
def test_swapping_the_arms_turns_the_sign(pairs):
    a, b = zip(*pairs, strict=True)
    ab, ba = paired_difference(a, b), paired_difference(b, a)
    assert (ab.value, ab.low, ab.high) == pytest.approx((-ba.value, -ba.high, -ba.low))
    assert ab.note or -1 <= ab.low <= ab.value <= ab.high <= 1
    assert mcnemar_exact(a, b) == mcnemar_exact(b, a)


@given(rows, st.floats(0.1, 100))
def test_a_ratio_scales_with_its_numerators(numerators, factor):
    denominators = np.arange(1, len(numerators) + 1)
    one, scaled = ratio(numerators, denominators), ratio(np.multiply(numerators, factor), denominators)
    assert scaled.value == pytest.approx(one.value * factor, abs=1e-3)
    assert scaled.stderr == pytest.approx(one.stderr * factor, abs=1e-3)


@given(st.lists(st.tuples(finite, finite, st.integers(0, 20)), min_size=5, max_size=30))
def test_a_paired_text_difference_is_the_difference_of_the_ratios(blocks):
    a, b, documents = zip(*blocks, strict=True)
    x = np.arange(1, len(blocks) + 1)
    estimate = paired_text_difference(a, b, x, documents)
    assert estimate.value == pytest.approx(ratio(a, x).value - ratio(b, x).value, abs=1e-6)
    same = paired_text_difference(a, a, x, documents)
    assert (same.value, same.stderr, same.low, same.high) == (0.0, 0.0, 0.0, 0.0)


def test_pairing_is_what_makes_a_small_difference_visible():
    rng = np.random.default_rng(4)
    tokens, level = rng.integers(50, 150, 30), rng.normal(3.0, 0.5, 30)
    worse = level + 0.01 + rng.normal(0, 0.01, 30)
    estimate = paired_text_difference(tokens * worse, tokens * level, tokens, np.arange(30))
    assert estimate.low > 0 and estimate.stderr < ratio(tokens * level, tokens).stderr / 10


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_holm_keeps_the_order_and_never_helps(p_values, random):
    adjusted = holm(p_values)
    assert (adjusted >= p_values).all() and (adjusted <= 1).all()
    assert (np.diff(adjusted[np.argsort(p_values, kind="stable")]) >= 0).all()
    order = random.sample(range(len(p_values)), len(p_values))
    assert holm(np.take(p_values, order)) == pytest.approx(adjusted[order])
