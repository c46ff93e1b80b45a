"""No row on both sides, exact shares, stable sides."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenon.data.split import Split, content_side, draw_fraction, split_rows

_contents = st.lists(st.integers(0, 12), min_size=1, max_size=40)


def _hashes(contents: list[int]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**64, size=20, dtype=np.uint64)[np.array(contents, dtype=int)]


def _split(
    contents: list[int], *, validation: list[bool] | None = None, share: float = 0.3, by: str = "fraction", **how
) -> Split:
    size = len(contents)
    return split_rows(
        _hashes(contents),
        np.full(size, -1, dtype=np.int32),
        validation=np.array(validation or [False] * size),
        share=share,
        by=by,
        seed=how.get("seed", 0),
        keep_repeated=how.get("keep_repeated", True),
    )


@given(
    _contents,
    st.lists(st.booleans(), min_size=40, max_size=40),
    st.floats(0, 1),
    st.sampled_from(["fraction", "content"]),
    st.integers(0, 2**63 - 1),
    st.booleans(),
)
def test_no_content_is_on_both_sides(
    contents: list[int], roles: list[bool], share: float, by: str, seed: int, keep: bool
) -> None:
    validation = roles[: len(contents)]
    split = _split(contents, validation=validation, share=share, by=by, seed=seed, keep_repeated=keep)
    learnt = {contents[row] for row in split.train}
    asked = {contents[row] for row in split.validation}
    assert not learnt & asked
    assert learnt | asked == set(contents)
    rows = [*split.train, *split.validation, *split.shared, *([] if keep else split.repeated)]
    assert sorted(rows) == list(range(len(contents)))
    if not keep:
        assert len(split.train) == len(learnt)
        assert len(split.validation) == len(asked)


@given(_contents, st.floats(0.01, 0.99), st.integers(0, 100))
def test_a_fraction_is_exact_over_unique_contents(contents: list[int], share: float, seed: int) -> None:
    split = _split(contents, share=share, seed=seed)
    unique = len(set(contents))
    asked = {contents[row] for row in split.validation}
    assert len(asked) == min(max(1, round(share * unique)), unique - 1)


@given(_contents, _contents, st.floats(0, 1), st.integers(0, 100))
def test_by_content_a_row_stays_on_its_side_when_data_grow(
    contents: list[int], more: list[int], share: float, seed: int
) -> None:
    before = _split(contents, share=share, by="content", seed=seed)
    after = _split(more + contents, share=share, by="content", seed=seed)
    asked = {contents[row] for row in before.validation}
    grown = {(more + contents)[row] for row in after.validation}
    assert grown & set(contents) == asked


def test_by_content_the_share_is_about_met() -> None:
    hashes = np.random.default_rng(1).integers(0, 2**64, size=20_000, dtype=np.uint64)
    for share in (0.0, 0.05, 0.5, 1.0):
        assert content_side(hashes, share, 3).mean() == pytest.approx(share, abs=0.01)
    # Hashes with a pattern, and another seed, give unrelated sides.
    ordered = np.arange(20_000, dtype=np.uint64)
    assert content_side(ordered, 0.5, 0).mean() == pytest.approx(0.5, abs=0.02)
    assert (content_side(hashes, 0.5, 1) == content_side(hashes, 0.5, 2)).mean() == pytest.approx(0.5, abs=0.02)


def test_rows_of_validation_sources_leave_train_and_are_counted() -> None:
    split = _split([1, 2, 1, 3, 1, 4], validation=[False, False, False, False, True, True], share=0.0)
    assert split.train.tolist() == [1, 3]
    assert split.validation.tolist() == [4, 5]
    assert split.shared.tolist() == [0, 2]


def test_repeated_rows_are_counted_and_dropped_when_asked() -> None:
    contents = [5, 5, 6, 5, 7]
    assert _split(contents, share=0.0).repeated.tolist() == [1, 3]
    split = _split(contents, share=0.0, keep_repeated=False)
    assert (split.train.tolist(), split.repeated.tolist()) == ([0, 2, 4], [1, 3])


@given(st.lists(st.integers(0, 5), min_size=2, max_size=60), st.integers(0, 1000))
def test_every_label_keeps_a_content_in_train(labels: list[int], seed: int) -> None:
    ids = np.array(labels, dtype=np.int32)
    free = len(labels) - len(set(labels))
    held = draw_fraction(ids, 0.3, seed)
    assert len(held) == len(set(held.tolist())) == min(max(1, round(0.3 * len(labels))), len(labels) - 1)
    if len(held) <= free:
        assert set(np.delete(ids, held).tolist()) == set(labels)


def test_seeds_draw_differently() -> None:
    ids = np.full(100, -1, dtype=np.int32)
    drawn = {tuple(sorted(draw_fraction(ids, 0.1, seed).tolist())) for seed in range(5)}
    assert len(drawn) == 5
