"""Stop strings: the one that is complete first, however the text is cut into pieces."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenon.serve.text.stops import StopScanner

LETTERS = st.text("abc", max_size=30)


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the stop string that ends first, letter by letter."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@given(
    text=LETTERS, stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=3), cuts=st.lists(st.integers(0, 30))
)
def test_pieces_change_nothing(text: str, stops: list[str], cuts: list[int]) -> None:
    scanner, said = StopScanner(stops), ""
    bounds = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    for start, end in pairwise(bounds):
        said += scanner.push(text[start:end])
        assert text.startswith(said)
    said += scanner.finish()
    assert (said, scanner.found) == expected(text, stops)


@pytest.mark.parametrize(
    ("piece", "certain"), [("hello", "hello"), ("hello <", "hello "), ("a <en", "a "), ("<e<", "<e")]
)
def test_only_what_may_become_a_stop_string_is_held_back(piece: str, certain: str) -> None:
    scanner = StopScanner(["<end>"])
    assert scanner.push(piece) == certain
    assert scanner.finish() == piece.removeprefix(certain) and not scanner.found


def test_nothing_comes_after_a_stop_string() -> None:
    scanner = StopScanner(["x"])
    assert [scanner.push(piece) for piece in ("ab", "cxd", "e")] == ["ab", "c", ""]
    assert scanner.found and scanner.finish() == ""
