"""docs/cli.md is made from the commands and equal to them; every variable that it names is read."""

from __future__ import annotations

import re
from pathlib import Path

from tenon.cli.reference import reference

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_reference_is_up_to_date() -> None:
    written = (REPOSITORY / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == reference(), "make it again: python -m tenon.cli.reference > docs/cli.md"


def test_the_reference_has_every_command() -> None:
    names = re.findall(r"^## `(tenon [a-z ]+)", reference(), flags=re.MULTILINE)
    commands = {" ".join(name.split()) for name in names}
    assert len(commands) == 30
    assert {"tenon train", "tenon resume", "tenon recipe explain", "tenon adapters export"} <= commands


def test_the_variables_are_those_that_are_read() -> None:
    source = (REPOSITORY / "src" / "tenon" / "settings.py").read_text(encoding="utf-8")
    read = set(re.findall(r'"(TENON_\w+)"', source)) - {"TENON_WORKER"}  # the fake worker is for tests
    assert set(re.findall(r"`(TENON_\w+)` \|", reference())) == read
