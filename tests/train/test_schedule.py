"""The learning rate over a run: the formulas at their edges, and beside transformers' schedulers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from tenon.adapters.bank import AdapterBank
from tenon.train.schedule import factor
from tests.tiny import CPU, tiny_decoder
from tests.train.world import Asked, make_slot, schedule_plan, some_rows

KINDS = ("constant", "linear", "cosine", "cosine_restarts", "wsd")


def factors(asked: Asked, rows: int = 40) -> list[float]:
    """The factor of every step of a slot's run."""
    decoder = tiny_decoder()
    training = make_slot(decoder, AdapterBank(decoder.facts, dtype=torch.float32, device=CPU), asked, some_rows(rows))
    found = []
    while training.window():
        found.append(training.learning_factor())
        training.advance(1.0)
    return found


def theirs(name: str, steps: int, warmup: int, **options: object) -> list[float]:
    """The factor of every step by transformers' scheduler."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(name, optimizer, warmup, steps, scheduler_specific_kwargs=options or None)
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        ("linear", "linear", {}),
        ("cosine", "cosine", {}),
        ("cosine_restarts", "cosine_with_restarts", {"num_cycles": 3}),
        ("constant", "constant_with_warmup", {}),
    ],
)
@pytest.mark.parametrize(("steps", "warmup"), [(20, 0), (20, 1), (20, 5), (50, 7)])
def test_after_the_warm_up_steps_have_the_rates_of_transformers(
    kind: str, name: str, options: dict[str, object], steps: int, warmup: int
) -> None:
    """In the warm-up ours are one step ahead: (k + 1) / w where transformers has k / w, so that no step has rate 0."""
    plan = schedule_plan(kind, warmup=warmup / steps, cycles=3)
    ours, expected = factors(Asked(steps=steps, schedule=plan)), theirs(name, steps, warmup, **options)
    assert len(ours) == steps
    assert ours[warmup:] == pytest.approx(expected[warmup:], abs=1e-9)
    assert ours[:warmup] == pytest.approx([(k + 1) / warmup for k in range(warmup)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_warm_up_shorter_than_a_step_has_no_effect(kind: str) -> None:
    decay = 0.2 if kind == "wsd" else 0.0
    found = factors(Asked(steps=10, schedule=schedule_plan(kind, warmup=0.01, decay=decay)))
    assert found[0] == 1.0 and found[1] <= 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_all_warm_up_ends_at_the_peak(kind: str) -> None:
    found = factors(Asked(steps=4, schedule=schedule_plan(kind, warmup=1.0, floor=0.1)))
    assert found == pytest.approx([0.25, 0.5, 0.75, 1.0])


@given(
    kind=st.sampled_from(KINDS),
    warmup=st.floats(0, 0.5),
    decay=st.floats(0, 0.5),
    cycles=st.integers(1, 5),
    floor=st.floats(0, 1),
    x=st.floats(-1, 2),
)
def test_after_the_warm_up_the_factor_lies_between_floor_and_one(
    kind: str, warmup: float, decay: float, cycles: int, floor: float, x: float
) -> None:
    found = factor(schedule_plan(kind, warmup=warmup, decay=decay, cycles=cycles, floor=floor), x)
    assert 0.0 <= found <= 1.0 + 1e-12
    if x >= warmup:
        assert found >= floor - 1e-12


@pytest.mark.parametrize("kind", ["linear", "cosine", "cosine_restarts", "wsd"])
def test_the_end_of_a_run_is_the_floor(kind: str) -> None:
    plan = schedule_plan(kind, warmup=0.1, decay=0.3 if kind == "wsd" else 0.0, cycles=3, floor=0.05)
    assert factor(plan, 1.0) == pytest.approx(0.05)


def test_wsd_holds_the_peak_and_then_falls_in_a_line() -> None:
    plan = schedule_plan("wsd", warmup=0.1, decay=0.5)
    assert [factor(plan, x) for x in (0.1, 0.3, 0.5)] == [1.0, 1.0, 1.0]
    assert [factor(plan, x) for x in (0.6, 0.75, 0.9)] == pytest.approx([0.8, 0.5, 0.2])
    assert [factor(schedule_plan("wsd"), x) for x in (0.0, 0.5, 1.0)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("cycles", range(1, 8))
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.1])
def test_every_cycle_begins_at_the_peak(cycles: int, warmup: float) -> None:
    """Also where rounding puts the border a hair below the whole number."""
    plan = schedule_plan("cosine_restarts", warmup=warmup, cycles=cycles)
    for cycle in range(cycles):
        border = warmup + (1.0 - warmup) * cycle / cycles
        for x in (border, math.nextafter(border, 1.0)):
            assert factor(plan, x) == pytest.approx(1.0)
        assert factor(plan, border + (1.0 - warmup) * 0.999 / cycles) < 0.01


def test_windows_of_tokens_and_time_limits_warm_up_too() -> None:
    """The first step of a run whose steps nobody knows beforehand has a rate above zero."""
    by_tokens = factors(Asked(tokens=30, epochs=2, schedule=schedule_plan("linear", warmup=0.2)))
    assert by_tokens[0] > 0.0 and max(by_tokens) == 1.0
    by_time = factors(Asked(minutes=0.5, schedule=schedule_plan("constant", warmup=0.1)))
    assert len(by_time) == 30 and by_time[3:] == [1.0] * 27
