"""The commands by name. Each lives in a module that imports what it needs only when it runs, so that help is instant.

This module does not know what the commands do.
"""

from __future__ import annotations

from typing import Annotated

import typer

from tenon.cli import adapters, chat, data, doctor, judge, keys, plans, runs, serve, train

app = typer.Typer(
    name="tenon",
    help="A self-hosted LoRA works: data set in, served adapter out.",
    epilog="Every error has a code that docs/errors.md explains. Exit statuses: 0 done, 1 failed, 2 recipe or command "
    "line at fault, 75 stopped and saved (tenon resume), 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        print(f"tenon {metadata.version('tenonlm')}")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere on the command line.")
    ] = False,
) -> None:
    """A self-hosted LoRA works: data set in, served adapter out."""


app.command("plan")(plans.plan)
app.add_typer(plans.recipe_app, name="recipe")
app.command("doctor")(doctor.doctor)
app.command("data")(data.data)
app.command("train")(train.train)
app.command("resume")(train.resume)
app.command("runs")(runs.runs)
app.command("show")(runs.show)
app.command("eval")(judge.evaluate)
app.command("compare")(judge.compare)
app.command("chat")(chat.chat)
app.command("generate")(chat.generate)
app.command("serve")(serve.serve)
app.add_typer(adapters.adapters_app, name="adapters")
app.add_typer(keys.keys_app, name="keys")
