"""Which runs there are, and which one a user means. This module does not know what is in a run."""

from __future__ import annotations

from pathlib import Path

from tenon.runs.folder import RunFolder
from tenon.runs.naming import find_run, list_runs
from tenon.runs.status import RunStatus, status

RUNS_ROOT = Path("runs")


def open_run(spec: str, root: Path = RUNS_ROOT) -> RunFolder:
    """The run that a user means. Raises RunError (see `find_run`)."""
    return find_run(spec, root)


def all_runs(root: Path = RUNS_ROOT) -> list[tuple[RunFolder, RunStatus]]:
    """The runs under a folder with their states, newest first."""
    return [(run, status(run)) for run in list_runs(root)]
