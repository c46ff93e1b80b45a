"""`tenon plan` and `tenon recipe`: everything before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

from tenon.plan.values import Plan
from tenon.recipe.fields import leaf_fields

from .conftest import Command


def test_a_plan_says_what_and_why(tenon: Command, workplace: Path) -> None:
    done = tenon("plan", "demo.yaml", "lora.rank=8")
    assert done.status == 0 and done.err == ""
    for words in (
        "210 of 210 matrices",
        "about ten times full fine-tuning",
        "command line",
        "roughly 20",
        "trainable",
        "memory",
        "% of the base",
    ):
        assert words in done.out, words
    assert not (workplace / "runs").exists()


def test_a_plan_as_json_is_the_plan(tenon: Command) -> None:
    done = tenon("plan", "demo.yaml", "lora.rank=8", "--json")
    plan = Plan.model_validate(json.loads(done.out))
    assert plan.slots[0].lora.rank == 8 and plan.estimate.train_rows in range(200, 251)


def test_explain_shows_every_field_with_its_origin(tenon: Command) -> None:
    done = tenon("recipe", "explain", "demo.yaml", "lora.rank=8", "--json")
    rows = {row["key"]: row for row in json.loads(done.out)}
    assert {field.key for field in leaf_fields()} <= set(rows)
    assert rows["lora.rank"]["origin"] == "command line" and rows["limits.steps"]["reason"] == "demo.yaml:6"
    table = tenon("recipe", "explain", "demo.yaml").out
    assert all(key in table for key in rows)


def test_fields_lists_every_field(tenon: Command) -> None:
    done = tenon("recipe", "fields")
    assert len(leaf_fields()) > 50
    assert all(field.key in done.out for field in leaf_fields())
