"""Tokens a second on this machine's CPU: Tenon against TRL's SFTTrainer, SmolLM2-135M, banking77 rows.

Run: python -m benchmarks.spine_speed --data FOLDER --peer PYTHON
Interleaved, separate processes, medians of the repetitions. A step's tokens are its rows' real tokens, prompt and
answer, never padding; the first steps are left out. TRL runs with its defaults, and with the settings that suit it best
here.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.report import REPOSITORY, Row, at_least, write
from benchmarks.spine_banking77 import read_csv, tenon
from tenon.bases.locate import locate_base
from tenon.models.prepare import prepare_base
from tenon.settings import read_settings

BASE, BOUND, WARM_STEPS = "smollm2-135m", 2.0, 2
BEST_TRL = {"gradient_checkpointing": False, "bf16": False, "packing": False, "padding_free": False}


def main() -> None:
    """Measure all systems in turn and write the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True, help="folder with train.csv")
    parser.add_argument("--peer", required=True, help="Python of the peers' environment")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8, help="rows a step (TRL's default)")
    parser.add_argument("--repetitions", type=int, default=3)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        settings = read_settings()
        folder = prepare_base(locate_base(BASE, settings), settings)
        data = write_rows(a.data / "train.csv", root / "rows.jsonl")
        systems: dict[str, Callable[[int], float]] = {
            "Tenon": lambda n: ours(a, root / f"run{n}"),
            "TRL, defaults": lambda n: trl(a, folder, data, root / f"trl{n}", {}),
            "TRL, no checkpointing, fp32": lambda n: trl(a, folder, data, root / f"best{n}", BEST_TRL),
        }
        found: dict[str, list[float]] = {name: [] for name in systems}
        for n in range(a.repetitions):
            for name, measure in systems.items():
                found[name].append(measure(n))
                print(f"{name}: {found[name][-1]:.0f} tokens/s", flush=True)
    medians = {name: statistics.median(values) for name, values in found.items()}
    rows = [Row(f"{name}, {a.rows} rows a step", value, "tokens/s") for name, value in medians.items()]
    rows.append(at_least("against TRL's defaults", medians["Tenon"] / medians["TRL, defaults"], "times", BOUND))
    rows.append(Row("against TRL at its best", medians["Tenon"] / medians["TRL, no checkpointing, fp32"], "times"))
    print(write("spine_speed", rows))


def write_rows(csv: Path, target: Path) -> Path:
    """The rows as the peers' script reads them."""
    lines = [json.dumps({"user": row["text"], "assistant": row["category"]}) for row in read_csv(csv)]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def rate(tokens: list[int], seconds: list[float]) -> float:
    """Tokens a second over all steps but the first."""
    return sum(tokens[WARM_STEPS:]) / sum(seconds[WARM_STEPS:])


def ours(a: argparse.Namespace, run: Path) -> float:
    """The real command; the figures of its events."""
    overrides = [f"data.train={a.data / 'train.csv'}", f"run={run}", f"batch.rows={a.rows}", f"limits.steps={a.steps}"]
    overrides += [
        "limits.epochs=",
        "evaluate.data=",
        "evaluate.metrics=[]",
        "evaluate.max_new_tokens=",
        "data.heldout=0",
    ]
    tenon("train", str(REPOSITORY / "recipes" / "banking77.yaml"), *overrides, "-q", environment=dict(os.environ))
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["kind"] == "step"]
    return rate([step["tokens"] for step in steps], [step["seconds"] for step in steps])


def trl(a: argparse.Namespace, folder: Path, data: Path, out: Path, config: dict[str, bool]) -> float:
    """TRL on the same rows, in its own process."""
    words = [a.peer, str(REPOSITORY / "benchmarks" / "peers" / "trl_sft.py"), str(folder), str(data), str(out)]
    words += ["--steps", str(a.steps), "--rows", str(a.rows), "--config", json.dumps(config), "--most", "2000"]
    words += ["--dtype", "float32"] if config else []
    # Tenon starts its workers so too: on a machine that does anything else, spinning threads cost both systems dearly.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, stderr=sys.stderr, text=True, check=True)
    figures = json.loads(done.stdout.rpartition("RESULT ")[2])
    print(json.dumps(figures["settings"]), flush=True)
    return rate(figures["tokens"], figures["seconds"])


if __name__ == "__main__":
    main()
