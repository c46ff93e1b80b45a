"""Intervals hold what they promise: coverage by simulation, symmetry, known values, speed."""

from __future__ import annotations

import math
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tenon import stats


def _coverage(hit: list[bool]) -> float:
    return sum(hit) / len(hit)


@pytest.mark.parametrize(("rows", "least"), [(5, 0.86), (15, 0.92), (60, 0.93)])
def test_the_mean_is_covered_95_times_in_100(rows: int, least: float) -> None:
    draw = np.random.default_rng(rows)
    hits = []
    for trial in range(600):
        interval = stats.mean_interval(draw.normal(3.0, 2.0, rows), seed=trial, resamples=1000)
        hits.append(interval.low <= 3.0 <= interval.high)
    assert least <= _coverage(hits) <= 0.985


def test_a_paired_difference_is_covered_and_narrower_than_unpaired() -> None:
    draw = np.random.default_rng(1)
    hits, widths = [], []
    for trial in range(400):
        hard = draw.exponential(1.0, 40)  # what both subjects share: how hard the row is
        a, b = hard + draw.normal(0, 0.2, 40), hard + 0.3 + draw.normal(0, 0.2, 40)
        interval = stats.mean_difference_interval(a, b, seed=trial, resamples=1000)
        hits.append(interval.low <= 0.3 <= interval.high)
        widths.append(interval.high - interval.low)
    assert 0.92 <= _coverage(hits) <= 0.98
    # Unpaired, the spread of `hard` alone would give a width of 2 * 1.96 * sqrt(2 / 40) = 0.88.
    assert float(np.mean(widths)) < 0.3


def test_perplexity_is_covered() -> None:
    draw = np.random.default_rng(2)
    hits = []
    for trial in range(400):
        tokens = draw.integers(5, 50, 60)
        nlls = tokens * draw.normal(1.2, 0.3, 60)
        interval = stats.bootstrap_interval(60, stats.perplexity_statistic(nlls, tokens), seed=trial, resamples=1000)
        hits.append(interval.low <= math.exp(1.2) <= interval.high)
    assert 0.91 <= _coverage(hits) <= 0.985


@pytest.mark.parametrize(("share", "rows"), [(0.5, 10), (0.95, 20), (0.02, 100)])
def test_shares_are_covered_even_near_the_ends(share: float, rows: int) -> None:
    chance = 0.0
    for successes in range(rows + 1):
        interval = stats.proportion_interval(successes, rows)
        if interval.low <= share <= interval.high:
            chance += math.comb(rows, successes) * share**successes * (1 - share) ** (rows - successes)
    assert chance >= 0.92


def test_all_right_is_not_certain() -> None:
    interval = stats.mean_interval([1.0] * 20)
    assert interval.value == interval.high == 1.0
    assert interval.low == pytest.approx(0.8389, abs=1e-4)
    assert stats.mean_interval([0.0] * 20).high == pytest.approx(1 - 0.8389, abs=1e-4)
    # Newcombe 1998, table I: 81 of 263.
    assert (stats.proportion_interval(81, 263).low, stats.proportion_interval(81, 263).high) == (
        pytest.approx(0.2553, abs=1e-4),
        pytest.approx(0.3662, abs=1e-4),
    )


@hypothesis_settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.floats(-100, 100), st.floats(-100, 100)), min_size=1, max_size=40),
    st.integers(min_value=0, max_value=5),
)
def test_a_difference_turned_round_is_its_mirror_image(pairs: list[tuple[float, float]], seed: int) -> None:
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    there = stats.mean_difference_interval(a, b, seed=seed, resamples=300)
    back = stats.mean_difference_interval(b, a, seed=seed, resamples=300)
    assert there.low <= there.value <= there.high
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low), abs=1e-9)
    assert there.excludes(0.0) == back.excludes(0.0)


def test_a_subject_against_itself_differs_by_nothing() -> None:
    values = np.random.default_rng(3).normal(size=50)
    assert stats.mean_difference_interval(values, values) == stats.Interval(0.0, 0.0, 0.0)


def test_the_same_seed_gives_the_same_interval_and_others_do_not() -> None:
    values = np.random.default_rng(4).normal(size=200)
    assert stats.mean_interval(values, seed=1) == stats.mean_interval(values, seed=1)
    assert stats.mean_interval(values, seed=1) != stats.mean_interval(values, seed=2)


def test_macro_f1_is_the_mean_over_classes_that_occur() -> None:
    #   class 0: 2 expected, 1 hit, got 1 -> F1 2/3; class 1: 1 expected, 1 hit, got 2 -> 2/3; class 2: missed -> 0.
    #   class 3 never occurs and does not count; the answer that is no class makes no class of its own.
    statistic = stats.macro_f1_statistic([0, 0, 1, 2], [0, 1, 1, -1], classes=4)
    assert float(statistic(np.ones((1, 4)))[0]) == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    # A row drawn twice counts twice; classes that no drawn row shows do not count.
    assert float(statistic(np.array([[2.0, 0.0, 2.0, 0.0]]))[0]) == 1.0


def test_macro_f1_of_resamples_equals_the_plain_loop() -> None:
    draw = np.random.default_rng(5)
    expected, got = draw.integers(0, 5, 30), draw.integers(-1, 5, 30)
    weights = draw.integers(0, 3, (20, 30)).astype(np.float64)
    fast = stats.macro_f1_statistic(expected.tolist(), got.tolist(), classes=5)(weights)
    for row, value in zip(weights, fast, strict=True):
        e, g = np.repeat(expected, row.astype(int)), np.repeat(got, row.astype(int))
        scores = []
        for label in sorted({*e.tolist(), *g.tolist()} - {-1}):
            hits = int(((e == label) & (g == label)).sum())
            scores.append(2 * hits / (int((e == label).sum()) + int((g == label).sum())))
        assert value == pytest.approx(sum(scores) / len(scores))


def test_a_difference_of_any_statistic_is_paired() -> None:
    draw = np.random.default_rng(6)
    tokens = draw.integers(5, 50, 300)
    base, adapter = tokens * draw.normal(2.0, 0.3, 300), tokens * draw.normal(1.0, 0.3, 300)
    interval = stats.difference_interval(
        300, stats.perplexity_statistic(base, tokens), stats.perplexity_statistic(adapter, tokens)
    )
    assert interval.value == pytest.approx(math.exp(adapter.sum() / tokens.sum()) - math.exp(base.sum() / tokens.sum()))
    assert interval.high < 0
    assert interval.excludes(0.0)


def test_students_t_is_within_one_percent_of_the_table() -> None:
    for degrees, point in {3: 3.182, 4: 2.776, 9: 2.262, 29: 2.045, 999: 1.962}.items():
        assert stats._student_t(degrees) == pytest.approx(point, rel=0.01)


def test_impossible_requests_say_why() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        stats.bootstrap_interval(0, stats.mean_statistic([]))
    with pytest.raises(ValueError, match="at least one row"):
        stats.mean_interval([])
    with pytest.raises(ValueError, match="pairs need the same rows"):
        stats.mean_difference_interval([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="outside 0"):
        stats.macro_f1_statistic([0, 7], [0, 1], classes=7)
    with pytest.raises(ValueError, match="statistic of all rows is nan"):
        stats.mean_interval([1.5, math.nan])
    with pytest.raises(ValueError, match="is no share"):
        stats.proportion_interval(3, 2)
    with pytest.raises(ValueError, match="denominators"):
        stats.ratio_statistic([1.0], [1.0, 2.0])


def test_one_row_has_no_spread() -> None:
    assert stats.mean_interval([2.5]) == stats.Interval(2.5, 2.5, 2.5)


def test_ten_thousand_resamples_of_three_thousand_rows_take_under_a_second() -> None:
    values = np.random.default_rng(7).normal(size=3000)
    times = []
    for _ in range(3):
        start = time.process_time()
        stats.mean_interval(values)
        times.append(time.process_time() - start)
    assert min(times) < 1.0


def test_p29_importing_stats_and_units_does_not_import_numpy() -> None:
    code = "import sys, tenon.stats, tenon.units; print('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
