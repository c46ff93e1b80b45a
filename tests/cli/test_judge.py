"""`tenon eval`, `tenon compare`, `tenon data`, `tenon runs` and `tenon show` with the fake worker."""

from __future__ import annotations

import json
from pathlib import Path

from .conftest import Command, write_recipe


def test_the_base_alone_on_given_rows(tenon: Command) -> None:
    done = tenon("eval", "base", "--data", "rows.jsonl")
    assert done.status == 0 and "10.0%" in done.out and "40 rows; 95% intervals" in done.out
    assert "wrong: fake.jsonl:2" in done.out


def test_the_base_without_rows(tenon: Command) -> None:
    done = tenon("eval", "base")
    assert done.status == 2 and "error[usage-no-data]" in done.err


def test_records_are_written_and_compared(tenon: Command, workplace: Path) -> None:
    assert tenon("eval", "base", "--data", "rows.jsonl", "--out", "a.json").status == 0
    assert tenon("eval", "base", "--data", "rows.jsonl", "--out", "out/a.jsonl").status == 0
    records = [json.loads(line) for line in (workplace / "out/a.jsonl").read_text().splitlines()]
    assert len(records) == 40 and records[0]["subject"] == "base" and records[0]["source"] == "fake.jsonl:1"
    done = tenon("compare", "a.json", "a.json")
    assert done.status == 0 and "difference" in done.out
    tree = json.loads(tenon("compare", "a.json", "a.json", "--json").out)
    assert tree["rows"] == 40 and all(each["difference"] == 0 for each in tree["differences"])


def test_results_that_are_none(tenon: Command, workplace: Path) -> None:
    (workplace / "bad.json").write_text("{}")
    assert "error[run-damaged]" in tenon("compare", "bad.json", "bad.json").err
    assert "error[run-no-result]" in tenon("compare", "absent.json", "absent.json").err


def test_an_unfinished_run_cannot_be_judged(tenon: Command, workplace: Path) -> None:
    write_recipe(workplace, "fails-early")
    tenon("train", "fails-early.yaml", "-q")
    done = tenon("eval", "latest")
    assert done.status == 1 and "error[run-unfinished]" in done.err


def test_p12_data_shows_which_tokens_are_supervised(tenon: Command) -> None:
    done = tenon("data", "demo.yaml", "--rows", "2")
    assert done.status == 0
    assert "fake.jsonl:1  8 tokens, 4 supervised\n<user>question 0<assistant>⟦answer 0<end>⟧\n" in done.out
    assert "fake.jsonl:3" not in done.out
    assert "160 supervised (50.0%)" in done.out and "the row is longer than data.max_tokens" in done.out


def test_data_that_would_spoil_a_run_is_a_failure(tenon: Command, workplace: Path) -> None:
    write_recipe(workplace, "fails-data")
    done = tenon("data", "fails-data.yaml")
    assert done.status == 1 and "problem[data-no-supervised]" in done.out
    done = tenon("data", "fails-data.yaml", "--json")
    assert done.status == 1 and json.loads(done.out)[0]["report"]["problems"][0]["code"] == "data-no-supervised"


def test_runs_and_show(tenon: Command, workplace: Path) -> None:
    assert "no run under runs" in tenon("runs").err
    tenon("train", "demo.yaml", "-q")
    write_recipe(workplace, "fails-early")
    tenon("train", "fails-early.yaml", "-q")
    listed = tenon("runs").out
    assert "finished" in listed and "train-not-finite" in listed
    shown = tenon("show", "demo").out
    assert "loss of demo: █" in shown and "registered: demo@1" in shown and "90.0%" in shown
    tree = json.loads(tenon("show", "demo", "--json").out)
    assert tree["state"] == "finished" and tree["actual"]["steps"] == 20 and len(tree["losses"]["demo"]) == 20
    states = [run["state"] for run in json.loads(tenon("runs", "--json").out)]
    assert states == ["failed", "finished"]


def test_an_unknown_run(tenon: Command) -> None:
    assert "error[run-unknown]" in tenon("show", "latest").err
