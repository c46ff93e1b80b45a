"""Seconds from the start of a process to the end of its first step, 8B, with cold and with warm caches.

Run: python benchmarks/gpu_first_step.py
A random 8B base lies on disk as files (the page cache holds them, for all systems alike). A cold process begins with
empty folders for compiled kernels and for everything else that a system caches; a warm one has what a cold one left.
Measured are the step alone (weights from files, one step of 4 x 2,048 tokens), `tenon train` as users type it (with
planning, hashing of the base, tokenising, the worker), and Unsloth with its default settings.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

if __name__ == "__main__":
    # The repository's root, not this folder, is where the benchmarks are a package.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.gpu.step import Bench, make_base, open_bench, parse
from benchmarks.gpu.works import WORKS, Peer, Work, peer_spec
from benchmarks.report import REPOSITORY, RESULTS, Row, at_most, write_tree

WORK = "8b-4x2048-bf16"
UNSLOTH = Peer("Unsloth", "unsloth", "own", default=True)
# Seconds for ours, by the state of the caches.
BOUNDS = {"cold": 45.0, "warm": 25.0}
SYSTEMS = ("Tenon, the step alone", "Tenon, tenon train", "Unsloth, its default")
_LONGEST_SECONDS = 300.0
_TEXT = "the quick brown fox jumps over the lazy dog and counts the stars above the quiet river until morning comes "
RECIPE = """\
data:
  train: rows.jsonl
  heldout: 0
  max_tokens: {tokens}
  on_long: truncate
batch:
  rows: {rows}
limits:
  steps: 1
evaluate:
  metrics: []
register: false
"""


def main(words: Sequence[str] | None = None) -> int:
    """Measure every system cold and then warm, as often as asked; write the file."""
    results = ["--results", str(RESULTS / "gpu_first_step.json")]
    a = parse([*results, *(sys.argv[1:] if words is None else words)])
    bench = open_bench(a)
    work = next(one for one in WORKS if one.name == WORK)
    folder, failed = make_base(bench, work.shape, bench.spec(work))
    if failed is not None:
        raise SystemExit(f"the base could not be written: {failed.failed}")
    found: dict[str, list[float]] = {}
    began = time.monotonic()
    for turn in range(a.repeat):
        for system in SYSTEMS if a.device == "cuda" else SYSTEMS[:2]:
            caches = bench.work_folder / "caches" / f"{turn}-{SYSTEMS.index(system)}"
            shutil.rmtree(caches, ignore_errors=True)
            for state in ("cold", "warm"):
                if a.seconds and time.monotonic() - began > a.seconds:
                    print(f"left out: {system}, {state}: the time is up", flush=True)
                    continue
                seconds = first_step(bench, work, system, folder, caches)
                print(f"{system}, {state}: {'failed' if seconds is None else f'{seconds:.1f} s'}", flush=True)
                if seconds is not None:
                    found.setdefault(f"{system}, {state}", []).append(round(seconds, 2))
                    save(a.results, bench, found)
    return 0


def first_step(bench: Bench, work: Work, system: str, base: str, caches: Path) -> float | None:
    """Seconds from the start of the process to the end of its first step; None when it failed (see the log)."""
    extra = {
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TENON_HOME": str(caches / "tenon"),
    }
    if system == "Tenon, tenon train":
        return command_seconds(bench, work, base, caches, extra)
    spec = replace(bench.spec(work), weights=base, steps=1, warm=0)
    peer = system.startswith("Unsloth")
    if peer:
        script = str(REPOSITORY / "benchmarks" / "peers" / "lora_step.py")
        words = [bench.peer_python, script, json.dumps(asdict(peer_spec(spec, UNSLOTH, base)))]
        bench = replace(bench, work_folder=caches / "unsloth")  # it keeps what it compiled where it is started
    else:
        words = [sys.executable, "-m", "benchmarks.ours.step", json.dumps(asdict(spec))]
    outcome = bench.run(words, peer=peer, timeout=_LONGEST_SECONDS, extra=extra)
    return None if outcome.result is None else float(outcome.result["first_at"]) - outcome.began_at


def command_seconds(bench: Bench, work: Work, base: str, caches: Path, extra: dict[str, str]) -> float | None:
    """`tenon train` on rows of text, up to the event of its first step."""
    recipe, run = caches / "recipe.yaml", caches / f"run-{time.monotonic_ns()}"
    caches.mkdir(parents=True, exist_ok=True)
    row_tokens = work.row_tokens
    lines = [json.dumps({"text": f"{number} " + _TEXT * (row_tokens // 10)}) for number in range(4 * work.rows)]
    (caches / "rows.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    recipe.write_text(f"base: {base}\n" + RECIPE.format(tokens=row_tokens, rows=work.rows), "utf-8")
    words = [sys.executable, "-m", "tenon.cli.main", "train", str(recipe), f"run={run}", "-q"]
    outcome = bench.run(words, peer=False, timeout=_LONGEST_SECONDS, extra=extra)
    events = run / "events.jsonl"
    found = [json.loads(line) for line in events.read_text("utf-8").splitlines()] if events.is_file() else []
    ended = next((float(event["t"]) for event in found if event["kind"] == "step"), None)
    shutil.rmtree(run, ignore_errors=True)
    return None if ended is None else ended - outcome.began_at


def save(path: Path, bench: Bench, found: dict[str, list[float]]) -> None:
    """Write medians with their bounds, and every repetition."""
    rows = []
    for name, seconds in found.items():
        value, state = statistics.median(seconds), name.rpartition(", ")[2]
        what = f"from process start to the end of step 1, 8B | {name}"
        rows.append(at_most(what, value, "s", BOUNDS[state]) if name.startswith("Tenon") else Row(what, value, "s"))
    machine = bench.machine
    write_tree(
        path,
        rows,
        device=machine.title,
        date=bench.call[:10],
        commit=bench.commit,
        versions=machine.versions,
        more={"code": bench.codes["ours"], "repetitions": found},
    )


if __name__ == "__main__":
    sys.exit(main())
