"""Units are written and read the way people do, at every border."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenon import units


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1_234_567_890, "1.2 GB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (999_999_999, "1.0 GB"),
        (-2_500_000, "-2.5 MB"),
        (math.inf, "-"),
    ],
)
def test_bytes(count: float, text: str) -> None:
    assert units.format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.0004, "0.4 ms"),
        (0.25, "250 ms"),
        (0.9996, "1.0 s"),
        (12.34, "12.3 s"),
        (59.96, "1 min"),
        (200, "3 min 20 s"),
        (3599.6, "1 h"),
        (3600, "1 h"),
        (7500, "2 h 5 min"),
        (7199.9, "2 h"),
        (7189, "2 h"),
        (86399, "1 d"),
        (86400 * 3 + 4 * 3600, "3 d 4 h"),
        (86400 * 2 - 60, "2 d"),
        (-200, "-3 min 20 s"),
        (math.nan, "-"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert units.format_seconds(seconds) == text


def test_counts_rates_money_and_shares() -> None:
    assert units.format_count(12345) == "12,345"
    assert units.format_short(4_884_480) == "4.9M"
    assert units.format_short(134_515_008) == "134.5M"
    assert units.format_short(999_960) == "1.0M"
    assert units.format_short(77) == "77"
    assert units.format_tokens(12345) == "12,345 tokens"
    assert units.format_tokens(1) == "1 token"
    assert units.format_rate(12345.4, "tokens") == "12,345 tokens/s"
    assert units.format_rate(1.44, "steps") == "1.4 steps/s"
    assert units.format_rate(0, "steps") == "0 steps/s"
    assert units.format_rate(9.99, "steps") == "10 steps/s"
    assert units.format_rate(math.inf, "tokens") == "- tokens/s"
    assert units.format_usd(1234.5) == "$1,234.50"
    assert units.format_usd(0.0123) == "$0.0123"
    assert units.format_usd(0) == "$0.00"
    assert units.format_usd(-3) == "-$3.00"
    assert units.format_share(0.0123) == "1.2%"
    assert units.format_share(0.00036) == "0.036%"
    assert units.format_share(1) == "100.0%"


def test_what_people_type_is_understood() -> None:
    assert units.parse_bytes("1.2 GB") == 1_200_000_000
    assert units.parse_bytes("500MB") == 500_000_000
    assert units.parse_bytes(" 2GiB ") == 2 * 1024**3
    assert units.parse_bytes("24g") == 24 * 10**9
    assert units.parse_bytes("4096") == 4096
    assert units.parse_count("12,345") == 12345
    assert units.parse_count("20k") == 20_000
    assert units.parse_count("4.9M") == 4_900_000
    assert units.parse_seconds("3 min 20 s") == 200
    assert units.parse_seconds("1h30m") == 5400
    assert units.parse_seconds("90") == 90
    assert units.parse_seconds("2 days") == 172800
    assert units.parse_seconds("250 ms") == 0.25


@pytest.mark.parametrize("text", ["", "GB", "-1 GB", "1 GB 2 MB", "1.2.3 GB", "3 parsecs", "1e3", "nan"])
def test_bad_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size such as"):
        units.parse_bytes(text)


@pytest.mark.parametrize("text", ["", "min", "-3 s", "3 min 20", "1 fortnight"])
def test_bad_durations_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration such as"):
        units.parse_seconds(text)


@given(st.floats(min_value=0.001, max_value=1e9))
def test_seconds_read_back_within_their_rounding(seconds: float) -> None:
    assert units.parse_seconds(units.format_seconds(seconds)) == pytest.approx(seconds, rel=0.06)


@given(st.integers(min_value=0, max_value=10**20))
def test_bytes_read_back_within_their_rounding(count: int) -> None:
    assert units.parse_bytes(units.format_bytes(count)) == pytest.approx(count, rel=0.05)
