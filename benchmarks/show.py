"""Print every figure of benchmarks/results and mark what falls short: `make figures`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.report import RESULTS


def read_results(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All result files, by name."""
    return [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]


def figure(value: float) -> str:
    """A value as people read it."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def mark(met: bool | None) -> str:
    """What stands in the last column."""
    return {None: "", True: "ok", False: "SHORT"}[met]


def show(console: Console, results: list[dict[str, Any]]) -> int:
    """Print one table a file; returns how many figures fall short."""
    short = 0
    for result in results:
        table = Table(title=f"{result['name']} ({result['date']}, commit {result['commit']})", title_justify="left")
        for name in ("what", "value", "unit", "bound", ""):
            table.add_column(name, justify="right" if name == "value" else "left")
        for row in result["rows"]:
            style = "bold red" if row["met"] is False else None
            bound = row["bound"] or ""
            table.add_row(row["what"], figure(row["value"]), row["unit"], bound, mark(row["met"]), style=style)
            short += row["met"] is False
        console.print(table)
        console.print(result["device"], style="dim", highlight=False)
        console.print()
    return short


def main() -> int:
    """Print all; exit status 0 whether or not something falls short: the marks are for people."""
    console = Console()
    results = read_results()
    if not results:
        console.print(f"no results in {RESULTS}: run one, for example python -m benchmarks.spine_logits")
        return 0
    short = show(console, results)
    rows = sum(len(result["rows"]) for result in results)
    console.print(f"{rows} figures in {len(results)} files, {short} short of their bound")
    return 0


if __name__ == "__main__":
    sys.exit(main())
