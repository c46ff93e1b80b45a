"""banking77 with SmolLM2-135M: accuracy, macro-F1 and time beside TRL + PEFT with the same hyperparameters.

Run: python -m benchmarks.spine_banking77 --data FOLDER --peer PYTHON [--rows 2000]
FOLDER holds train.csv and test.csv; PYTHON is the interpreter of an environment with trl (see docs/benchmarks.md).
Both adapters are judged by the same judge, greedily, on all test rows. Without --rows all train rows are used.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import REPOSITORY, Row, at_least, write
from tenon.bases.locate import locate_base
from tenon.models.prepare import prepare_base
from tenon.settings import read_settings

RANK, ALPHA, LR, ROWS, EPOCHS, WARMUP = 16, 32, 1e-3, 32, 3, 0.05
# Share of points that TRL's score may be above ours.
MARGIN = 0.005


@dataclass(frozen=True, slots=True)
class Scored:
    """One system: its figures on the test rows and the seconds of its whole training process."""

    accuracy: float
    macro_f1: float
    seconds: float
    steps: int
    versions: dict[str, str]


def keep(path: Path, measure: Callable[[], Scored]) -> None:
    """Measure, unless an earlier call did."""
    if not path.is_file():
        path.write_text(json.dumps(asdict(measure())))


def main() -> None:
    """Train both, judge both, write the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--peer", required=True, help="Python of the peers' environment")
    parser.add_argument("--peer-path", default="", help="PYTHONPATH of the peers' environment")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=0)
    parser.add_argument("--device", default="", help="what to write as the device")
    parser.add_argument("--work", type=Path, help="keep what is made here, and take up what a stopped run left")
    parser.add_argument("--only", choices=["ours", "trl"], help="stop after this system")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = a.work or Path(name)
        root.mkdir(parents=True, exist_ok=True)
        measure_all(a, root)


def measure_all(a: argparse.Namespace, root: Path) -> None:
    """Both systems, each kept as a file of the work folder, then the result."""
    settings = read_settings()
    train = take_rows(a.data / "train.csv", a.rows, root)
    folder = prepare_base(locate_base(a.base, settings), settings)
    if a.only != "trl":
        keep(root / "ours.json", lambda: run_ours(a.base, train, a.data / "test.csv", root))
    if a.only != "ours":
        keep(root / "trl.json", lambda: run_trl(a, folder, train, root))
    if a.only:
        return
    ours, theirs = (Scored(**json.loads((root / name).read_text())) for name in ("ours.json", "trl.json"))
    rows = [
        Row("train rows", len(read_csv(train)), "rows"),
        at_least("accuracy, Tenon", ours.accuracy, "share", theirs.accuracy - MARGIN),
        Row("accuracy, TRL + PEFT", theirs.accuracy, "share"),
        at_least("macro-F1, Tenon", ours.macro_f1, "share", theirs.macro_f1 - MARGIN),
        Row("macro-F1, TRL + PEFT", theirs.macro_f1, "share"),
        Row("training process, Tenon", ours.seconds, "s"),
        Row("training process, TRL + PEFT", theirs.seconds, "s"),
    ]
    rows += [Row(f"steps of {name}", one.steps, "steps") for name, one in (("Tenon", ours), ("TRL + PEFT", theirs))]
    kind = "gpu" if torch.cuda.is_available() else "cpu"
    path = write(f"spine_banking77_{kind}", rows, device=a.device or None, versions=theirs.versions)
    for row in rows:
        print(f"{row.what}: {row.value:.4f} {row.unit}" + ("" if row.met is None else " ok" if row.met else " SHORT"))
    print(path)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows with text and category."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def take_rows(path: Path, most: int, root: Path) -> Path:
    """The file itself, or `most` rows of it drawn at random with every label among them."""
    if not most:
        return path
    rows = read_csv(path)
    random.Random(0).shuffle(rows)
    first = {row["category"]: index for index, row in reversed(list(enumerate(rows)))}
    chosen = sorted(first.values()) + [i for i in range(len(rows)) if i not in set(first.values())]
    target = root / "train.csv"
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "category"])
        writer.writeheader()
        writer.writerows(rows[i] for i in chosen[:most])
    return target


def tenon(*words: str, environment: dict[str, str]) -> str:
    """Run the tenon command; returns what it wrote to standard output."""
    done = subprocess.run(
        [sys.executable, "-m", "tenon.cli.main", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    return done.stdout


def run_ours(base: str, train: Path, test: Path, root: Path) -> Scored:
    """Train and judge by the shipped recipe."""
    run = root / "run"
    environment = dict(os.environ)
    begun = time.time()  # before the process starts, as for the peer
    tenon(
        "train",
        str(REPOSITORY / "recipes" / "banking77.yaml"),
        *(f"base={base}", f"data.train={train}", f"evaluate.data={test}", f"run={run}", f"schedule.warmup={WARMUP}"),
        environment=environment,
    )
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    judged = next(e["t"] for e in events if e["kind"] == "phase" and e["name"] == "evaluate")
    figures = next(e for e in events if e["kind"] == "evaluated" and e["subject"] != "base")
    steps = sum(e["kind"] == "step" for e in events)
    return Scored(figures["accuracy"], figures["macro_f1"], judged - begun, steps, {})


def run_trl(a: argparse.Namespace, folder: Path, train: Path, root: Path) -> Scored:
    """Train with TRL in its own process; its adapter is judged by Tenon."""
    rows = read_csv(train)
    data, out = root / "rows.jsonl", root / "trl"
    lines = [json.dumps({"user": row["text"], "assistant": row["category"]}) for row in rows]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    steps = EPOCHS * -(-len(rows) // ROWS)
    words = [a.peer, str(REPOSITORY / "benchmarks" / "peers" / "trl_sft.py"), str(folder), str(data), str(out)]
    words += ["--epochs", str(EPOCHS), "--rows", str(ROWS), "--rank", str(RANK), "--alpha", str(ALPHA), "--lr", str(LR)]
    words += ["--dtype", "bfloat16"] if torch.cuda.is_available() else []
    words += ["--warmup", str(round(WARMUP * steps))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if a.peer_path:
        environment["PYTHONPATH"] = a.peer_path
    started = time.monotonic()
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.monotonic() - started
    peer: dict[str, Any] = json.loads(done.stdout.rpartition("RESULT ")[2])
    found = json.loads(
        tenon(
            *("eval", str(out), "--base", a.base, "--data", str(a.data / "test.csv"), "--alone", "--json"),
            *("--max-new-tokens", "16"),
            environment=dict(os.environ),
        )
    )
    figures = {metric["name"]: metric["value"] for metric in found["results"][0]["metrics"]}
    return Scored(figures["accuracy"], figures["macro_f1"], seconds, len(peer["seconds"]), peer["versions"])


if __name__ == "__main__":
    main()
