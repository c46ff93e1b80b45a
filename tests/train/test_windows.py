"""Which rows a step takes: every row once an epoch, whatever cuts the windows, and the same again after a resume."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenon.train.windows import Cursor, WindowFeed, draw_key
from tests.train.world import Asked, feed_of, some_rows


def all_windows(feed: WindowFeed, cursor: Cursor | None = None) -> list[list[int]]:
    """The windows from a cursor to the end of the run."""
    found, cursor = [], cursor or Cursor()
    while rows := feed.next(cursor):
        found.append(rows)
        cursor = replace(cursor, step=cursor.step + 1, rows=cursor.rows + len(rows))
    return found


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 30), rows=st.integers(1, 12), tokens=st.sampled_from([0, 5, 20, 60]), data=st.data())
def test_p21_a_run_resumed_at_any_step_takes_the_same_rows(
    count: int, rows: int, tokens: int, data: st.DataObject
) -> None:
    asked, stored = Asked(rows=rows, tokens=tokens, epochs=2.5, seed=count), some_rows(count)
    whole = all_windows(feed_of(asked.plan(), stored))
    at = data.draw(st.integers(0, len(whole)))
    cursor = Cursor(at, sum(map(len, whole[:at])))
    assert all_windows(feed_of(asked.plan(), stored), cursor) == whole[at:]
    taken = [row for window in whole for row in window]
    assert len(taken) == max(1, round(2.5 * count))
    assert sorted(taken[:count]) == list(range(count)) == sorted(taken[count : 2 * count])


def test_the_last_window_is_short_and_windows_cross_epochs() -> None:
    feed = feed_of(Asked(rows=4, epochs=3).plan(), some_rows(6), shuffle=False)
    assert all_windows(feed) == [[0, 1, 2, 3], [4, 5, 0, 1], [2, 3, 4, 5], [0, 1, 2, 3], [4, 5]]
    assert feed.steps(Cursor()) == 5


def test_windows_of_tokens_hold_whole_rows_and_one_that_is_too_long_goes_alone() -> None:
    stored = some_rows(20)
    feed = feed_of(Asked(tokens=20, epochs=1).plan(), stored, shuffle=False)
    windows = all_windows(feed)
    assert [row for window in windows for row in window] == list(range(20))
    assert all(sum(map(stored.length, window)) <= 20 for window in windows)
    alone = feed_of(Asked(tokens=3, epochs=1).plan(), stored, shuffle=False)
    assert all_windows(alone) == [[row] for row in range(20)]


def test_the_first_limit_that_is_reached_ends_the_run() -> None:
    stored = some_rows(8)
    by_steps = feed_of(Asked(rows=4, epochs=5, steps=3).plan(), stored)
    assert len(all_windows(by_steps)) == 3 == by_steps.steps(Cursor())
    by_rows = feed_of(Asked(rows=4, epochs=1, steps=30).plan(), stored)
    assert len(all_windows(by_rows)) == 2 == by_rows.steps(Cursor())
    by_time = feed_of(Asked(rows=4, epochs=1, minutes=0.5).plan(), stored)
    assert by_time.next(Cursor(seconds=29.9)) and not by_time.next(Cursor(seconds=30.0))
    assert by_time.progress(Cursor(step=1, rows=4, seconds=27.0)) == pytest.approx(0.9)
    endless = feed_of(Asked(rows=4, minutes=1).plan(), stored)
    assert endless.steps(Cursor(step=7, rows=28)) == 0 and len(endless.next(Cursor(step=7, rows=28))) == 4


def test_a_fraction_of_an_epoch_takes_at_least_one_row() -> None:
    assert [len(w) for w in all_windows(feed_of(Asked(epochs=0.01).plan(), some_rows(5)))] == [1]


def test_the_number_of_steps_is_estimated_for_windows_of_tokens() -> None:
    feed = feed_of(Asked(tokens=20, epochs=4).plan(), some_rows(10))
    assert feed.steps(Cursor()) == 0
    assert feed.steps(Cursor(step=5, rows=10)) == 20


def test_windows_of_tokens_end_also_when_every_row_was_dropped() -> None:
    feed = feed_of(Asked(tokens=20, steps=3).plan(), some_rows(5, empty=range(5)))
    assert len(feed.next(Cursor())) == 5


def test_p21_dropout_keys_depend_on_seed_step_and_place_alone() -> None:
    keys = {draw_key(seed, step, place) for seed in range(5) for step in range(20) for place in range(20)}
    assert len(keys) >= 1990 and all(-(2**31) <= key < 2**31 for key in keys)
    assert draw_key(3, 4, 5) == draw_key(3, 4, 5) == 1497231943
