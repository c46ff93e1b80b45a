"""What every command is given: the settings, where data go (stdout) and where everything else goes (stderr).

This module does not know any command.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from tenon.errors import UsageError
from tenon.settings import Settings

# Where output is no terminal nothing is known of its width: wide enough for a table that somebody greps.
_PIPE_COLUMNS = 160


@dataclass(frozen=True, slots=True)
class Session:
    """One command line. out: data, on standard output. err: progress and messages, on standard error."""

    settings: Settings
    out: Console
    err: Console

    def write_json(self, tree: Any) -> None:
        """One JSON document on standard output: a line of its own."""
        sys.stdout.write(json.dumps(tree, ensure_ascii=False) + "\n")
        sys.stdout.flush()


def make_session(settings: Settings) -> Session:
    """The session of this process. NO_COLOR is respected (by rich)."""
    return Session(settings, out=_console(stderr=False), err=_console(stderr=True))


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
    console = Console(stderr=stderr, highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console = Console(stderr=stderr, highlight=False, width=_PIPE_COLUMNS)
    return console
