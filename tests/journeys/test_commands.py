"""The real commands over the real worker, on a tiny base: train, look, judge, talk, keep."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.journeys.world import World, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world with one finished run, `runs/first`, registered as echo@1."""
    made = make_world(tmp_path_factory.mktemp("commands") / "world")
    done = made.tenon("train", "recipe.yaml", "limits.epochs=1", "run=runs/first")
    assert done.returncode == 0, done.stderr
    assert "registered echo@1" in done.stdout and "tenon chat echo" in done.stderr
    assert "exact" in done.stdout and "95%" in done.stdout
    return made


def test_p12_data_marks_exactly_what_the_assistant_said(world: World) -> None:
    done = world.tenon("data", "recipe.yaml", "--rows", "4")
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("⟦") or "⟦" in line]
    assert len(rows) == 4
    assert all(row.startswith("⟦") and "<|im_end|>" in row and row.count("⟦") == 1 for row in rows)


def test_p32_show_holds_the_plan_against_what_it_took(world: World) -> None:
    tree = json.loads(world.tenon("show", "first", "--json").stdout)
    assert tree["state"] == "finished" and tree["registered"] == ["echo@1"]
    assert tree["actual"]["steps"] == len(tree["losses"]["echo"]) > 10
    assert tree["actual"]["memory_bytes"] > 1e6 and tree["actual"]["seconds"] > 0
    assert tree["planned"]["steps"] > 0


def test_the_run_and_the_registered_adapter_are_judged_alike(world: World) -> None:
    by_run = world.tenon("eval", "runs/first", "--metric", "loss", "--json", "--out", "run.json")
    by_name = world.tenon("eval", "echo", "--metric", "loss", "--json", "--out", "name.json")
    assert by_run.returncode == by_name.returncode == 0, by_run.stderr + by_name.stderr
    losses = [
        [metric["value"] for result in json.loads(done.stdout)["results"] for metric in result["metrics"]]
        for done in (by_run, by_name)
    ]
    assert losses[0] == losses[1] and losses[0][0] != losses[0][1]
    compared = world.tenon("compare", "run.json", "name.json", "--json")
    assert all(each["difference"] == 0 for each in json.loads(compared.stdout)["differences"])


def test_held_out_rows_are_what_a_run_is_judged_on(world: World) -> None:
    """Without --data the run's own validation rows are used: a tenth, not the rows that it learned."""
    done = world.tenon("eval", "runs/first", "--metric", "loss", "--alone", "--out", "own.jsonl")
    assert done.returncode == 0, done.stderr
    assert len((world.root / "own.jsonl").read_text().splitlines()) == 12


def test_a_chat_switches_adapters_over_one_base(world: World) -> None:
    lines = ("the house", "/reset", "/adapter echo", "the house", "/reset", "/adapter none", "the house")
    said = [word for line in lines for word in ("--say", line)]
    done = world.tenon("chat", "--base", "base", "--max-new-tokens", "8", *said)
    assert done.returncode == 0, done.stderr
    # An untrained base may say line breaks: an answer is what follows its label.
    answers = [part.split("\nyou: ")[0].partition(": ") for part in done.stdout.split("you: the house\n")[1:]]
    labels, texts = [answer[0] for answer in answers], [answer[2].rstrip("\n") for answer in answers]
    assert labels == ["base", "echo@1", "base"]
    assert texts[0] == texts[2]


def test_generate_answers_a_file(world: World) -> None:
    (world.root / "prompts.txt").write_text("the house\n\nthe lake\n")
    done = world.tenon(
        "generate", "echo", "--input", "prompts.txt", "--output", "answers.jsonl", "--max-new-tokens", "4"
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in (world.root / "answers.jsonl").read_text().splitlines()]
    assert [answer["source"] for answer in answers] == ["prompts.txt:1", "prompts.txt:3"]
    assert all(answer["tokens"] <= 4 for answer in answers)


def test_an_exported_adapter_is_judged_like_the_registered_one(world: World) -> None:
    shutil.rmtree(world.root / "out", ignore_errors=True)
    assert world.tenon("adapters", "export", "echo", "out").returncode == 0
    both = world.tenon(
        "compare", "echo", "out", "--data", "rows.jsonl", "--rows", "4", "--metric", "loss", "--base", "base", "--json"
    )
    assert both.returncode == 0, both.stderr
    assert all(each["difference"] == 0 for each in json.loads(both.stdout)["comparison"]["differences"])


def test_p18_an_adapter_is_refused_on_another_base(world: World, tmp_path: Path) -> None:
    other = make_world(tmp_path / "other", rows=1)
    weights = other.root / "base" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    done = world.tenon("chat", "echo", "--base", str(other.root / "base"), "--say", "hi")
    assert done.returncode == 1 and "error[adapter-other-base]" in done.stderr
