"""The list of runs on screen. This module does not know what is in a run."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from tenon.runs.folder import RunFolder
from tenon.runs.status import RunState, RunStatus
from tenon.units import format_count, format_seconds

STATE_STYLES = {
    RunState.PLANNED: "dim",
    RunState.RUNNING: "bold green",
    RunState.STOPPED: "yellow",
    RunState.FAILED: "bold red",
    RunState.FINISHED: "green",
    RunState.DEAD: "red",
}


def runs_table(runs: Sequence[tuple[RunFolder, RunStatus]]) -> Table:
    """One run a line."""
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    for head in ("run", "state", "step", "checkpoint", "last event", "note"):
        table.add_column(head, no_wrap=head != "note")
    for run, state in runs:
        table.add_row(
            Text(run.name, "bold"),
            Text(state.state, STATE_STYLES[state.state]),
            format_count(state.step),
            "-" if state.checkpoint_step is None else format_count(state.checkpoint_step),
            "-" if state.updated is None else f"{format_seconds(int(max(0.0, time.time() - state.updated)))} ago",
            Text(run_note(run, state), "dim"),
        )
    return table


def status_tree(run: RunFolder, state: RunStatus) -> dict[str, Any]:
    """A run's status for JSON."""
    return {"path": str(run.path), **dataclasses.asdict(state)}


def run_note(run: RunFolder, state: RunStatus) -> str:
    if state.state is RunState.RUNNING:
        return f"process {state.pid} on {state.host}"
    if state.state in (RunState.STOPPED, RunState.DEAD):
        return f"go on: tenon resume {run.path}"
    return state.reason
