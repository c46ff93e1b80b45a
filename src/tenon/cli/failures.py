"""How an error is shown: code, what, got, hint, in one form everywhere. This module does not know who raised it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tenon.errors import EXIT_RESUME, TenonError

if TYPE_CHECKING:
    from rich.console import Console


def show_error(console: Console, error: TenonError) -> None:
    """The one form of every error: code, what, got, hint."""
    from rich.text import Text

    word, style = ("stopped", "bold yellow") if error.exit_status == EXIT_RESUME else ("error", "bold red")
    console.print(Text.assemble((f"{word}[{error.code}]", style), ": ", error.what), soft_wrap=True)
    if error.got:
        console.print(Text.assemble(("  got:  ", "dim"), error.got), soft_wrap=True)
    console.print(Text.assemble(("  hint: ", "dim"), (error.hint, "bold")), soft_wrap=True)
