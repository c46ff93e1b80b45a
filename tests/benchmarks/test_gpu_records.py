"""Repetitions add up over calls: medians, what still is to be measured, merging, and taking results home."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.gpu.adopt import adopt
from benchmarks.gpu.machine import Machine, code_hash
from benchmarks.gpu.records import UNKNOWN, Records, Repetition, read_records, summarise
from benchmarks.gpu.table import apart, keys_of, least_rate, make_table, our_key, peer_key, report_rows, save, show
from benchmarks.gpu.works import WORKS, Work

MACHINE = Machine("a GPU", "1.2", {"torch": "2.11"})
OTHER = Machine("another GPU", "1.2", {"torch": "2.11"})
SMALL = next(work for work in WORKS if work.name == "8b-4x2048-nf4-small")
REAL = next(work for work in WORKS if work.name == "1b-banking77-bf16")
ONE, SLOTS = (next(work for work in WORKS if work.name == f"8b-8x2048-bf16{end}") for end in ("", "-slots"))


def made(key: tuple[str, str, str], rate: float, **changed: object) -> Repetition:
    """A repetition at so many tokens a second."""
    figures: dict[str, float | None] = {"tokens_s": rate, "peak_gb": 8.5, "first_s": 4.0}
    base = Repetition(*key, MACHINE.key, "code", "call 1", "2026-01-01T00:00:00", UNKNOWN, 30.0, figures)
    return replace(base, **changed)  # pyright: ignore[reportArgumentType]


def test_a_process_is_summed_up_by_its_median_step() -> None:
    figures = summarise({"tokens": [100, 300, 200], "seconds": [1.0, 1.0, 0.5], "first_s": 9.0, "peak_gb": 1.5})
    assert figures["tokens_s"] == 300 and figures["step_s"] == 1.0
    assert (figures["first_s"], figures["peak_gb"], figures["loss"]) == (9.0, 1.5, None)


def test_the_median_is_of_the_newest_machine_and_code() -> None:
    records, key = Records(), our_key(SMALL)
    for rate in (5.0, 100.0, 300.0, 200.0):
        records.add(made(key, rate, code="old" if rate == 5.0 else "code", date=f"at {rate}"), MACHINE)
    assert records.figure(key, "tokens_s") == 200.0 and len(records.standing(key)) == 3
    assert records.missing(key, repeat=3, machine=MACHINE.key, code="code") == 0
    assert records.missing(key, repeat=3, machine=MACHINE.key, code="newer") == 3
    assert records.missing(key, repeat=4, machine=MACHINE.key, code="code") == 1
    assert records.missing(peer_key(SMALL, SMALL.peers[0]), repeat=3, machine=MACHINE.key, code="code") == 3
    assert records.wall_seconds(key, 99.0) == 30.0 and records.wall_seconds(("x", "y", "z"), 99.0) == 99.0


def test_a_failure_is_not_tried_again_and_yields_to_a_success() -> None:
    records, key = Records(), our_key(SMALL)
    records.add(made(key, 0.0, figures={}, failed="out of memory"), MACHINE)
    assert records.missing(key, repeat=3, machine=MACHINE.key, code="code") == 0
    assert records.failure(key) == "out of memory" and records.figure(key, "tokens_s") is None
    records.add(made(key, 70.0, date="later"), MACHINE)
    assert records.failure(key) == "" and records.figure(key, "tokens_s") == 70.0


def test_files_merge_without_doubles(tmp_path: Path) -> None:
    key, first, second = our_key(SMALL), Records(), Records()
    one, two = made(key, 1.0), made(key, 3.0, date="2025-12-31T00:00:00", machine=OTHER.key)
    first.add(one, MACHINE)
    second.add(one, MACHINE)
    second.add(two, OTHER)
    for name, records in (("a", first), ("b", second)):
        save(tmp_path / f"{name}.json", records)
    merged = read_records(tmp_path / "a.json")
    merged.merge(read_records(tmp_path / "b.json"))
    assert merged.repetitions == [two, one] and merged.machines == {MACHINE.key: MACHINE, OTHER.key: OTHER}
    merged.drop([key])
    assert merged.repetitions == [] and merged.tree()["machines"] == {}
    assert read_records(tmp_path / "none.json") == Records()


def test_results_come_home_with_their_commit(tmp_path: Path) -> None:
    away, home = tmp_path / "away", tmp_path / "home"
    records, key = Records(), our_key(SMALL)
    records.add(made(key, 13_000.0, code="measured"), MACHINE)
    records.add(made(key, 13_000.0, code="something else", call="call 0"), MACHINE)
    save(away / "gpu_step.json", records)
    tree = {"name": "gpu_parity", "commit": UNKNOWN, "code": "measured", "rows": []}
    (away / "gpu_parity.json").write_text(json.dumps(tree))
    home.mkdir()
    written = adopt(away, home, "abc123", ("measured",))
    assert [path.name for path in written] == ["gpu_parity.json", "gpu_step.json"]
    assert [one.commit for one in read_records(home / "gpu_step.json").repetitions] == ["abc123", UNKNOWN]
    assert json.loads((home / "gpu_parity.json").read_text())["commit"] == "abc123"
    adopt(away, home, "abc123", ("measured",))
    assert len(read_records(home / "gpu_step.json").repetitions) == 2, "taken home twice is there once"


def test_bounds_follow_the_best_peer_and_the_other_work() -> None:
    records = Records()
    assert least_rate(records, REAL) is None and least_rate(records, SLOTS) is None
    for peer, rate in zip(REAL.peers, (10.0, 40.0, 20.0), strict=False):
        records.add(made(peer_key(REAL, peer), rate), MACHINE)
    records.add(made(our_key(ONE), 1080.0), MACHINE)
    assert least_rate(records, REAL) == 120.0
    assert least_rate(records, SLOTS) == pytest.approx(1000.0)
    assert least_rate(records, SMALL) == 12_500


def test_rows_carry_bounds_for_ours_alone() -> None:
    records = Records()
    records.add(made(our_key(SMALL), 13_000.0, figures={"tokens_s": 13_000.0, "peak_gb": 9.0}), MACHINE)
    records.add(made(peer_key(SMALL, SMALL.peers[1]), 10_501.0), MACHINE)
    rows = report_rows(records)
    assert [(row.value, row.bound, row.met) for row in rows] == [
        (13_000.0, ">= 12500", True),
        (9.0, "<= 8.6", False),
        (10_501.0, None, None),
        (8.5, None, None),
    ]
    assert "Unsloth" in rows[2].what and "its default" in rows[2].what


def text_of(records: Records, works: tuple[Work, ...] = WORKS) -> str:
    """The table as it is printed."""
    console = Console(width=220, file=io.StringIO(), record=True)
    show(console, records, works)
    return console.export_text()


def test_the_table_says_what_is_met_what_failed_and_what_was_not_interleaved() -> None:
    records = Records()
    records.add(made(our_key(SMALL), 13_000.0), MACHINE)
    records.add(made(peer_key(SMALL, SMALL.peers[0]), 0.0, figures={}, failed="out of memory"), MACHINE)
    records.add(made(peer_key(SMALL, SMALL.peers[1]), 10_501.0), MACHINE)
    assert make_table(records).row_count == 3 and len(keys_of(SMALL)) == 3
    said = text_of(records)
    assert "13,000" in said and ">= 12,500, <= 8.6 GB" in said and "yes" in said
    assert "failed: out of memory" in said and "a GPU, driver 1.2" in said
    assert apart(records) == []
    records.add(made(our_key(SMALL), 12_000.0, code="newer", call="call 2"), MACHINE)
    assert apart(records) == [SMALL.name]
    said = text_of(records)
    assert "NO" in said and "not measured in the same calls" in said


def test_code_is_known_by_names_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("1")
    first = code_hash(["*.py"], tmp_path)
    (tmp_path / "a.py").write_text("2")
    assert code_hash(["*.py"], tmp_path) != first
    with pytest.raises(ValueError, match="no file"):
        code_hash(["*.rs"], tmp_path)
