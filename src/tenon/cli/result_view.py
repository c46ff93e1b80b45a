"""Results on screen: metrics with intervals, two results side by side, and the sentence that says what differs.

This module does not know how anything was measured.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tenon.cli.progress_state import figure_text
from tenon.runs.results import Comparison, Metric, Result

_EXAMPLE_COLUMNS = 60


def show_results(console: Console, results: Sequence[Result]) -> None:
    """One column a result, one row a metric; intervals below the figures they belong to."""
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="bold")
    table.add_column("metric", style="dim", no_wrap=True)
    for result in results:
        table.add_column(result.subject, no_wrap=True)
    names = list(dict.fromkeys(metric.name for result in results for metric in result.metrics))
    for name in names:
        table.add_row(name, *(_cell(result, name) for result in results))
    console.print(table)
    rows = {len(result.examples) for result in results}
    console.print(Text(f"  {', '.join(f'{count:,}' for count in sorted(rows))} rows; 95% intervals", "dim"))


def show_comparison(console: Console, comparison: Comparison) -> None:
    """The differences with their intervals, then the plain sentence."""
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="bold")
    for head in ("metric", comparison.a, comparison.b, "difference", "95% interval"):
        table.add_column(head, no_wrap=True)
    for difference in comparison.differences:
        style = "green" if difference.significant else "dim"
        table.add_row(
            Text(difference.name, "dim"),
            figure_text(difference.name, difference.a),
            figure_text(difference.name, difference.b),
            Text(_signed(difference.name, difference.difference), style),
            Text(f"{_signed(difference.name, difference.low)} … {_signed(difference.name, difference.high)}", "dim"),
        )
    console.print(table)
    console.print(Text(comparison.sentence, "bold"), soft_wrap=True)


def show_examples(console: Console, result: Result, *, wrong: int = 3) -> None:
    """The first rows that the subject got wrong, so that a figure can be believed."""
    shown = [example for example in result.examples if example.got is not None and example.scores.get("exact") == 0.0]
    for example in shown[:wrong]:
        console.print(Text.assemble(("  wrong: ", "yellow"), f"{example.source} ", (_short(example.prompt), "dim")))
        console.print(Text(f"    expected {_short(example.expected)}"))
        console.print(Text(f"    got      {_short(example.got or '')}"))


def metric_text(metric: Metric) -> str:
    """`88.1% (85.0% … 91.2%)`; the interval is left out where there is none."""
    value = figure_text(metric.name, metric.value, metric.unit)
    if metric.low == metric.high:
        return value
    low = figure_text(metric.name, metric.low, metric.unit)
    high = figure_text(metric.name, metric.high, metric.unit)
    return f"{value} ({low} … {high})"


def _cell(result: Result, name: str) -> str:
    return next((metric_text(metric) for metric in result.metrics if metric.name == name), "-")


def _signed(name: str, value: float) -> str:
    return ("+" if value > 0 else "") + figure_text(name, value)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _EXAMPLE_COLUMNS else line[: _EXAMPLE_COLUMNS - 1] + "…"
