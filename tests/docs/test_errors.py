"""docs/errors.md has a section for every code that the package can raise, and none for others."""

from __future__ import annotations

import re
from pathlib import Path

from tenon.errors import TenonError

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE = REPOSITORY / "src" / "tenon"
AREAS = ("recipe", "plan", "base", "data", "access", "adapter", "run", "train", "usage")
# Exactly the words of a code, as a string of its own or in the entry's `error[…]`, which raises nothing.
CODE = re.compile(rf'"((?:{"|".join(AREAS)})-[a-z0-9]+(?:-[a-z0-9]+)*)"|error\[([a-z-]+)\]:')
# Words in that form that are no codes.
OTHER = {"base-model", "run-started"}


def codes_in_source() -> dict[str, str]:
    """code -> the first file that has it."""
    found: dict[str, str] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        for match in CODE.finditer(path.read_text(encoding="utf-8")):
            code = match[1] or match[2]
            if code.partition("-")[0] in AREAS and code not in OTHER:
                found.setdefault(code, path.name)
    return found


def documented() -> list[str]:
    return re.findall(
        r"^## (\S+)$", (REPOSITORY / "docs" / "errors.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )


def test_p27_every_code_is_documented_and_every_section_is_a_code() -> None:
    found = codes_in_source()
    assert len(found) > 120
    assert {code: file for code, file in found.items() if code not in documented()} == {}
    assert [code for code in documented() if code not in found] == []


def test_sections_are_sorted_by_area_and_name() -> None:
    names = documented()
    assert names == sorted(names, key=lambda name: (AREAS.index(name.partition("-")[0]), name))


def test_the_areas_are_those_of_the_tree() -> None:
    """Every direct kind of error, but for the request to stop, is an area."""
    kinds = {kind.__name__ for kind in TenonError.__subclasses__()} - {"StopRequestedError"}
    assert len(kinds) == len(AREAS)
