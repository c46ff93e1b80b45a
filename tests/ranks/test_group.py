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


def test_ranks_agree(tmp_path: Path) -> None:
    found = together(agree, tmp_path, count=3)
    assert [one["first"] for one in found] == [True, False, False]
    for one in found:
        assert one["largest"] == (2.0, 5.0)
        assert one["sum"].tolist() == [6.0] * 3
        assert one["whole"].tolist() == [7, 7, 7, 8, 8, 8, 9, 9, 9]
        assert [(told["from"], told["n"]) for told in one["found"]] == [(0, 0), (0, 1), (0, 2)]
        assert one["found"][0]["nan"] != one["found"][0]["nan"]


def test_one_alone_is_its_own_company() -> None:
    own, whole = torch.ones(2), torch.zeros(2)
    ALONE.add_up([own])
    ALONE.gather(whole, own).wait()
    assert ALONE.largest(1.0, -2.0) == (1.0, -2.0)
    assert own.tolist() == whole.tolist() == [1.0, 1.0]
    assert ALONE.first_finds(lambda: 3) == 3
    with ALONE.first_goes_first():
        assert (ALONE.first, ALONE.count) == (True, 1)


def in_order(ranks: Ranks, place: str) -> tuple[float, float]:
    with ranks.first_goes_first():
        began = time.time()
        if ranks.first:
            time.sleep(0.3)
            Path(place).write_text("ready")
        assert Path(place).read_text() == "ready"
        return began, time.time()


def test_the_others_enter_when_the_first_has_left(tmp_path: Path) -> None:
    first, second, third = together(in_order, tmp_path / "work", str(tmp_path / "made"), count=3)
    assert min(second[0], third[0]) >= first[1]


def lonely(ranks: Ranks) -> tuple[int, tuple[float, ...]]:
    ranks.leave()
    return ranks.count, ranks.largest(float(ranks.number))


def test_who_has_left_is_alone(tmp_path: Path) -> None:
    assert together(lonely, tmp_path) == [(1, (0.0,)), (1, (1.0,))]


def note(ranks: Ranks, folder: str, error: TenonError) -> None:
    (Path(folder) / f"error-{ranks.number}").write_text(f"{error.code}|{error.what}|{error.hint}")


def loses_one(ranks: Ranks, folder: str, lost: int) -> None:
    ranks.largest(1.0)
    if ranks.number == lost:
        os._exit(17)
    try:
        for _ in range(1000):
            ranks.largest(1.0)
    except TenonError as error:
        note(ranks, folder, error)
        raise SystemExit(3) from error


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_rank_ends_the_others_at_once(tmp_path: Path, lost: int) -> None:
    company = start(loses_one, tmp_path, str(tmp_path), lost)
    assert finish(company) < 40
    assert [process.exitcode for process in company] == ([17, 3] if lost == 0 else [3, 17])
    code, what, hint = (tmp_path / f"error-{1 - lost}").read_text().split("|")
    assert (code, what) == ("train-rank-lost", "another rank of this run is gone")
    assert "tenon resume RUN" in hint


def says_why(ranks: Ranks, folder: str) -> None:
    ranks.largest(1.0)
    if ranks.number == 1:
        ranks.say_why(DataError("data-row-broken", "rows.jsonl:3 is broken", hint="mend it"))
        os._exit(1)
    try:
        ranks.largest(1.0)
    except TenonError as error:
        note(ranks, folder, error)


def test_the_error_that_ended_a_rank_is_the_error_of_the_run(tmp_path: Path) -> None:
    company = start(says_why, tmp_path, str(tmp_path))
    finish(company)
    assert (tmp_path / "error-0").read_text() == "data-row-broken|rank 1: rows.jsonl:3 is broken|mend it"


def hangs(ranks: Ranks) -> None:
    ranks.largest(1.0)
    if ranks.number == 1:
        os._exit(17)
    time.sleep(600)


def test_a_rank_that_hangs_while_another_is_gone_is_ended_from_outside(tmp_path: Path) -> None:
    company = start(hangs, tmp_path)
    assert finish(company, seconds=60) < 40
    assert [process.exitcode for process in company] == [9, 17]


def gives_up(ranks: Ranks) -> object:
    def find() -> object:
        raise KeyboardInterrupt

    try:
        return ranks.first_finds(find)
    except KeyboardInterrupt:
        return "gave up"


def test_nobody_waits_for_a_first_that_gave_up(tmp_path: Path) -> None:
    assert together(gives_up, tmp_path) == ["gave up", None]
