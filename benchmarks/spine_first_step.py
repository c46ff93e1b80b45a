"""One million rows: seconds from the command to the first step, and memory beside the model.

Run: python -m benchmarks.spine_first_step
The rows are made here (about 300 MB of JSONL, banking-like chats); nothing of them is cached before. The model is
SmolLM2-135M; the run is stopped after its first steps.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.report import Row, at_most, write

ROWS, BOUND_SECONDS, BOUND_BYTES = 1_000_000, 20, 2_000_000_000
RECIPE = """\
base: smollm2-135m
data:
  train: rows.jsonl
  heldout: 0
batch:
  rows: 16
limits:
  steps: 3
evaluate:
  metrics: []
register: false
"""
_WORDS = """my card was charged twice for the same transfer
and I would like to know when money comes back to account"""


def main() -> None:
    """Make the rows, time a run of three steps with them, and the same with sixteen of them."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_rows(root / "many" / "rows.jsonl", ROWS)
        write_rows(root / "few" / "rows.jsonl", 1_000)
        environment = {**os.environ, "TENON_HOME": str(root / "home")}
        few = measure(root / "few", environment)  # also makes the base ready, which is not what is measured
        few = measure(root / "few", environment)
        many = measure(root / "many", environment)
    rows = [
        Row("rows", ROWS, "rows"),
        at_most("from the command to the end of the first step, 1,000,000 rows", many[0], "s", BOUND_SECONDS),
        Row("from the command to the end of the first step, 1,000 rows", few[0], "s"),
        at_most("most memory beside the run with 1,000 rows", many[1] - few[1], "bytes", BOUND_BYTES),
    ]
    for row in rows:
        print(f"{row.what}: {row.value:,.1f} {row.unit}" + ("" if row.met is None else " ok" if row.met else " SHORT"))
    print(write("spine_first_step", rows))


def write_rows(path: Path, count: int) -> None:
    """Distinct chats of about 300 bytes, and a recipe beside them."""
    path.parent.mkdir(parents=True)
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            said = " ".join(draw.choices(_WORDS.split(), k=20))
            messages = [
                {"role": "user", "content": f"{said} ({number})"},
                {"role": "assistant", "content": " ".join(draw.choices(_WORDS.split(), k=12))},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    (path.parent / "recipe.yaml").write_text(RECIPE)


def measure(folder: Path, environment: dict[str, str]) -> tuple[float, float]:
    """(seconds from the command to the first `step` event, most memory of all processes of the run)."""
    run = folder / f"run-{time.monotonic_ns()}"
    started = time.time()
    command = [sys.executable, "-m", "tenon.cli.main", "train", str(folder / "recipe.yaml"), f"run={run}", "-q"]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
    most = 0
    while process.poll() is None:
        most = max(most, _memory_bytes(process.pid))
        time.sleep(0.1)
    if process.returncode:
        raise RuntimeError(f"the run ended with {process.returncode}")
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return next(event["t"] for event in events if event["kind"] == "step") - started, most


def _memory_bytes(pid: int) -> int:
    """Proportional memory of a process and all its children: shared pages count once."""
    try:
        parent = psutil.Process(pid)
        return sum(process.memory_full_info().pss for process in [parent, *parent.children(recursive=True)])
    except psutil.NoSuchProcess:
        return 0


if __name__ == "__main__":
    main()
