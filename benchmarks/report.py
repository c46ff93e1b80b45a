"""The result file of a benchmark: rows with their bounds, and what they were measured on.

A script ends in `write("spine_logits", rows)`. This module measures nothing itself.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
PACKAGES = ("tenonlm", "torch", "transformers", "tokenizers", "safetensors", "gguf", "peft", "trl", "numpy")


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. bound: as text, `<= 1e-05`; None for a figure that is shown without one (met is None too)."""

    what: str
    value: float
    unit: str
    bound: str | None = None
    met: bool | None = None


def at_most(what: str, value: float, unit: str, bound: float) -> Row:
    """A figure that must not exceed its bound."""
    return Row(what, value, unit, f"<= {bound:g}", value <= bound)


def at_least(what: str, value: float, unit: str, bound: float) -> Row:
    """A figure that must reach its bound."""
    return Row(what, value, unit, f">= {bound:g}", value >= bound)


def write(name: str, rows: Sequence[Row], *, device: str | None = None, versions: dict[str, str] | None = None) -> Path:
    """Write benchmarks/results/NAME.json and return its path.

    device: what it ran on, this machine's processor when not given. versions: of what ran outside this environment.
    """
    path = RESULTS / f"{name}.json"
    write_tree(
        path,
        rows,
        device=device or describe_processor(),
        date=datetime.now(UTC).date().isoformat(),
        commit=current_commit(),
        versions={**installed_versions(), **(versions or {})},
    )
    return path


def write_tree(
    path: Path,
    rows: Sequence[Row],
    *,
    device: str,
    date: str,
    commit: str,
    versions: Mapping[str, str],
    more: Mapping[str, object] | None = None,
) -> None:
    """Write a result file, all of whose facts are given. more: what it keeps beside the rows."""
    tree = {
        "name": path.stem,
        "device": device,
        "date": date,
        "commit": commit,
        "versions": dict(versions),
        "rows": [asdict(row) for row in rows],
        **(more or {}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", "utf-8")


def describe_processor() -> str:
    """The processor's name and the cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if platform.system() == "Linux" else os.cpu_count() or 1
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    return f"{name}, {cores} cores"


def current_commit() -> str:
    """The short hash of the checkout, with `+` when the package differs from it; `unknown` outside a repository."""
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--", "src") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, those that are installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return done.stdout.strip()
