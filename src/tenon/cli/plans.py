"""`tenon plan` and `tenon recipe`: what would be done and why, before anything is loaded."""

from __future__ import annotations

from typing import Annotated

import typer

from tenon.cli.session import session_of, split_words

Words = Annotated[
    list[str],
    typer.Argument(metavar="RECIPE... [KEY=VALUE...]", help="Recipe files, and keys that differ from them."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable: one JSON document on standard output.")]

recipe_app = typer.Typer(help="What a recipe says and may say.", no_args_is_help=True, rich_markup_mode=None)


def plan(ctx: typer.Context, words: Words, as_json: AsJson = False) -> None:
    """Show what a recipe would do here, and why: nothing is loaded, nothing is written."""
    from tenon.cli.plan_view import show_plan
    from tenon.service.plans import make_plan

    session = session_of(ctx)
    recipes, overrides = split_words(words)
    planned = make_plan(recipes, overrides, session.settings)
    if as_json:
        session.write_json(planned.plan.model_dump(mode="json"))
    else:
        show_plan(session.out, planned.plan)


@recipe_app.command("explain")
def explain(ctx: typer.Context, words: Words, as_json: AsJson = False) -> None:
    """Show every value of a recipe with where it came from: the file, the command line, a default, a rule."""
    from tenon.cli.plan_view import choices_table
    from tenon.service import plans

    session = session_of(ctx)
    recipes, overrides = split_words(words)
    for recipe in recipes:
        rows = plans.explain(recipe, overrides, session.settings)
        if as_json:
            session.write_json([row.model_dump(mode="json") for row in rows])
        else:
            session.out.print(choices_table(rows))


@recipe_app.command("fields")
def fields(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List every field that a recipe may have, with its kind of value and what it means."""
    from rich.table import Table
    from rich.text import Text

    from tenon.recipe.fields import leaf_fields

    session = session_of(ctx)
    if as_json:
        session.write_json([field.model_dump(mode="json") for field in leaf_fields()])
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("field", no_wrap=True)
    table.add_column("value", overflow="fold", max_width=40)
    table.add_column("meaning", overflow="fold")
    for field in leaf_fields():
        key = Text(field.key, "bold") + Text(" (needed)" if field.required else "", "yellow")
        table.add_row(key, Text(field.kind, "cyan"), Text(field.description))
    session.out.print(table)
