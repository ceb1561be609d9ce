"""Intervals and paired tests on per-item results: numpy and scipy.special only, no torch.

The sampling units are documents: of HellaSwag, or of a text, whose blocks are alike within a document. Every interval
is two-sided 95% and speaks of the population that the units were drawn from; every comparison is paired, because both
schemes saw the same items.

Fewer than `FEWEST_UNITS` say too little about spread: `stderr` is then inf and the interval (-inf, inf), never a width
that looks known. NaN among the values makes the estimate NaN. `Estimate.summary` writes both as null, since JSON has
neither.

n: number of units.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

CONFIDENCE = 0.95
"""Coverage of every interval."""
FEWEST_UNITS = 5
"""Units below which no interval is told."""
TOO_FEW = "too few"
"""What stands in an interval's place then."""
FEWEST_DOCUMENTS = 12
"""Effective documents of a text below which their spread is hardly known; see `text_ratio`."""
RESAMPLES = 2000
"""Of the bootstrap over runs of blocks."""
TINY = 1e-15
"""Probability below which a number of changes is left out of a sum."""

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error and 95% interval [low, high], from n items."""

    value: float
    stderr: float
    low: float
    high: float
    n: int
    df: float = math.inf
    """Degrees of freedom of Student's t that made the interval; inf where it was the normal distribution."""
    note: str = ""
    """What a reader must know of the interval, in words."""

    def summary(self, name: str) -> dict[str, Any]:
        """`name`, `name_stderr` and `name_interval` as JSON takes them: null where a number is not finite."""
        value, stderr, low, high = (
            number if math.isfinite(number) else None
            for number in (self.value, self.stderr, self.low, self.high)
        )
        return {name: value, f"{name}_stderr": stderr, f"{name}_interval": [low, high]}


def mean(values: ArrayLike) -> Estimate:
    """Mean of n values, stderr = std(ddof=1) / sqrt(n), Student's t interval with n - 1 degrees of freedom.

    Source: Student 1908, Biometrika 6(1).
    """
    x = _items(values)
    return _t_estimate(float(x.mean()), _stderr(x), len(x))


def proportion(outcomes: ArrayLike) -> Estimate:
    """Share of ones among n outcomes of 0 or 1, with Wilson's score interval; below FEWEST_UNITS with none.

    stderr = std(ddof=1) / sqrt(n), which is what lm-evaluation-harness prints. The interval is
    (p + z^2/2n ± z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n); it keeps a width at p = 0 and p = 1.
    Source: Wilson 1927, JASA 22(158), equation for the limits.
    """
    x = _items(outcomes)
    assert _binary(x), "outcomes must be 0 or 1"
    n, p, z = len(x), float(x.mean()), _z()
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # The limits are exactly 0 and 1 at the ends; rounding would leave 1e-17 and exclude p itself.
    low = 0.0 if p == 0 else max(0.0, center - half)
    high = 1.0 if p == 1 else min(1.0, center + half)
    return _if_enough(Estimate(p, _stderr(x), low, high, n))


def ratio(numerators: ArrayLike, denominators: ArrayLike) -> Estimate:
    """Sum of numerators over sum of denominators of n items, e.g. nats over tokens of n blocks.

    R = sum(y) / sum(x), stderr^2 = n/(n-1) sum((y - R x)^2) / sum(x)^2: the linearised (cluster-robust)
    variance, so tokens of one block may depend on each other. t interval with n - 1 degrees of freedom.
    Source: Cochran 1977, Sampling Techniques, 3rd ed., section 6.3.
    """
    y, x = _pair(numerators, denominators)
    value, residuals = _linearised(y, x)
    return _t_estimate(value, _root_sum(residuals), len(x))


def text_ratio(numerators: ArrayLike, denominators: ArrayLike, documents: ArrayLike) -> Estimate:
    """Sum of numerators over sum of denominators of blocks of a text: nats over tokens. The unit is the document.

    `ratio` of the documents' sums, where there are enough of them: the cluster-robust variance, C / (C-1)
    sum_c (Y_c - R X_c)^2 / X^2 over C documents, with Student's t of C_eff - 1 degrees of freedom. C_eff = X^2 / sum
    X_c^2 is the effective number of documents. Below FEWEST_DOCUMENTS of these the spread between documents is hardly
    known; the interval is then a bootstrap over runs of neighbouring blocks, the note says so, and it speaks of these
    documents.

    Args:
        numerators, denominators: of each block, in the order of the text.
        documents: number of the document of each block.

    Sources: Cochran 1977, Sampling Techniques, 3rd ed., section 9A.1 (clusters of unequal size); Kish 1965, Survey
    Sampling, section 11.7 (effective number); Künsch 1989, Annals of Statistics 17(3) (blocks of a series).
    """
    y, x = _pair(numerators, denominators)
    _, places = np.unique(np.asarray(documents), return_inverse=True)
    assert len(places) == len(x), "every block has a document"
    sums_y, sums_x = (np.bincount(places, each).astype(np.float64) for each in (y, x))
    effective = effective_documents(x, documents)
    if effective < FEWEST_DOCUMENTS:
        return _over_runs(y, x, num_documents=len(sums_x))
    value, residuals = _linearised(sums_y, sums_x)
    return _t_estimate(value, _root_sum(residuals), len(sums_x), effective - 1)


def paired_text_difference(
    a: ArrayLike, b: ArrayLike, denominators: ArrayLike, documents: ArrayLike
) -> Estimate:
    """Ratio of a minus ratio of b over the same blocks of a text, e.g. nats per token of two schemes: `text_ratio` of
    the differences, since both share the denominators."""
    y_a, y_b = _pair(a, b)
    return text_ratio(y_a - y_b, denominators, documents)


def effective_documents(denominators: ArrayLike, documents: ArrayLike) -> float:
    """(sum of tokens)^2 over the sum of squares by document: how many documents of one size would say as much."""
    sums = np.bincount(np.unique(np.asarray(documents), return_inverse=True)[1], _items(denominators))
    return float(sums.sum() ** 2 / (sums**2).sum())


def paired_difference(a: ArrayLike, b: ArrayLike) -> Estimate:
    """Mean of a - b over the same n items.

    stderr = std(a - b, ddof=1) / sqrt(n), with Student's t interval. Where a and b are outcomes of 0 or 1, it
    is Bonett and Price's adjusted Wald, since t's would have no width when no item changes: with f10
    items won and f01 lost, p10 = (f10+1)/(n+2) and p01 = (f01+1)/(n+2), it is
    p10 - p01 ± z sqrt((p10 + p01 - (p10-p01)^2) / (n+2)).
    Source: Bonett and Price 2012, Journal of Educational and Behavioral Statistics 37(4).
    """
    x, y = _pair(a, b)
    if not (_binary(x) and _binary(y)):
        return _t_estimate(float((x - y).mean()), _stderr(x - y), len(x))
    found = _adjusted_wald(x - y)
    return found if found.note else replace(found, low=max(-1.0, found.low), high=min(1.0, found.high))


def difference_of_changes(a: ArrayLike, a_before: ArrayLike, b: ArrayLike, b_before: ArrayLike) -> Estimate:
    """Mean of (a - a_before) - (b - b_before) over the same n items: how much more a changed than b.

    Student's t interval, as `paired_difference`. Where all four are outcomes of 0 or 1, each item's d lies in -2..2,
    and the interval is Bonett and Price's carried over: with two more items, of 1 and -1, m = sum(d) / (n+2), it is
    m ± z sqrt(((sum(d^2) + 2) / (n+2) - m^2) / (n+2)), which is that of `paired_difference` where b does not change.
    """
    (x, x_before), (y, y_before) = _pair(a, a_before), _pair(b, b_before)
    _pair(x, y)
    d = (x - x_before) - (y - y_before)
    if all(map(_binary, (x, x_before, y, y_before))):
        return _adjusted_wald(d)
    return _t_estimate(float(d.mean()), _stderr(d), len(d))


def p_of_zero(estimate: Estimate) -> float:
    """Two-sided p-value of zero from an interval c ± q s, with q the 97.5% quantile of Student's t of the estimate's
    degrees of freedom: 2 P[T > |c| / s]. Below 5% just where the interval leaves zero out.

    1.0 for an interval that is the point zero; NaN where no interval is known.
    """
    center, half = (estimate.low + estimate.high) / 2, (estimate.high - estimate.low) / 2
    if not math.isfinite(half):
        return math.nan
    if half == 0:
        return 1.0 if center == 0 else 0.0
    return 2 * float(special.stdtr(estimate.df, -abs(center) / half * _t(estimate.df)))


def mcnemar_exact(a: ArrayLike, b: ArrayLike) -> float:
    """Two-sided exact p-value of equal accuracy, from paired outcomes of 0 or 1; 1.0 when no item changes.

    p = min(1, 2 P[Binomial(f10 + f01, 1/2) <= min(f10, f01)]); only a got f10 items right, only b f01.
    Source: McNemar 1947, Psychometrika 12(2), in its exact binomial form.
    """
    x, y = _pair(a, b)
    assert _binary(x) and _binary(y), "outcomes must be 0 or 1"
    won, lost = int((x > y).sum()), int((x < y).sum())
    return min(1.0, 2 * float(special.bdtr(min(won, lost), won + lost, 0.5))) if won + lost else 1.0


def holm(p_values: ArrayLike) -> Values:
    """p-values adjusted for the whole family, in the order given; at most 1.

    The i-th smallest of m becomes max over j <= i of (m - j + 1) p_(j).
    Source: Holm 1979, Scandinavian Journal of Statistics 6(2).
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(adjusted, 1.0)


def minimum_detectable_effect(
    num_items: int, num_changed: int, level: float = 0.05, power: float = 0.8
) -> float:
    """Smallest true difference of accuracies that `mcnemar_exact` finds at this level with this power.

    Items change with the share observed, q = num_changed / num_items. Of those that do, (1 + delta/q)/2 go one way:
    power(delta) = sum_d P[Binomial(n, q) = d] P[Binomial(d, (1 - delta/q)/2) <= k_d], with k_d the most changes the
    other way at which d changes are still significant. Significance in the wrong direction does not count.

    Args:
        num_items, num_changed: items compared, and those that only one of the two got right.
        level: two-sided; that of a family divided by its size is Holm's for the smallest p-value of the family.

    Returns:
        delta in (0, q], as a share of items; inf where even changes that all go one way, delta = q, are found too
        rarely: at this n nothing can be resolved with so few changes.

    Source: Duffy 1984, Biometrics 40(4), exact power.
    """
    share = num_changed / num_items
    d = np.arange(num_items + 1)
    weights = special.bdtr(d, num_items, share)
    weights[1:] -= weights[:-1].copy()
    kept = weights > TINY
    d, weights = d[kept], weights[kept]
    allowed = _most_against(d, level)

    def found(one_way: float) -> float:
        hits = np.where(allowed >= 0, special.bdtr(np.maximum(allowed, 0), d, (1 - one_way) / 2), 0.0)
        return float(weights @ hits)

    if share == 0 or found(1.0) < power:
        return math.inf
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if found(middle) >= power else (middle, high)
    return share * high


def _most_against(d: NDArray[np.int64], level: float) -> NDArray[np.int64]:
    """Largest k with 2 P[Binomial(d, 1/2) <= k] <= level, for each d; -1 where not even k = 0 is significant."""
    # The normal quantile is within two of the exact one; walked down from there.
    k = np.floor(d / 2 + special.ndtri(level / 2) * np.sqrt(d) / 2).astype(np.int64) + 3
    k = np.minimum(k, d)
    while (over := (k >= 0) & (2 * special.bdtr(np.maximum(k, 0), d, 0.5) > level)).any():
        k = np.where(over, k - 1, k)
    return np.maximum(k, -1)


def _items(values: ArrayLike) -> Values:
    x = np.asarray(values, dtype=np.float64)
    assert x.ndim == 1 and len(x) > 0, f"items must be one non-empty row, found shape {x.shape}"
    return x


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[Values, Values]:
    x, y = _items(a), _items(b)
    assert len(x) == len(y), f"pairs must be of the same items, found {len(x)} and {len(y)}"
    return x, y


def _binary(x: Values) -> bool:
    return bool(np.isin(x, (0.0, 1.0)).all())


def _stderr(x: Values) -> float:
    return float(x.std(ddof=1)) / math.sqrt(len(x)) if len(x) > 1 else math.inf


def _linearised(y: Values, x: Values) -> tuple[float, Values]:
    """The ratio and each item's part in its error, (y - R x) / sum(x)."""
    assert (x > 0).all(), "denominators must be positive"
    value = float(y.sum() / x.sum())
    return value, (y - value * x) / x.sum()


def _root_sum(residuals: Values) -> float:
    n = len(residuals)
    return math.sqrt(n / (n - 1) * float(residuals @ residuals)) if n > 1 else math.inf


def _t_estimate(value: float, stderr: float, n: int, df: float | None = None) -> Estimate:
    df = n - 1 if df is None else df
    half = _t(df) * stderr if n > 1 else math.inf
    return _if_enough(Estimate(value, stderr, value - half, value + half, n, df))


def _if_enough(estimate: Estimate) -> Estimate:
    """The estimate, without spread where its units are too few to tell it."""
    if estimate.n >= FEWEST_UNITS:
        return estimate
    return replace(estimate, stderr=math.inf, low=-math.inf, high=math.inf, note=TOO_FEW)


def _over_runs(y: Values, x: Values, num_documents: int) -> Estimate:
    """The ratio with a moving-block bootstrap: runs of about sqrt(n) neighbours, around the end to the start.

    The interval is the value and Student's t of one degree of freedom less than there are runs, times the spread of the
    resampled ratios.
    """
    n = len(x)
    length = max(1, round(math.sqrt(n)))
    num_runs = -(-n // length)
    firsts = np.random.default_rng(0).integers(0, n, (RESAMPLES, num_runs, 1))
    drawn = ((firsts + np.arange(length)) % n).reshape(RESAMPLES, -1)[:, :n]
    stderr = float((y[drawn].sum(1) / x[drawn].sum(1)).std(ddof=1))
    found = _t_estimate(float(y.sum() / x.sum()), stderr, n, max(num_runs - 1, 1))
    if found.note:
        return found
    documents = "1 document" if num_documents == 1 else f"{num_documents} documents"
    return replace(found, n=num_documents, note=f"{documents}: spread hardly known")


def _adjusted_wald(d: Values) -> Estimate:
    """Mean of n whole differences, with Bonett and Price's interval: as if one more item had won and one lost."""
    n = len(d)
    center = float(d.sum()) / (n + 2)
    half = _z() * math.sqrt(((float(d @ d) + 2) / (n + 2) - center**2) / (n + 2))
    return _if_enough(Estimate(float(d.mean()), _stderr(d), center - half, center + half, n))


def _z() -> float:
    return float(special.ndtri((1 + CONFIDENCE) / 2))


def _t(df: float) -> float:
    return float(special.stdtrit(df, (1 + CONFIDENCE) / 2))
