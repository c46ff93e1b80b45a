"""Every recipe that is shipped can be planned on two cores."""

from __future__ import annotations

from pathlib import Path

import pytest

from tenon.plan.decide import decide
from tenon.plan.values import Plan
from tenon.recipe.load import load_recipe
from tests.conftest import REPOSITORY

from .situations import CPU, SIZE, base_of

RECIPES = sorted((REPOSITORY / "recipes").glob("*.yaml"))


def planned(path: Path) -> Plan:
    return decide(load_recipe(path), base=base_of(), machine=CPU, data_size=SIZE)


def test_all_of_them_were_found() -> None:
    assert [path.stem for path in RECIPES] == [
        "banking77",
        "half-an-hour",
        "lora-plus",
        "quickstart",
        "qv-small",
        "two-sources",
    ]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_planned(path: Path) -> None:
    plan = planned(path)
    assert plan.slots[0].name == path.stem
    assert plan.estimate.steps > 0


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem != "banking77"], ids=lambda path: path.stem)
def test_their_data_are_shipped_too(path: Path) -> None:
    slot = planned(path).slots[0]
    sources = (*slot.data.train, *slot.data.validation, *slot.evaluation.sources)
    assert sources
    assert all(Path(source.path).is_file() for source in sources)


def test_the_quickstart_has_ten_lines() -> None:
    text = (REPOSITORY / "recipes" / "quickstart.yaml").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 10


def test_banking77_asks_for_what_was_measured() -> None:
    slot = planned(REPOSITORY / "recipes" / "banking77.yaml").slots[0]
    assert (slot.lora.rank, slot.lora.alpha, len(slot.lora.sites)) == (16, 32.0, 210)
    assert (slot.optimizer.lr, slot.schedule.kind, slot.batch.rows, slot.limits.epochs) == (1e-3, "cosine", 32, 3.0)
    assert slot.data.heldout == 0.0
