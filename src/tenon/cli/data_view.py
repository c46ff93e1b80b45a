"""Data on screen: the report, rows with their supervised tokens in colour, the histogram of lengths.

Without colour supervised text stands between ⟦ and ⟧. This module does not know how rows are rendered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_BAR_COLUMNS = 40
_LABELS_SHOWN = 12


def show_row(console: Console, event: Mapping[str, Any]) -> None:
    """One row as training sees it."""
    marks = not console.is_terminal or console.no_color
    count = f"  {event['tokens']:,} tokens, {event['supervised']:,} supervised"
    console.print(Text.assemble((str(event["source"]), "bold"), (count, "dim")))
    console.print(row_text(event["pieces"], marks=marks), soft_wrap=True)
    console.print()


def row_text(pieces: Sequence[Sequence[Any]], *, marks: bool) -> Text:
    """The text of a row, supervised pieces in green; marks: neighbouring ones between ⟦ and ⟧ as well."""
    text = Text()
    inside = False
    for piece, supervised in pieces:
        if marks and supervised != inside:
            text.append("⟦" if supervised else "⟧")
        inside = bool(supervised)
        text.append(str(piece), style="bold green" if supervised else "dim")
    if marks and inside:
        text.append("⟧")
    return text


def show_report(console: Console, report: Mapping[str, Any]) -> None:
    """What became of every row, and the histogram of lengths."""
    table = Table.grid(padding=(0, 2))
    for source in report["sources"]:
        table.add_row(
            Text(f"  {source['role']} source", "dim"), Text(source["path"], "bold"), Text(_source_text(source))
        )
    for name, value in _counts(report):
        table.add_row(Text(f"  {name}", "dim"), Text(value), "")
    for drop in report["drops"]:
        places = f" ({', '.join(drop['places'])})" if drop["places"] else ""
        table.add_row(Text("  dropped", "yellow"), Text(f"{drop['rows']:,} rows"), Text(f"{drop['reason']}{places}"))
    console.print(table)
    for warning in report["warnings"]:
        console.print(Text.assemble(("  warning: ", "yellow"), warning), soft_wrap=True)
    if report["lengths"]:
        show_lengths(console, report["lengths"])
    for problem in report["problems"]:
        _show_problem(console, problem)


def show_lengths(console: Console, lengths: Mapping[str, Any]) -> None:
    """How many rows have how many tokens, and which are the longest."""
    edges, counts = lengths["edges"], lengths["counts"]
    most = max(counts, default=0)
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column()
    for index, count in enumerate(counts):
        bar = "█" * round(_BAR_COLUMNS * count / most) if most else ""
        label = f"  {edges[index]:,} to {edges[index + 1] - 1:,}"
        table.add_row(Text(label, "dim"), Text(f"{count:,}"), Text(bar or "▏" * bool(count), "cyan"))
    head = f"  tokens a row: mean {lengths['mean_tokens']:.1f}, median {lengths['median_tokens']:,}"
    console.print(Text(head))
    console.print(table)
    longest = ", ".join(f"{row['source']} ({row['tokens']:,})" for row in lengths["longest"][:3])
    if longest:
        console.print(Text.assemble(("  longest: ", "dim"), longest), soft_wrap=True)


def _source_text(source: Mapping[str, Any]) -> str:
    formats = "; ".join(f"{name}: {reason}" for name, reason in source["formats"])
    weight = f", {source['weight']:g} passes an epoch" if source["weight"] != 1 else ""
    return f"{source['rows_read']:,} rows read, {source['kept']:,} kept{weight} ({formats})"


def _counts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    supervised, tokens = report["train_supervised_tokens"], report["train_tokens"]
    share = f" ({supervised / tokens:.1%})" if tokens else ""
    pairs = [
        ("train", f"{report['train_rows']:,} rows, {tokens:,} tokens, {supervised:,} supervised{share}"),
        ("validation", f"{report['validation_rows']:,} rows" if report["validation_rows"] else "no rows"),
        ("repeated", f"{report['repeated']:,} rows" if report["repeated"] else ""),
        ("shared", f"{report['shared']:,} rows of train are in validation too" if report.get("shared") else ""),
        ("shortened", f"{report['shortened']:,} rows" if report["shortened"] else ""),
        ("labels", _labels_text(report["labels"])),
    ]
    return [(name, value) for name, value in pairs if value]


def _labels_text(labels: Sequence[str]) -> str:
    if not labels:
        return ""
    more = f", … and {len(labels) - _LABELS_SHOWN} more" if len(labels) > _LABELS_SHOWN else ""
    return f"{len(labels)}: {', '.join(labels[:_LABELS_SHOWN])}{more}"


def _show_problem(console: Console, problem: Mapping[str, Any]) -> None:
    console.print(Text.assemble((f"problem[{problem['code']}]", "bold red"), ": ", problem["what"]), soft_wrap=True)
    if problem.get("got"):
        console.print(Text.assemble(("  got:  ", "dim"), problem["got"]), soft_wrap=True)
    if problem.get("hint"):
        console.print(Text.assemble(("  hint: ", "dim"), (problem["hint"], "bold")), soft_wrap=True)
