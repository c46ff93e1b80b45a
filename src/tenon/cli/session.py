"""What every command is given: the settings, where data go (stdout) and where everything else goes (stderr).

This module does not know any command.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tenon.errors import UsageError
from tenon.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console

# Where output is no terminal nothing is known of its width: wide enough for a table that somebody greps.
_PIPE_COLUMNS = 160


class Session:
    """One command line. Consoles are made when something is printed: help does without them. rich respects NO_COLOR."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @cached_property
    def out(self) -> Console:
        """Data: standard output."""
        return _console(stderr=False)

    @cached_property
    def err(self) -> Console:
        """Progress and messages: standard error."""
        return _console(stderr=True)

    def write_json(self, tree: Any) -> None:
        """One JSON document on standard output: a line of its own."""
        sys.stdout.write(json.dumps(tree, ensure_ascii=False) + "\n")
        sys.stdout.flush()


def session_of(ctx: typer.Context) -> Session:
    """The session that a command runs in."""
    session = ctx.obj
    assert isinstance(session, Session)
    return session


def split_words(words: Sequence[str]) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Recipes and overrides of a command line: a word with `=` that is no file is an override.

    Raises UsageError usage-no-recipe.
    """
    files: list[Path] = []
    overrides: list[str] = []
    for word in words:
        if "=" in word and not Path(word).exists():
            overrides.append(word)
        else:
            files.append(Path(word))
    if not files:
        raise UsageError(
            "usage-no-recipe",
            "no recipe was named",
            got=" ".join(words),
            hint="name a recipe file first: tenon plan recipes/quickstart.yaml lora.rank=32",
        )
    return tuple(files), tuple(overrides)


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console = Console(stderr=stderr, highlight=False, width=_PIPE_COLUMNS)
    return console
