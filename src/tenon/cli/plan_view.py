"""A plan on screen: the summary, every choice with its reason, what was rejected.

This module does not know how a plan is made.
"""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tenon.plan.explain import ExplainRow, plan_rows
from tenon.plan.values import Choice, Plan

_ORIGIN_STYLES = {"derived": "green", "default": "dim"}


def show_plan(console: Console, plan: Plan, *, choices: bool = True) -> None:
    """The whole plan; without choices only the summary."""
    console.print(_summary(plan))
    if choices:
        console.print()
        console.print(choices_table(_row(choice) for choice in plan.choices if _worth_a_line(choice)))
    if plan.rejected:
        console.print()
    for rejection in plan.rejected:
        console.print(Text.assemble(("  not taken: ", "yellow"), rejection.what, (f" ({rejection.reason})", "dim")))


def choices_table(rows: Iterable[ExplainRow]) -> Table:
    """Choices as key, value, origin and reason."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("choice", no_wrap=True)
    table.add_column("value", overflow="fold", max_width=44)
    table.add_column("from", no_wrap=True)
    table.add_column("why", overflow="fold")
    for row in rows:
        origin = Text(row.origin, _ORIGIN_STYLES.get(row.origin, "cyan"))
        table.add_row(Text(row.key), Text(row.value, "bold"), origin, Text(row.reason, "dim"))
    return table


def _summary(plan: Plan) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    group = ""
    for row in plan_rows(plan):
        if row.group != group and group:
            table.add_row()
        group = row.group
        value = f"roughly {row.value}" if row.rough else row.value

        table.add_row(
            Text(row.what, "bold cyan" if row.group == "adapter" else "dim"), Text(value, "bold"), _dim(row.note)
        )
    return table


def _dim(text: str) -> Text:
    return Text(text, "dim")


def _row(choice: Choice) -> ExplainRow:
    return ExplainRow(key=choice.key, value=choice.value, origin=choice.origin, reason=choice.reason)


def _worth_a_line(choice: Choice) -> bool:
    """All that was asked or derived; plain defaults are for `tenon recipe explain`."""
    return choice.origin != "default"
