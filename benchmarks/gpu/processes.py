"""Measuring processes under a time budget: each is started, watched, and its one `RESULT` line read.

This module does not know what is measured.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUT_OF_TIME = "out of time"
_MARK = "RESULT "
# Lines that say why a process ended are short enough for a table's footnote.
_REASON_CHARS = 160


@dataclass(slots=True)
class Budget:
    """Seconds that a call may take, from now on; 0 for no limit."""

    seconds: float
    started: float = 0.0

    def __post_init__(self) -> None:
        self.started = time.monotonic()

    @property
    def left(self) -> float:
        """Seconds until it is used up, never below zero."""
        if not self.seconds:
            return float("inf")
        return max(0.0, self.seconds - (time.monotonic() - self.started))

    def allows(self, seconds: float) -> bool:
        """Whether something that takes so long may still begin."""
        return self.left >= seconds


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a process came to: the tree that it printed, or why it printed none; and when and how long it ran."""

    result: dict[str, Any] | None
    failed: str
    began_at: float
    wall_s: float


def run(
    command: Sequence[str], *, environment: Mapping[str, str], folder: Path, log: Path, timeout: float | None
) -> Outcome:
    """Run one process in a folder; everything that it says goes to the end of the log.

    timeout: seconds after which it is killed and counts as failed; None waits.
    """
    began_at, started = time.time(), time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(
            command,
            env=dict(environment),
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
        said, status = done.stdout, done.returncode
    except subprocess.TimeoutExpired as late:
        said, status = _text(late.stdout), None
    wall_s = round(time.monotonic() - started, 2)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"--- {' '.join(command)}\n{said}\n--- status {status}, {wall_s} s\n")
    result = find_result(said) if status == 0 else None
    failed = "" if result is not None else reason(said, status)
    return Outcome(result, failed, began_at, wall_s)


def find_result(said: str) -> dict[str, Any] | None:
    """The tree of the last line that begins with RESULT; None when there is none."""
    lines = [line for line in said.splitlines() if line.startswith(_MARK)]
    return json.loads(lines[-1].removeprefix(_MARK)) if lines else None


def reason(said: str, status: int | None) -> str:
    """Why a process failed, in one line: out of memory, out of time, or the last line that names an error."""
    if status is None:
        return OUT_OF_TIME
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if any("out of memory" in line or "OutOfMemoryError" in line for line in lines):
        return "out of memory"
    errors = [line for line in lines if "Error" in line.partition(" ")[0]]
    last = (errors or lines or ["no output"])[-1]
    return f"status {status}: {last[:_REASON_CHARS]}"


def _text(said: str | bytes | None) -> str:
    return said.decode("utf-8", "replace") if isinstance(said, bytes) else said or ""
