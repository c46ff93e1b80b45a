"""A slot's own state: what is the best, when patience ends, which rows are passed over."""

from __future__ import annotations

import math

import pytest
import torch

from tenon.adapters.bank import AdapterBank
from tenon.errors import DataError
from tenon.train.slot import Best, SlotTraining
from tenon.train.windows import Cursor
from tests.tiny import CPU, tiny_decoder
from tests.train.world import Asked, MemoryRows, make_slot, some_rows


def slot_of(asked: Asked, rows: MemoryRows | None = None) -> SlotTraining:
    decoder = tiny_decoder()
    bank = AdapterBank(decoder.facts, dtype=torch.float32, device=CPU)
    return make_slot(decoder, bank, asked, rows or some_rows(8))


def judged(training: SlotTraining, values: list[float], *, higher: bool = False) -> list[bool]:
    """Judge values at steps 1, 2, …"""
    found = []
    for step, value in enumerate(values, start=1):
        training.cursor = Cursor(step, 0)
        found.append(training.judge(value, higher_is_better=higher))
    return found


def test_patience_counts_validations_without_improvement_and_begins_anew() -> None:
    training = slot_of(Asked(steps=99, patience=2))
    assert judged(training, [1.0, 1.2, 0.9, 0.9]) == [True, False, True, False]
    assert training.best == Best(0.9, 3, since=1) and not training.ended
    training.cursor = Cursor(5, 0)
    assert not training.judge(0.95, higher_is_better=False)
    assert training.ended == "early stop" and training.progress == 1.0 and training.window() == []


def test_without_patience_a_run_never_stops_early() -> None:
    training = slot_of(Asked(steps=99))
    judged(training, [1.0] * 20)
    assert training.ended == "" and training.best == Best(1.0, 1, since=19)


def test_an_improvement_is_more_than_min_delta() -> None:
    training = slot_of(Asked(steps=99, patience=5, min_delta=0.1))
    assert judged(training, [0.5, 0.55, 0.61, 0.7], higher=True) == [True, False, True, False]


def test_nan_is_never_the_best() -> None:
    training = slot_of(Asked(steps=99, patience=3))
    assert judged(training, [math.nan, 2.0, math.nan, 1.0]) == [False, True, False, True]
    assert training.best == Best(1.0, 4)


def test_infinity_is_improved_on() -> None:
    assert judged(slot_of(Asked(steps=9)), [math.inf, 3.0]) == [True, True]


def test_validation_is_due_every_so_many_steps_and_at_the_end_and_once() -> None:
    training = slot_of(Asked(steps=5, every=2))
    due = []
    while training.window():
        training.advance(1.0)
        due.append(training.validation_due)
        training.validated = training.cursor.step if training.validation_due else training.validated
        assert not training.validation_due
    assert due == [False, True, False, True, True] and training.ended == "done"


def test_dropped_rows_are_passed_over_and_counted() -> None:
    rows = some_rows(8, empty=[0, 1, 4])
    training = slot_of(Asked(rows=2, epochs=1), rows)
    sizes = []
    while window := training.window():
        sizes.append(len(window))
        training.advance(0.0)
    assert sum(sizes) == 5 and training.cursor.rows == 8
    assert training.ended == "done" and sorted(rows.asked) == list(range(8))


@pytest.mark.parametrize("limits", [{"steps": 3}, {"epochs": 1.0}, {"epochs": 0.5}, {"minutes": 1.0}, {"steps": 2}])
@pytest.mark.parametrize("cut", [{"rows": 3}, {"tokens": 50}])
def test_p08_a_run_whose_rows_are_all_dropped_says_so_and_ends(limits: dict[str, float], cut: dict[str, int]) -> None:
    training = slot_of(Asked(**limits, **cut), some_rows(7, empty=range(7)))  # type: ignore[arg-type]
    with pytest.raises(DataError) as caught:
        training.window()
    assert caught.value.code == "data-no-supervised" and "slot one" in caught.value.what


def test_a_window_is_the_same_when_it_is_taken_again() -> None:
    """A stop in the middle of a step leaves the cursor where it was."""
    training = slot_of(Asked(rows=3, epochs=1, seed=5), some_rows(9, empty=[2]))
    first = [(row.index, row.draw, row.ids.tolist()) for row in training.window()]
    again = [(row.index, row.draw, row.ids.tolist()) for row in training.window()]
    assert first == again
