"""README and guide, in both languages: every command in them exists with its options, and both show the same."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tenon.cli.app import app

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = ("README", "docs/guide")
GROUPS = ("recipe", "adapters")


def fenced(page: str, language: str) -> list[str]:
    """The lines of every fenced block of one language, without comments, blanks and alignment."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    blocks = re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = [re.split(r"\s*(?:^|\s)# ?", line)[0].rstrip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def tenon_commands() -> list[str]:
    """Every command line of Tenon in the four pages."""
    pages = [f"{page}{language}.md" for page in PAGES for language in ("", ".zh-CN")]
    return [line for page in pages for line in fenced(page, "sh") if line.startswith("tenon ")]


def options_of(words: list[str]) -> set[str]:
    """The options that the help of a command lists; the words name the command and go on with its arguments."""
    names = words[: 2 if words[0] in GROUPS else 1]
    shown = CliRunner().invoke(app, [*names, "--help"])
    assert shown.exit_code == 0, f"tenon {' '.join(names)}: {shown.output}"
    return set(re.findall(r"--[a-z][a-z-]*", shown.output))


def test_every_command_of_the_pages_exists_with_its_options() -> None:
    lines = tenon_commands()
    assert len(lines) >= 50
    for line in lines:
        words = shlex.split(line)[1:]
        known = options_of(words)
        unknown = [word for word in words if word.startswith("--") and word.split("=")[0] not in known]
        assert unknown == [], line


@pytest.mark.parametrize("page", PAGES)
def test_both_languages_show_the_same_commands_headings_and_tables(page: str) -> None:
    shapes = []
    for name in (f"{page}.md", f"{page}.zh-CN.md"):
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        headings = [line.split()[0] for line in text.splitlines() if re.match(r"#{1,4} ", line)]
        rows = [line.count("|") for line in text.splitlines() if line.startswith("|")]
        blocks = {language: fenced(name, language) for language in ("sh", "yaml", "text", "python")}
        shapes.append((headings, rows, blocks))
    assert len(shapes[0][0]) >= 7
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("page", [f"{page}{language}.md" for page in PAGES for language in ("", ".zh-CN")])
def test_every_file_that_a_page_links_to_exists(page: str) -> None:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if not target.startswith("http")]
    assert len(targets) >= 2
    assert [target for target in targets if not ((REPOSITORY / page).parent / target).exists()] == []
