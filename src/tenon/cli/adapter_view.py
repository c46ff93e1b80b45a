"""Registered adapters on screen. This module does not know where they are kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tenon.cli.result_view import metric_text
from tenon.plan.values import Generation
from tenon.registry.aliases import Alias
from tenon.registry.entry import Entry
from tenon.registry.entry_files import TEMPLATE_NAME
from tenon.units import format_bytes, format_short


def entries_table(entries: Sequence[Entry]) -> Table:
    """One version a line."""
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    told = any(entry.generation.said for entry in entries)
    for head in ("adapter", "base", "rank", "parameters", "judged", *(["asked with"] if told else []), "registered"):
        table.add_column(head, no_wrap=head not in ("judged", "asked with"))
    for entry in entries:
        judged = ", ".join(f"{metric.name} {metric_text(metric)}" for metric in entry.metrics[:1])
        table.add_row(
            Text(entry.label, "bold"),
            entry.base_spec,
            str(entry.rank),
            format_short(entry.parameters),
            Text(judged or "-"),
            *([Text(describe_generation(entry.generation) or "-")] if told else []),
            Text(_when(entry), "dim"),
        )
    return table


def aliases_table(aliases: Mapping[str, Alias]) -> Table:
    """One alias a line, with what it stood for last."""
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    guarded = any(alias.guard is not None for alias in aliases.values())
    back = any(alias.rolled_back is not None for alias in aliases.values())
    more = (["guard"] if guarded else []) + (["rolled back"] if back else [])
    for head in ("alias", "version", "before", "since", *more):
        table.add_column(head, no_wrap=head != "rolled back")
    for name, alias in aliases.items():
        before = alias.before[0].describe() if alias.before else "-"
        guard = "-" if alias.guard is None else alias.guard.describe()
        table.add_row(
            Text(name, "bold"),
            Text(alias.target.describe()),
            Text(before, "dim"),
            Text(_moment(alias.target.since), "dim"),
            *([Text(guard, "dim")] if guarded else []),
            *([Text(_rolled_back(alias))] if back else []),
        )
    return table


def _rolled_back(alias: Alias) -> str:
    back = alias.rolled_back
    return "-" if back is None else f"from {back.left.describe()} at {_moment(back.at)}: {back.reason}"


def show_entry(console: Console, entry: Entry, folder: Path) -> None:
    """One version: what it is, what it was made of, how it was judged."""
    unknown = "unknown: made elsewhere"
    pairs = [
        ("adapter", entry.label),
        ("files", f"{folder} ({format_bytes(entry.size_bytes)})"),
        ("lora", f"rank {entry.rank}, alpha {entry.alpha:g}, scale {entry.scale:g}"),
        ("adapts", f"{entry.matrices} matrices ({', '.join(entry.targets)}), {entry.parameters:,} parameters"),
        ("registered", _when(entry)),
        ("run", entry.run or unknown),
        ("started from", entry.parent or "nothing: a fresh adapter"),
        ("base", f"{entry.base_spec}  {entry.base_hash}"),
        ("base kept in", {None: unknown, "dense": "full width"}.get(entry.base_format, entry.base_format)),
        ("data", entry.data_hash or unknown),
        ("template", _template(entry) or unknown),
        ("recipe", entry.recipe_hash or unknown),
        ("system", "none" if entry.system is None else entry.system),
        *([("asked with", describe_generation(entry.generation))] if entry.generation.said else []),
        ("adapter hash", entry.adapter_hash),
    ]
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(Text(name, "dim"), Text(value))
    for metric in entry.metrics:
        table.add_row(Text(metric.name, "dim"), Text(metric_text(metric), "bold"))
    console.print(table)


def describe_generation(generation: Generation) -> str:
    """`temperature 0.2, stop "END"`; empty where it says nothing."""
    return ", ".join(f"{name} {_shown(value)}" for name, value in generation.said.items())


def _shown(value: float | tuple[str, ...]) -> str:
    if isinstance(value, tuple):
        return " ".join(json.dumps(text, ensure_ascii=False) for text in value)
    return f"{value:g}"


def _template(entry: Entry) -> str:
    own = entry.beside.get(TEMPLATE_NAME)
    known = entry.template_hash or ("" if own is None else own.sha256)
    return known if own is None else f"{known}  its own, kept with it"


def _when(entry: Entry) -> str:
    return _moment(entry.created)


def _moment(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds).astimezone():%Y-%m-%d %H:%M}"
