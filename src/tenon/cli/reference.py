"""The command reference, made from the commands themselves: `python -m tenon.cli.reference` prints docs/cli.md.

This module does not know what the commands do.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption
from typer.main import get_command

from tenon.cli.app import app

_HEAD = """# The command line

Made from the commands themselves by `python -m tenon.cli.reference`; a test holds it equal to them.

Data go to standard output, everything else (progress, messages, errors) to standard error. `--json` makes output
machine-readable. `NO_COLOR` is respected. `--debug`, anywhere on the line, shows tracebacks.

| exit status | it means |
|---|---|
| 0 | done |
| 1 | failed; `docs/errors.md` explains every code |
| 2 | the recipe or the command line is at fault |
| 75 | stopped and saved: `tenon resume RUN` goes on |
| 130 | interrupted where there was nothing to save |

| variable | it means |
|---|---|
| `TENON_HOME` | the registry and all that is meant to last; `~/.tenon` |
| `TENON_CACHE` | what can be made again: prepared bases, tokenised data; `TENON_HOME/cache` |
| `TENON_OFFLINE` | `1`: never ask a hub |
| `TENON_THREADS` | CPU threads for arithmetic; all cores by default |
| `TENON_DEBUG` | `1`: show tracebacks |
"""


def reference() -> str:
    """The whole reference as Markdown."""
    parts = [_HEAD]
    for name, command in _commands("tenon", get_command(app)):
        parts += [_section(name, command)]
    return "\n".join(parts)


def _commands(name: str, command: object) -> Iterator[tuple[str, TyperCommand]]:
    """(full name, command) of every command that does something, in the order of the help."""
    if isinstance(command, TyperGroup):
        for child_name, child in command.commands.items():
            yield from _commands(f"{name} {child_name}", child)
    elif isinstance(command, TyperCommand):
        yield name, command


def _section(name: str, command: TyperCommand) -> str:
    arguments = [param for param in command.params if isinstance(param, TyperArgument)]
    options = [param for param in command.params if isinstance(param, TyperOption) and not param.is_eager]
    words = [name, *(_placeholder(argument) for argument in arguments), "[OPTIONS]" if options else ""]
    lines = [f"## `{' '.join(word for word in words if word)}`", "", _paragraphs(command.help or ""), ""]
    rows = [(f"`{argument.metavar}`", argument.help or "") for argument in arguments]
    rows += [(_flags(option), _option_text(option)) for option in options]
    if rows:
        lines += ["| | |", "|---|---|", *(f"| {left} | {right} |" for left, right in rows), ""]
    return "\n".join(lines)


def _placeholder(argument: TyperArgument) -> str:
    name = argument.metavar or str(argument.name).upper()
    return name if argument.required or name.startswith("[") else f"[{name}]"


def _flags(option: TyperOption) -> str:
    value = "" if option.is_flag else " …"
    return ", ".join(f"`{flag}{value}`" for flag in option.opts)


def _option_text(option: TyperOption) -> str:
    text = option.help or ""
    if option.required:
        return f"{text} Needed."
    plain = option.default not in (None, False, "") and not callable(option.default)
    return f"{text} Default: {option.default}." if plain else text


def _paragraphs(text: str) -> str:
    """Docstring paragraphs, each on a line of its own."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n")).strip()


if __name__ == "__main__":
    sys.stdout.write(reference())
