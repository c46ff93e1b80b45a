"""`tenon data`: what training would see of the data, before any training."""

from __future__ import annotations

from typing import Annotated

import typer

from tenon.cli.plans import AsJson, Words
from tenon.cli.session import session_of, split_words
from tenon.errors import EXIT_ERROR


def data(
    ctx: typer.Context,
    words: Words,
    rows: Annotated[int, typer.Option("--rows", min=0, help="How many rows to show.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Show the data as training sees it: counts, what was dropped and why, lengths, rows with supervised tokens marked.

    Supervised text is green; without colour it stands between ⟦ and ⟧. The exit status is 1 when something would spoil
    a run.
    """
    from rich.text import Text

    from tenon.cli.data_view import show_report, show_row
    from tenon.cli.live import make_view
    from tenon.service.inspection import inspect_data
    from tenon.service.plans import make_plan

    session = session_of(ctx)
    recipes, overrides = split_words(words)
    plan = make_plan(recipes, overrides, session.settings).plan
    shown: list[dict[str, object]] = []
    with make_view(session.err, quiet=as_json) as view:
        for event in inspect_data(plan, rows, session.settings):
            if event["kind"] in ("report", "row"):
                shown.append(event)
            else:
                view.take(event)
    reports = [event for event in shown if event["kind"] == "report"]
    if as_json:
        session.write_json([{key: value for key, value in event.items() if key != "t"} for event in shown])
    for event in shown if not as_json else ():
        if event["kind"] == "row":
            show_row(session.out, event)
    for event in reports if not as_json else ():
        session.out.print(Text(f"data of {event['slot']}", "bold"))
        report = event["report"]
        assert isinstance(report, dict)
        show_report(session.out, report)
    if any(isinstance(event["report"], dict) and event["report"]["problems"] for event in reports):
        raise typer.Exit(EXIT_ERROR)
