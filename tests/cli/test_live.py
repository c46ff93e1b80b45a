"""The live view: what events become in a terminal and elsewhere."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from tenon.cli.live import LiveView, PlainView, make_view, plain_line
from tenon.cli.progress_state import Event, WorkState, figure_text, sparkline


def step(number: int, *, slot: str = "demo", loss: float | str = 1.5) -> Event:
    return {
        "t": float(number), "kind": "step", "slot": slot, "step": number, "steps": 40, "loss": loss, "lr": 1e-3,
        "tokens": 500, "tokens_per_second": 1200.0, "memory_bytes": 2_000_000_000, "progress": number / 40,
        "seconds_left": 90.0,
    }  # fmt: skip


def plain(every_seconds: float = 10.0) -> tuple[PlainView, io.StringIO, list[float]]:
    """A plain view, what it wrote, and its clock."""
    file, now = io.StringIO(), [0.0]
    view = PlainView(Console(file=file, width=200), every_seconds=every_seconds, clock=lambda: now[0])
    return view, file, now


def test_plain_lines_come_every_few_seconds() -> None:
    view, file, now = plain()
    for number in range(1, 31):
        now[0] += 1.0
        view.take(step(number))
    assert [line.split()[1] for line in file.getvalue().splitlines()] == ["1/40", "11/40", "21/40"]


def test_a_plain_line_says_it_all() -> None:
    state = WorkState()
    state.take(step(10))
    assert plain_line(state) == (
        "step 10/40 (25%) loss 1.5000 lr 1.00e-03; 1,200 tokens/s, 1 min 30 s left, 2.0 GB memory"
    )


def test_a_change_of_phase_is_a_line() -> None:
    view, file, _ = plain()
    view.take({"kind": "phase", "name": "data", "detail": "train.jsonl"})
    view.take({"kind": "progress", "what": "tokenising rows", "done": 10, "total": 2000})
    view.take(step(1))
    view.take(step(2))
    view.take({"kind": "phase", "name": "evaluate"})
    assert file.getvalue().splitlines() == [
        "reading the data: train.jsonl",
        plain_line_of(step(1)),
        plain_line_of(step(1), step(2)),
        "evaluating",
    ]


def plain_line_of(*events: Event) -> str:
    state = WorkState()
    for event in events:
        state.take(event)
    return plain_line(state)


def test_quiet_still_warns() -> None:
    file = io.StringIO()
    with make_view(Console(file=file, width=200), quiet=True) as view:
        view.take(step(1))
        view.take({"kind": "validation", "slot": "demo", "step": 1, "loss": 0.5})
        view.take({"kind": "warning", "code": "x", "text": "a tracker failed"})
    assert file.getvalue() == "warning: a tracker failed\n"


def test_validations_are_lines() -> None:
    view, file, _ = plain()
    view.take(step(1))
    view.take({"kind": "validation", "slot": "demo", "step": 1, "best": True, "loss": 0.5123, "exact": 0.881})
    assert "validation, step 1: loss 0.5123, exact 88.1%" in file.getvalue()


def test_the_loss_is_smoothed_and_survives_a_nan() -> None:
    state = WorkState()
    for number, loss in enumerate([4.0, 2.0, "nan"], start=1):
        state.take(step(number, loss=loss))
    assert state.slots["demo"].loss == pytest.approx(3.0)
    assert state.slots["demo"].losses == [4.0, 2.0]


def test_slots_keep_their_own_figures() -> None:
    state = WorkState()
    state.take(step(3, slot="a", loss=1.0))
    state.take(step(3, slot="b", loss=2.0))
    assert plain_line(state).startswith("a step 3/40 (8%) loss 1.0000 lr 1.00e-03; b step 3/40 (8%) loss 2.0000")


def test_the_live_view_draws_a_bar_and_ends_with_a_line() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120, color_system=None)
    with LiveView(console) as view:
        view.take({"kind": "phase", "name": "train", "detail": "40 steps"})
        for number in range(1, 21):
            view.take(step(number))
        view.say("a note")
    text = file.getvalue()
    assert "a note" in text and "━" in text
    assert "step 20/40, loss 1.5000" in text.rstrip().splitlines()[-1]


GPU = {
    "t": 5.0, "kind": "gpu", "gpu": 0, "utilisation_percent": 97.0, "memory_used_bytes": 45_000_000_000,
    "power_watts": 412.3, "temperature_celsius": 61.0, "sm_clock_mhz": 1755.0, "throttled": "power cap",
}  # fmt: skip


def test_how_memory_is_used_is_a_line_of_its_own() -> None:
    view, file, _ = plain()
    view.take({"t": 1.0, "kind": "memory", "text": "keeps everything; 8,192 tokens at once", "step": None})
    # What was decided because memory ran out stands in the warning.
    view.take({"t": 2.0, "kind": "warning", "code": "train-memory-short", "text": "there was no memory left"})
    view.take({"t": 2.0, "kind": "memory", "text": "keeps less", "step": 12})
    lines = file.getvalue().splitlines()
    assert lines[0] == "memory: keeps everything; 8,192 tokens at once"
    assert [line for line in lines if "no memory left" in line] == ["warning: there was no memory left"]
    assert not any("keeps less" in line for line in lines)


def test_the_gpus_are_part_of_a_plain_line_but_no_reason_for_one() -> None:
    view, file, now = plain()
    view.take(step(1))
    now[0] = 60.0
    view.take(GPU)
    assert len(file.getvalue().splitlines()) == 1
    view.take(step(2))
    assert file.getvalue().splitlines()[-1].endswith("2.0 GB memory, GPU 97% busy")


def test_the_live_view_has_a_line_for_the_gpus() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120, color_system=None)
    with LiveView(console) as view:
        view.take(step(1))
        view.take(GPU)
        view.take({**GPU, "gpu": 1, "utilisation_percent": 91.0})
    assert "2 GPUs 91% to 97% busy, 90.0 GB, 825 W, 61 °C, 1,755 MHz, held back by power cap" in file.getvalue()


def test_sparklines() -> None:
    assert sparkline([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([5.0, math.nan, 5.0], 8) == "▁▁"
    assert len(sparkline([float(value) for value in range(1000)], 60)) == 60
    assert sparkline([], 10) == ""


def test_figures_for_people() -> None:
    assert figure_text("exact", 0.881) == "88.1%"
    assert figure_text("anything", 0.5, "share") == "50.0%"
    assert figure_text("loss", 0.51234, "nats/token") == "0.5123"
    assert figure_text("loss", math.nan) == "-"
