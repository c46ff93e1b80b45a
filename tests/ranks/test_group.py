"""Ranks agree, move tensors, wait for the first, and end soon and with one error when one of them is gone."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tenon.errors import DataError, TenonError
from tenon.ranks.group import ALONE, Ranks
from tests.company import finish, start, together


def agree(ranks: Ranks) -> dict[str, Any]:
    own = torch.full((3,), float(ranks.number + 1))
    whole = torch.zeros(3 * ranks.count, dtype=torch.uint8)
    ranks.gather(whole, torch.full((3,), ranks.number + 7, dtype=torch.uint8)).wait()
    ranks.add_up([own])
    return {
        "largest": ranks.largest(float(ranks.number), 5.0),
        "sum": own,
        "whole": whole,
        "found": [ranks.first_finds(lambda n=n: {"from": ranks.number, "nan": float("nan"), "n": n}) for n in range(3)],
        "first": ranks.first,
    }


def gives_up(ranks: Ranks) -> str:
    """The first rank drops what it was to find, and one of the others does not even ask."""

    def find() -> None:
        raise KeyboardInterrupt

    told: object = "did not ask"
    try:
        if ranks.number < 2:
            told = ranks.first_finds(find)
    except KeyboardInterrupt:
        told = "gave up"
    ranks.largest(1.0)
    return f"{told}, then {ranks.first_finds(lambda: 'found')}"


def in_order(ranks: Ranks, place: str) -> tuple[float, float]:
    with ranks.first_goes_first():
        began = time.time()
        if ranks.first:
            time.sleep(0.3)
            Path(place).write_text("ready")
        assert Path(place).read_text() == "ready"
        return began, time.time()


def story(ranks: Ranks, place: str) -> dict[str, Any]:
    found = {"agree": agree(ranks), "gave up": gives_up(ranks), "order": in_order(ranks, place)}
    ranks.leave()
    return {**found, "left": (ranks.count, ranks.largest(float(ranks.number)), ranks.first_finds(lambda: ranks.number))}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("company")
    return together(story, folder, str(folder / "made"), count=3)


def test_ranks_agree_and_move_tensors(three: list[dict[str, Any]]) -> None:
    assert [one["agree"]["first"] for one in three] == [True, False, False]
    for found in (one["agree"] for one in three):
        assert found["largest"] == (2.0, 5.0)
        assert found["sum"].tolist() == [6.0] * 3
        assert found["whole"].tolist() == [7, 7, 7, 8, 8, 8, 9, 9, 9]
        assert [(told["from"], told["n"]) for told in found["found"]] == [(0, 0), (0, 1), (0, 2)]
        assert found["found"][0]["nan"] != found["found"][0]["nan"]


def test_nobody_waits_for_a_first_that_gave_up(three: list[dict[str, Any]]) -> None:
    assert [one["gave up"] for one in three] == ["gave up, then found", "None, then found", "did not ask, then found"]


def test_the_others_enter_when_the_first_has_left(three: list[dict[str, Any]]) -> None:
    first, second, third = (one["order"] for one in three)
    assert min(second[0], third[0]) >= first[1]


def test_who_has_left_is_alone(three: list[dict[str, Any]]) -> None:
    assert [one["left"] for one in three] == [(1, (0.0,), 0), (1, (1.0,), 1), (1, (2.0,), 2)]


def test_one_alone_is_its_own_company() -> None:
    own, whole = torch.ones(2), torch.zeros(2)
    ALONE.add_up([own])
    ALONE.gather(whole, own).wait()
    assert ALONE.largest(1.0, -2.0) == (1.0, -2.0)
    assert own.tolist() == whole.tolist() == [1.0, 1.0]
    assert ALONE.first_finds(lambda: 3) == 3
    with ALONE.first_goes_first():
        assert (ALONE.first, ALONE.count) == (True, 1)


def note(ranks: Ranks, folder: str, error: TenonError) -> None:
    (Path(folder) / f"error-{ranks.number}").write_text(f"{error.code}|{error.what}|{error.hint}")


def loses_one(ranks: Ranks, folder: str, word: bool) -> None:
    """Rank 1 ends, with a word or without; rank 0 notices when they are to agree."""
    ranks.largest(1.0)
    if ranks.number == 1 and word:
        ranks.part(DataError("data-row-broken", "rows.jsonl:3 is broken", hint="mend it"))
    if ranks.number == 1:
        os._exit(17)
    try:
        for _ in range(1000):
            ranks.largest(1.0)
    except TenonError as error:
        note(ranks, folder, error)
        # Gloo may abort a process that tears Python down while its peer is gone; that is not asked here.
        os._exit(3)


@pytest.mark.parametrize("word", [False, True])
def test_a_lost_rank_ends_the_others_with_its_error_or_one_of_their_own(tmp_path: Path, word: bool) -> None:
    company = start(loses_one, tmp_path, str(tmp_path), word)
    assert finish(company) < 30
    assert [process.exitcode for process in company] == [3, 17]
    code, what, hint = (tmp_path / "error-0").read_text().split("|")
    if word:
        assert (code, what, hint) == ("data-row-broken", "rank 1: rows.jsonl:3 is broken", "mend it")
    else:
        assert (code, what) == ("train-rank-lost", "another rank of this run is gone")
        assert "tenon resume RUN" in hint


def hangs(ranks: Ranks) -> None:
    ranks.largest(1.0)
    if ranks.number == 0:
        os._exit(17)
    time.sleep(600)


def test_a_rank_that_hangs_while_another_is_gone_is_ended_from_outside(tmp_path: Path) -> None:
    company = start(hangs, tmp_path)
    assert finish(company, seconds=60) < 30
    assert [process.exitcode for process in company] == [17, 9]
