"""ARCHITECTURE.md names what exists, on the floors that the import contract holds; decisions name every dependency."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "ARCHITECTURE.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_path_exists() -> None:
    paths = re.findall(r"`([\w./-]+/[\w./-]*)`", PAGE)
    assert len(paths) >= 25
    for path in paths:
        assert (REPOSITORY / path).exists() or (REPOSITORY / "src" / "tenon" / path).exists(), path


def test_the_floors_are_those_of_the_import_contract() -> None:
    contract = next(c for c in PROJECT["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    floors = [tuple(part.strip() for part in layer.split("|")) for layer in contract["layers"]]
    table = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", PAGE, flags=re.MULTILINE)
    assert [tuple(re.findall(r"\w+", row)) for row in table] == floors
    for name in (name for floor in floors for name in floor):
        package = REPOSITORY / "src" / "tenon" / name
        assert package.is_dir() or package.with_suffix(".py").is_file(), name


def test_the_modules_of_the_pipeline_exist() -> None:
    row = next(line for line in PAGE.splitlines() if line.startswith("| `pipeline` |"))
    names = re.findall(r"`(\w+)`", row)[1:]
    assert len(names) == 5
    assert all((REPOSITORY / "src" / "tenon" / "pipeline" / f"{name}.py").is_file() for name in names)


def test_from_the_command_to_the_loss_are_at_most_six_files_with_these_functions() -> None:
    frames = re.findall(r"^\d\. `([^`]+)` `([^`]+)`", PAGE, flags=re.MULTILINE)
    assert 1 <= len(frames) <= 6
    for path, name in frames:
        tree = ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))
        named = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert set(name.split(".")) <= named, f"{path} {name}"
    assert "loss_and_gradient(" in (REPOSITORY / frames[-1][0]).read_text(encoding="utf-8")


def test_every_dependency_has_its_reason() -> None:
    page = (REPOSITORY / "docs" / "decisions" / "dependencies.md").read_text(encoding="utf-8")
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *(one for group in extras.values() for one in group)]
    names = {name[0] for one in wanted if (name := re.match(r"[\w-]+", one))}
    assert len(names) >= 25
    assert not [name for name in sorted(names) if f"`{name}`" not in page]


@pytest.mark.parametrize("heading", ["**Context.**", "**Decision.**"])
def test_every_decision_says_its_context_and_is_listed(heading: str) -> None:
    folder = REPOSITORY / "docs" / "decisions"
    pages = sorted(set(folder.glob("*.md")) - {folder / "README.md", folder / "dependencies.md"})
    listed = re.findall(r"\]\(([\w-]+\.md)\)", (folder / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted([page.name for page in pages] + ["dependencies.md"]) and len(pages) >= 10
    for page in pages:
        assert heading in page.read_text(encoding="utf-8"), page.name
        assert "**Alternatives.**" in page.read_text(encoding="utf-8"), page.name
