"""The works of the GPU benchmark are the table that the project set itself, and their specs reach the processes."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from benchmarks.gpu.step import choose, systems, turns
from benchmarks.gpu.works import SHAPES, SLOT_RANKS, WORKS, peer_spec, spec_of
from benchmarks.ours.contact import facts_of
from benchmarks.ours.step import parse_spec

# (shape, rows, tokens of a row, base) -> (tokens/s at least, GB at most)
TABLE = {
    ("8b", 4, 2048, "bf16"): [(19_000, 50)],
    ("8b", 4, 2048, "fp8"): [(28_000, 46)],
    # The base is kept in nf4 either way; small memory is measured as the plan computes there, with fp8 products.
    ("8b", 4, 2048, "nf4"): [(20_000, 39)],
    ("8b", 4, 2048, "nf4-fp8"): [(12_500, 8.6), (20_000, 39)],
    ("1b", 16, 64, "bf16"): [(36_000, None)],
    ("1b", 4, 2048, "bf16"): [(95_000, None)],
    ("1b", 4, 2048, "fp8"): [(125_000, None)],
    ("8b", 1, 2048, "bf16"): [(15_000, 80)],
    ("8b", 16, 512, "bf16"): [(19_500, 80)],
    ("8b", 2, 8192, "bf16"): [(16_500, 80)],
    ("8b", 1, 2048, "fp8"): [(18_500, 80)],
    ("8b", 16, 512, "fp8"): [(28_000, 80)],
    ("8b", 2, 8192, "fp8"): [(22_000, 80)],
}


def test_works_are_the_table() -> None:
    found: dict[tuple[str, int, int, str], list[tuple[float, float | None]]] = {}
    for work in WORKS:
        if work.at_least is not None:
            key = (work.shape, work.rows, work.row_tokens, work.base)
            found.setdefault(key, []).append((work.at_least, work.at_most_gb))
    assert found == TABLE
    relative = {work.name: (work.of_best_peer, work.of_work) for work in WORKS if work.at_least is None}
    assert relative == {
        "1b-banking77-bf16": (3.0, None),
        "8b-8x2048-bf16": (None, None),
        "8b-8x2048-bf16-slots": (None, ("8b-8x2048-bf16", pytest.approx(1 / 1.08))),
    }
    assert len({work.name for work in WORKS}) == len(WORKS) == 17


def test_slots_share_the_stream_with_the_low_rank_work_of_one() -> None:
    slots, one = (next(w for w in WORKS if w.name == f"8b-8x2048-bf16{end}") for end in ("-slots", ""))
    assert slots.rows * slots.row_tokens == one.rows * one.row_tokens == 16_384
    assert len(set(SLOT_RANKS)) == len(SLOT_RANKS) == slots.rows == 8
    assert sum(SLOT_RANKS) / len(SLOT_RANKS) == one.ranks[0] == 16


def test_shapes_are_the_models_that_they_are_named_after() -> None:
    assert facts_of(SHAPES["8b"]).parameters == 8_030_261_248  # Llama-3.1-8B
    assert facts_of(SHAPES["1b"]).parameters == 1_235_814_400  # Llama-3.2-1B


def test_a_spec_survives_the_command_line() -> None:
    for work in WORKS:
        spec = spec_of(work, device="cuda", rows_folder="/rows")
        assert parse_spec(json.dumps(asdict(spec))) == spec
        assert (spec.rows_file == "/rows/banking77.npz") == (work.row_tokens == 0)
        for peer in work.peers:
            theirs = peer_spec(spec, peer, "/base")
            assert (theirs.rows, theirs.row_tokens, theirs.steps) == (spec.rows, spec.row_tokens, spec.steps)
            assert theirs.peer["mode"] == peer.mode and theirs.memory_gb is None


def test_every_peer_of_a_work_has_settings_of_its_own() -> None:
    for work in WORKS:
        keys = [key for key, _ in systems(work, "")]
        assert len(set(keys)) == len(keys) == 1 + len(work.peers)


def test_works_and_systems_are_chosen_by_name() -> None:
    assert [work.name for work in choose("8b-8x2048-bf16")] == ["8b-8x2048-bf16"]
    assert [work.name for work in choose("8x2048,16x64")] == ["1b-16x64-bf16", "8b-8x2048-bf16", "8b-8x2048-bf16-slots"]
    assert len(choose("")) == len(WORKS)
    with pytest.raises(SystemExit, match="no work is named so"):
        choose("13b")
    work = choose("8b-4x2048-bf16")[0]
    assert [peer and peer.mode for _, peer in systems(work, "ours,unsloth")] == [None, "unsloth", "unsloth"]
    with pytest.raises(SystemExit, match="no system is named axolotl"):
        systems(work, "axolotl")


def test_ours_and_peers_take_turns() -> None:
    work = choose("8b-4x2048-nf4-small")[0]
    order = [(turn.number, turn.peer and turn.peer.mode) for turn in turns([work], 2, "")]
    assert order == [(0, None), (0, "peft4"), (0, "unsloth4"), (1, None), (1, "peft4"), (1, "unsloth4")]
