"""How sure a figure is: 95% intervals of means, differences, and any statistic of resampled rows.

Three rules, so that an interval never promises more than the rows can give:

- A share of rows (values 0 and 1) gets Wilson's interval: it holds its 95% at small counts and near 0 and 1, where
  resampling 20 right answers of 20 would claim certainty.
- Everything else gets the percentile bootstrap (Efron 1979, "Bootstrap methods: another look at the jackknife"),
  widened for few rows as Hesterberg (2015, "What teachers should know about the bootstrap", section 3.2) proposes:
  percentiles are too narrow by sqrt((n-1)/n) and use z where t is due. Below about ten rows it still covers less than
  it says (88% at five rows of a normal spread): such few rows decide nothing.
- Two subjects on the same rows are compared in pairs: one draw of rows serves both (Koehn 2004, "Statistical
  significance tests for machine translation evaluation"). When no row differs the interval is [0, 0]: these rows show
  no difference, which is no proof that there is none.

One row has no spread: its interval is its value. Rows are taken as independent; rows copied from each other are not.

Shape legend: B resamples, N rows, C classes. numpy is imported inside functions, so that the command starts fast.
This module does not know what the rows are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    FloatArray: TypeAlias = NDArray[np.float64]
    Numbers: TypeAlias = Sequence[float] | NDArray[np.float64] | NDArray[np.int64]
    # weights_BN (how often resample b drew row n) -> values_B.
    Statistic: TypeAlias = Callable[[FloatArray], FloatArray]

RESAMPLES = 10_000
_CHUNK_CELLS = 1 << 21  # weights held at once: 16 MB


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and the ends of its 95% interval."""

    value: float
    low: float
    high: float

    def excludes(self, point: float = 0.0) -> bool:
        """Whether `point` lies outside: for a difference, whether it is significant at 5%."""
        return point < self.low or point > self.high


def mean_interval(values: Numbers, *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """The mean of one value a row; a share of rows (all 0 or 1) by Wilson's formula. Raises ValueError on no rows."""
    import numpy as np

    values_N = np.asarray(values, dtype=np.float64)
    if values_N.size and bool(np.isin(values_N, (0.0, 1.0)).all()):
        return proportion_interval(int(values_N.sum()), values_N.size)
    return bootstrap_interval(values_N.size, mean_statistic(values_N), seed=seed, resamples=resamples)


def mean_difference_interval(a: Numbers, b: Numbers, *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """mean(b) - mean(a) of values in pairs, one pair a row. Raises ValueError when the lengths differ."""
    import numpy as np

    a_N, b_N = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a_N.shape != b_N.shape:
        raise ValueError(f"a has {a_N.size} rows and b has {b_N.size}: pairs need the same rows")
    return bootstrap_interval(a_N.size, mean_statistic(b_N - a_N), seed=seed, resamples=resamples)


def difference_interval(
    rows: int, a: Statistic, b: Statistic, *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """b - a of a statistic of the same rows, each resample drawn once for both."""
    return bootstrap_interval(rows, lambda weights_BN: b(weights_BN) - a(weights_BN), seed=seed, resamples=resamples)


def bootstrap_interval(rows: int, statistic: Statistic, *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """The widened percentile interval of `statistic` over `resamples` draws of `rows` rows with replacement.

    The same seed and number of rows draw the same rows, whatever the statistic. Raises ValueError when there are no
    rows or the statistic is not finite.
    """
    import numpy as np

    if rows < 1:
        raise ValueError("an interval needs at least one row")
    value = float(statistic(np.ones((1, rows)))[0])
    if not math.isfinite(value):
        raise ValueError(f"the statistic of all rows is {value}")
    if rows == 1:
        return Interval(value, value, value)
    draw = np.random.default_rng(seed)
    per_chunk = max(1, _CHUNK_CELLS // rows)
    values_B = np.concatenate(
        [
            statistic(_draw_weights(draw, min(per_chunk, resamples - start), rows))
            for start in range(0, resamples, per_chunk)
        ]
    )
    if not np.isfinite(values_B).all():
        raise ValueError(f"the statistic of {int((~np.isfinite(values_B)).sum())} resamples is not finite")
    tail = _tail(rows)
    low, high = np.quantile(values_B, (tail, 1 - tail))
    return Interval(value, min(value, float(low)), max(value, float(high)))


def proportion_interval(successes: int, rows: int) -> Interval:
    """Wilson's score interval of a share of rows (Wilson 1927). Raises ValueError on no rows."""
    if not 0 <= successes <= rows or rows < 1:
        raise ValueError(f"{successes} of {rows} rows is no share")
    z = NormalDist().inv_cdf(0.975)
    share = successes / rows
    middle = share + z * z / (2 * rows)
    half = z * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    scale = 1 + z * z / rows
    low = 0.0 if successes == 0 else (middle - half) / scale
    high = 1.0 if successes == rows else (middle + half) / scale
    return Interval(share, low, high)


def mean_statistic(values: Numbers) -> Statistic:
    """The mean of one value a row."""
    import numpy as np

    values_N = np.asarray(values, dtype=np.float64)
    return lambda weights_BN: weights_BN @ values_N / weights_BN.sum(axis=1)


def ratio_statistic(numerators: Numbers, denominators: Numbers) -> Statistic:
    """Sum over rows of one value by the sum of another: loss per token of rows of different length."""
    import numpy as np

    top_N, bottom_N = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if top_N.shape != bottom_N.shape:
        raise ValueError(f"{top_N.size} numerators and {bottom_N.size} denominators")
    return lambda weights_BN: (weights_BN @ top_N) / (weights_BN @ bottom_N)


def perplexity_statistic(nlls: Numbers, tokens: Numbers) -> Statistic:
    """exp(sum of negative log likelihoods in nats / sum of supervised tokens)."""
    import numpy as np

    loss = ratio_statistic(nlls, tokens)
    return lambda weights_BN: np.exp(loss(weights_BN))


def macro_f1_statistic(expected: Sequence[int], got: Sequence[int], *, classes: int) -> Statistic:
    """The unweighted mean of the F1 of every class that occurs, expected or got, among the drawn rows.

    expected: class indices in [0, classes). got: the same, or -1 where the answer is no class at all: a miss of the
    expected class that makes no class of its own.
    """
    import numpy as np

    expected_N, got_N = np.asarray(expected, dtype=np.int64), np.asarray(got, dtype=np.int64)
    if expected_N.shape != got_N.shape:
        raise ValueError(f"{expected_N.size} expected labels and {got_N.size} answers")
    if expected_N.size and (expected_N.min() < 0 or max(expected_N.max(), got_N.max()) >= classes or got_N.min() < -1):
        raise ValueError(f"a class index lies outside 0 … {classes - 1}")
    rows = np.arange(expected_N.size)
    seen_NC = np.zeros((expected_N.size, classes))  # 1 where the row expects the class, + 1 where it got it
    hits_NC = np.zeros_like(seen_NC)
    np.add.at(seen_NC, (rows, expected_N), 1.0)
    np.add.at(seen_NC, (rows[got_N >= 0], got_N[got_N >= 0]), 1.0)
    hits_NC[rows, expected_N] = expected_N == got_N

    def statistic(weights_BN: FloatArray) -> FloatArray:
        seen_BC, hits_BC = weights_BN @ seen_NC, weights_BN @ hits_NC
        f1_BC = 2 * hits_BC / np.maximum(seen_BC, 1e-300)
        return f1_BC.sum(axis=1) / np.maximum((seen_BC > 0).sum(axis=1), 1)

    return statistic


def _draw_weights(draw: np.random.Generator, resamples: int, rows: int) -> FloatArray:
    """weights_BN: how often each of `rows` rows comes up in `rows` draws with replacement."""
    import numpy as np

    picks_BN = draw.integers(0, rows, size=(resamples, rows), dtype=np.int64)
    picks_BN += np.arange(resamples, dtype=np.int64)[:, None] * rows
    return np.bincount(picks_BN.ravel(), minlength=resamples * rows).reshape(resamples, rows).astype(np.float64)


def _tail(rows: int) -> float:
    """The share to cut at each end: Phi(-sqrt(n/(n-1)) t), t the 97.5% point of Student's t with n-1 degrees."""
    return NormalDist().cdf(-math.sqrt(rows / (rows - 1)) * _student_t(rows - 1))


def _student_t(degrees: int) -> float:
    """The 97.5% point of Student's t (Cornish-Fisher expansion, Abramowitz & Stegun 26.7.5; within 1% from 3 on)."""
    z = NormalDist().inv_cdf(0.975)
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )
