"""The order of rows: a function of (seed, epoch), with exact counts."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tenon.data.order import RowOrder, permutation

_sources = st.lists(
    st.tuples(st.integers(0, 30), st.sampled_from([0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0])), min_size=1, max_size=4
)


def _order(sources: list[tuple[int, float]], *, seed: int = 0, shuffle: bool = True) -> RowOrder:
    return RowOrder([size for size, _ in sources], [weight for _, weight in sources], seed=seed, shuffle=shuffle)


@given(_sources, st.integers(0, 2**40), st.integers(0, 50), st.booleans())
def test_p21_an_epoch_is_a_function_of_seed_and_number_alone(
    sources: list[tuple[int, float]], seed: int, epoch: int, shuffle: bool
) -> None:
    used = _order(sources, seed=seed, shuffle=shuffle)
    for other in (epoch + 3, 0, epoch + 1):
        used.epoch(other)
    fresh = _order(sources, seed=seed, shuffle=shuffle)
    np.testing.assert_array_equal(used.epoch(epoch), fresh.epoch(epoch))
    assert len(fresh.epoch(epoch)) == fresh.epoch_rows


@given(_sources, st.booleans())
def test_every_source_gives_its_weight_and_comes_round_to_every_row(
    sources: list[tuple[int, float]], shuffle: bool
) -> None:
    order = _order(sources, shuffle=shuffle)
    epochs = 40
    seen = np.concatenate([order.epoch(number) for number in range(epochs)])
    first = 0
    for size, weight in sources:
        counts = np.bincount(seen[(seen >= first) & (seen < first + size)] - first, minlength=size)[:size]
        take = max(1, round(size * weight)) if size else 0
        assert counts.sum() == epochs * take
        if size:
            assert counts.max() - counts.min() <= 1
        first += size
    assert len(seen) == epochs * order.epoch_rows


def test_whole_passes_hold_every_row_once() -> None:
    order = _order([(5, 1.0), (3, 2.0)])
    for number in range(4):
        assert sorted(order.epoch(number)) == [0, 1, 2, 3, 4, 5, 5, 6, 6, 7, 7]


def test_a_fraction_takes_another_part_in_each_epoch() -> None:
    order = _order([(8, 0.25)])
    parts = [set(order.epoch(number).tolist()) for number in range(4)]
    assert set().union(*parts) == set(range(8))
    assert sum(map(len, parts)) == 8


def test_without_shuffling_rows_keep_their_order() -> None:
    order = _order([(3, 1.0), (2, 1.0)], shuffle=False)
    assert order.epoch(0).tolist() == order.epoch(7).tolist() == [0, 1, 2, 3, 4]


def test_seeds_and_epochs_give_different_orders_that_mix_the_sources() -> None:
    sources = [(50, 1.0), (50, 1.0)]
    orders = {tuple(_order(sources, seed=seed).epoch(epoch).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    first_half = _order(sources).epoch(0)[:50]
    assert 10 < (first_half < 50).sum() < 40


def test_p21_the_permutation_is_the_same_in_every_version_of_numpy() -> None:
    assert permutation(12, 7, 0, 1).tolist() == PERMUTATION_12_7_0_1


PERMUTATION_12_7_0_1 = [2, 3, 9, 10, 8, 0, 4, 5, 7, 1, 11, 6]
