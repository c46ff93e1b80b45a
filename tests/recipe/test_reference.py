"""docs/recipe.md says what the schema says, and every error code of recipes and plans is documented and tested."""

from __future__ import annotations

import re

import pytest

from tenon.recipe.fields import leaf_fields
from tenon.recipe.load import parse_recipe
from tenon.recipe.reference import recipe_reference
from tests.conftest import REPOSITORY

CODE = re.compile(r'"((?:recipe|plan)-[a-z0-9-]+)"')


def codes() -> list[str]:
    sources = [path for area in ("recipe", "plan") for path in (REPOSITORY / "src" / "tenon" / area).glob("*.py")]
    return sorted({code for path in sources for code in CODE.findall(path.read_text(encoding="utf-8"))})


def test_the_reference_is_up_to_date() -> None:
    text = (REPOSITORY / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert text == recipe_reference(), "write tenon.recipe.reference.recipe_reference() to docs/recipe.md"


def test_every_field_is_in_the_reference() -> None:
    text = recipe_reference()
    assert all(f"| `{leaf.key}` |" in text for leaf in leaf_fields())


def test_the_example_of_the_reference_is_a_recipe() -> None:
    found = re.search(r"```yaml\n(.*?)```", recipe_reference(), re.DOTALL)
    assert found is not None
    path = REPOSITORY / "docs" / "my.yaml"
    assert parse_recipe(found[1], file=path, working_folder=REPOSITORY).recipe.base == "smollm2-135m"


def test_the_codes_were_found() -> None:
    assert len(codes()) == 34


@pytest.mark.parametrize("code", codes())
def test_every_code_is_documented_and_tested(code: str) -> None:
    assert f"\n## {code}\n" in (REPOSITORY / "docs" / "errors.md").read_text(encoding="utf-8")
    tests = [path for area in ("recipe", "plan") for path in (REPOSITORY / "tests" / area).glob("*.py")]
    assert any(code in path.read_text(encoding="utf-8") for path in tests)
