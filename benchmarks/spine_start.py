"""How long commands take that need no model, and that they import no torch: `python -m benchmarks.spine_start`."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.report import Row, at_most, write
from tenon.settings import Settings, child_environment

COMMANDS = (("--help",), ("adapters", "list"), ("runs",), ("recipe", "fields"))
REPEATS = 15
BOUND_SECONDS = 0.5
_PROBE = """
import sys
from tenon.cli.run import run
from tenon.settings import read_settings
run({words!r}, read_settings())
sys.exit(3 if "torch" in sys.modules else 0)
"""


def main() -> None:
    """Measure every command and write the figures."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        settings = Settings(home=root, cache=root / "cache", offline=True, threads=0, debug=False)
        rows = [row for words in COMMANDS for row in measure(words, root, settings)]
    path = write("spine_start", rows)
    for row in rows:
        print(f"{row.what}: {row.value:.3f} {row.unit} ({row.bound}: {'ok' if row.met else 'SHORT'})")
    print(path)


def measure(words: tuple[str, ...], root: Path, settings: Settings) -> list[Row]:
    """The median of a command's wall time, and whether it imports torch. The first, cold start is not counted."""
    times = [wall_seconds([sys.executable, "-m", "tenon.cli.main", *words], root, settings) for _ in range(REPEATS + 1)]
    probe = _PROBE.format(words=list(words))
    imports = run_quietly([sys.executable, "-c", probe], root, settings) == 3
    name = f"tenon {' '.join(words)}"
    return [
        at_most(name, round(statistics.median(times[1:]), 4), "seconds, median", BOUND_SECONDS),
        at_most(f"{name}: torch imported", float(imports), "times", 0.0),
    ]


def wall_seconds(command: list[str], root: Path, settings: Settings) -> float:
    """From start to end of one process."""
    started = time.perf_counter()
    status = run_quietly(command, root, settings)
    if status != 0:
        raise RuntimeError(f"{' '.join(command)} ended with status {status}")
    return time.perf_counter() - started


def run_quietly(command: list[str], root: Path, settings: Settings) -> int:
    """The exit status of a process whose output nobody reads."""
    done = subprocess.run(command, cwd=root, env=child_environment(settings), capture_output=True, check=False)
    return done.returncode


if __name__ == "__main__":
    main()
