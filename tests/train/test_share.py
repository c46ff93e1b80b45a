"""A window shared out among ranks: who gets which rows, and that the sums of all are what one process computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenon.data.pack import PackRow
from tenon.ranks.group import ALONE, Ranks
from tenon.train.interrupt import StopNow, StopSignal
from tenon.train.share import share_rows
from tenon.train.step import StepOptions, WindowLoss, accumulate_window, add_up
from tests.company import together
from tests.tiny import tiny_decoder
from tests.train.test_step import bank_of, gradients, rows_of

OPTIONS = StepOptions(micro_tokens=60, share_prefix=True)


def row_of(length: int, slot: int = 0) -> PackRow:
    return PackRow(slot, np.ones(length, dtype=np.int64), np.ones(length, dtype=bool), length)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 500), max_size=40), count=st.integers(1, 5))
def test_every_row_is_one_ranks_and_loads_are_even(lengths: list[int], count: int) -> None:
    rows = [row_of(length) for length in lengths]
    shares = [share_rows(rows, number, count) for number in range(count)]
    assert sorted(len(row.ids) for share in shares for row in share) == sorted(lengths)
    loads = [sum(len(row.ids) for row in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths, default=0)
    places = {id(row): place for place, row in enumerate(rows)}
    assert all([places[id(r)] for r in share] == sorted(places[id(r)] for r in share) for share in shares)


def test_one_process_has_the_window_as_it_is() -> None:
    rows = [row_of(3), row_of(9), row_of(1)]
    assert share_rows(rows, 0, 1) == rows


def test_equal_rows_go_round() -> None:
    rows = [row_of(4, slot) for slot in range(5)]
    assert [[row.slot for row in share_rows(rows, n, 2)] for n in range(2)] == [[0, 2, 4], [1, 3]]


def windows() -> list[list[PackRow]]:
    """Two slots with very different labels; a slot of one row; one row for all ranks; nothing supervised."""
    none = [replace(row, supervised=np.zeros(len(row.ids), dtype=bool)) for row in rows_of(0, 3, 5)]
    return [rows_of(0, 9, 1) + rows_of(1, 4, 2), rows_of(0, 5, 3) + rows_of(1, 1, 4), rows_of(0, 1, 6), none]


def shares(ranks: Ranks) -> list[tuple[dict[int, WindowLoss], dict[int, torch.Tensor]]]:
    """Losses and gradients of each window, added up over the ranks."""
    decoder = tiny_decoder()
    bank = bank_of(2, decoder)
    found = []
    for window in windows():
        losses = accumulate_window(decoder, bank, window, OPTIONS, ranks=ranks)
        flat = [slot.gradients_P for slot in bank.slots.values() if slot.gradients_P is not None]
        found.append((add_up(losses, flat, ranks), gradients(bank)))
    return found


def company(ranks: Ranks) -> dict[str, Any]:
    """Everything that the tests below ask of two ranks."""
    return {"shares": shares(ranks), "again": shares(ranks), "stops": stops(ranks)}


def stops(ranks: Ranks) -> dict[str, object]:
    """What becomes of requests to stop that reach one rank alone."""
    found: dict[str, object] = {}
    for name, at_once in (("at once", True), ("at a pass", False)):
        stop, passed, step = StopSignal(ranks), 0, -1
        stop.at_once = at_once
        try:
            for step in range(4):
                with stop.interruptible():
                    if step == 2 and ranks.number == 1:
                        stop.request()
                    passed += step == 2
        except StopNow:
            found[name] = (step, passed)
    stop = StopSignal(ranks)
    if ranks.first:  # while nothing may be dropped: remembered for the next time
        stop.request()
    try:
        with stop.interruptible():
            found["worked"] = True
    except StopNow:
        found["later"] = True
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return together(company, tmp_path_factory.mktemp("company"))


def test_p03_token_counts_of_all_ranks_are_summed_before_dividing(two: list[dict[str, Any]]) -> None:
    expected = shares(ALONE)
    for found in two:
        for (losses, flat), (expected_losses, expected_flat) in zip(found["shares"], expected, strict=True):
            assert losses.keys() == expected_losses.keys()
            for slot, loss in losses.items():
                assert replace(loss, loss=0.0) == replace(expected_losses[slot], loss=0.0)
                assert loss.loss == pytest.approx(expected_losses[slot].loss, abs=1e-6)
            for slot, gradient in flat.items():
                torch.testing.assert_close(gradient, expected_flat[slot], rtol=1e-5, atol=1e-6)


def test_all_ranks_have_the_same_bits_each_time(two: list[dict[str, Any]]) -> None:
    one, other = two
    for again in (one["again"], other["shares"], other["again"]):
        for (losses, flat), (same_losses, same_flat) in zip(one["shares"], again, strict=True):
            assert losses == same_losses
            assert all(torch.equal(flat[slot], same_flat[slot]) for slot in flat)


def test_p24_all_ranks_drop_the_same_work(two: list[dict[str, Any]]) -> None:
    first, second = (found["stops"] for found in two)
    # The rank that heard it drops its work in the middle; the other one when it is done with its own.
    assert (first["at once"], second["at once"]) == ((2, 1), (2, 0))
    assert (first["at a pass"], second["at a pass"]) == ((2, 1), (2, 1))
    assert first["later"] and second["later"]
    assert "worked" in second and "worked" not in first
