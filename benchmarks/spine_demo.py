"""What `make demo` shows: base against adapter on the home data set, and the minutes it takes.

Run: python -m benchmarks.spine_demo
It runs the recipe as the demo does, from the plan to the registered adapter, and a short chat.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path

from benchmarks.report import REPOSITORY, Row, at_least, at_most, write
from benchmarks.spine_banking77 import tenon

MINUTES = 10


def main() -> None:
    """One demo, timed."""
    with tempfile.TemporaryDirectory() as name:
        environment = {**os.environ, "TENON_HOME": f"{name}/home"}
        run = Path(name) / "run"
        started = time.monotonic()
        tenon("train", str(REPOSITORY / "recipes" / "quickstart.yaml"), f"run={run}", environment=environment)
        tenon("chat", "home", "--say", "lights off in the kitchen please", environment=environment)
        seconds = time.monotonic() - started
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    judged = {event["subject"]: event for event in events if event["kind"] == "evaluated"}
    base, adapter = (judged[subject]["exact"] for subject in ("base", "quickstart"))
    steps = [event for event in events if event["kind"] == "step"]
    rate = sum(step["tokens"] for step in steps) / sum(step["seconds"] for step in steps)
    rows = [
        at_most("base, exact", base, "share", 0.10),
        at_least("adapter, exact", adapter, "share", 0.90),
        at_most("from the command to the end of the chat", seconds, "s", MINUTES * 60),
        Row("training", sum(step["seconds"] for step in steps), "s"),
        Row("training speed", rate, "tokens/s"),
    ]
    print(write("spine_demo", rows))


if __name__ == "__main__":
    main()
