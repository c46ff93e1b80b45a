"""Result files of benchmarks: whole, and shown with a mark on what falls short."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from benchmarks.report import RESULTS, Row, at_least, at_most, current_commit, installed_versions
from benchmarks.show import read_results, show

KEYS = {"name", "device", "date", "commit", "versions", "rows"}


def test_every_result_file_is_whole() -> None:
    results = read_results()
    assert len(results) == len(list(RESULTS.glob("*.json"))) >= 1
    for result in results:
        assert set(result) >= KEYS, result["name"]
        assert (RESULTS / f"{result['name']}.json").is_file() and result["rows"]
        for row in result["rows"]:
            assert set(row) == {"what", "value", "unit", "bound", "met"}
            assert (row["bound"] is None) == (row["met"] is None)


def test_bounds() -> None:
    assert at_most("error", 1e-5, "", 1e-5) == Row("error", 1e-5, "", "<= 1e-05", True)
    assert at_most("error", 2e-5, "", 1e-5).met is False
    assert (at_least("speed", 2.0, "times", 2).met, at_least("speed", 1.99, "times", 2).met) == (True, False)


def test_what_falls_short_is_marked(tmp_path: Path) -> None:
    rows = [{"what": "speed", "value": 1.5, "unit": "times", "bound": ">= 2", "met": False}]
    rows.append({"what": "rows", "value": 12345.0, "unit": "rows", "bound": None, "met": None})
    tree = {
        "name": "spine_x",
        "device": "two cores",
        "date": "2026-01-01",
        "commit": "abc",
        "versions": {},
        "rows": rows,
    }
    (tmp_path / "spine_x.json").write_text(json.dumps(tree))
    console = Console(record=True, width=120, file=(tmp_path / "out").open("w"))
    assert show(console, read_results(tmp_path)) == 1
    text = console.export_text()
    assert "SHORT" in text and "12,345" in text and "two cores" in text


def test_versions_and_commit_are_found() -> None:
    assert {"python", "torch", "transformers"} <= set(installed_versions())
    assert current_commit()
