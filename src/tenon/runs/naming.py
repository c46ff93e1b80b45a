"""How runs are named and found: a default name that is free, and what a user may type to mean a run.

This module does not know what is in a run beyond its plan.json.
"""

from __future__ import annotations

import difflib
import re
from datetime import datetime
from pathlib import Path

from tenon.errors import RunError
from tenon.runs.folder import RunFolder

LATEST = "latest"


def default_run_folder(recipe_name: str, root: Path, *, now: datetime) -> Path:
    """`ROOT/NAME-20261122-142530`, with `-2`, `-3` … where that is taken. Nothing is created."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", recipe_name).strip("-.") or "run"
    stem = f"{plain[:60]}-{now:%Y%m%d-%H%M%S}"
    folder, number = root / stem, 2
    while folder.exists():
        folder, number = root / f"{stem}-{number}", number + 1
    return folder


def list_runs(root: Path) -> list[RunFolder]:
    """The runs directly under `root`, newest plan first."""
    if not root.is_dir():
        return []
    plans = [place / "plan.json" for place in root.iterdir() if (place / "plan.json").is_file()]
    # Plans are written once; runs planned in one second are told apart by name.
    plans.sort(key=lambda plan: (plan.stat().st_mtime_ns, plan.parent.name), reverse=True)
    return [RunFolder(plan.parent) for plan in plans]


def find_run(spec: str, root: Path) -> RunFolder:
    """The run that a user means: a path, a name under `root`, a prefix of just one such name, or `latest`.

    Raises RunError run-unknown (with the nearest name), run-ambiguous, run-missing, run-not-a-run.
    """
    if "/" in spec or spec in {".", ".."}:
        return RunFolder.open(Path(spec).expanduser())
    runs = list_runs(root)
    if spec == LATEST:
        if not runs:
            raise RunError("run-unknown", f"there is no run under {root}", hint="start one with `tenon train RECIPE`")
        return runs[0]
    names = [run.name for run in runs]
    if spec in names:
        return RunFolder.open(root / spec)
    matching = [name for name in names if spec and name.startswith(spec)]
    if len(matching) == 1:
        return RunFolder.open(root / matching[0])
    if matching:
        raise RunError(
            "run-ambiguous",
            f"{spec!r} is the beginning of {len(matching)} runs",
            got=", ".join(matching[:4]),
            hint="type more of the name, or `latest`",
        )
    if spec and Path(spec).is_dir():
        return RunFolder.open(Path(spec))
    near = difflib.get_close_matches(spec, names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise RunError("run-unknown", f"no run {spec!r} under {root}", hint=f"{hint}see the runs with `tenon runs`")
