"""Steps of two GPUs beside those of one, and a base that one GPU cannot hold: `python benchmarks/gpu_ranks.py`.

8B: the same optimiser steps by one GPU and by two, in turns, in the same processes. 32B in bf16 (62 GB of layers): each
GPU keeps half of every layer. Random weights, made on the devices. torchrun starts the processes of each work.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # The repository's root, not this folder, is where the benchmarks are a package.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.gpu.machine import OUR_CODE, Machine, code_hash, read_machine
from benchmarks.gpu.processes import find_result
from benchmarks.gpu.ranks import TRIALS, WORKS, RanksWork
from benchmarks.report import REPOSITORY, RESULTS, Row, at_least, current_commit, write_tree

LONGEST_SECONDS = 240.0


def main(words: Sequence[str] | None = None) -> int:
    """Measure every work that is asked for; write the file. 1 when one of them failed."""
    a = parse(words)
    works = [work for work in (WORKS if a.device == "cuda" else TRIALS) if not a.only or work.name in a.only]
    machine, found, failed = read_machine(a.device), earlier(a.results), 0
    for work in works:
        began = time.monotonic()
        result = run(work, a.gpus, a.log)
        print(f"{work.title}: {'failed, see the log' if result is None else told(work, result)}", flush=True)
        print(f"  {time.monotonic() - began:.0f} s in all", flush=True)
        if result is None:
            failed = 1
            continue
        found[work.name] = result
        save(a.results, machine, found, works=(*WORKS, *TRIALS), gpus=a.gpus)
    return failed


def run(work: RanksWork, gpus: int, log: Path | None) -> dict[str, Any] | None:
    """What the processes of one work found; None when they failed."""
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus), "-m", "benchmarks.ours.ranks"]
    command = [sys.executable, "-m", *launch, work.to_json()]
    try:
        done = subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, timeout=LONGEST_SECONDS, check=False
        )
        output, errors, result = done.stdout, done.stderr, find_result(done.stdout)
    except subprocess.TimeoutExpired as error:
        output, errors, result = str(error.stdout or ""), f"ended after {LONGEST_SECONDS:g} s: {error.stderr}", None
    if log is not None:
        with log.open("a", encoding="utf-8") as file:
            file.write(f"---- {work.title}\n{output}\n{errors}\n")
    if result is None:
        print(errors[-3000:], file=sys.stderr)
    return result


def tokens_per_second(work: RanksWork, turns: Sequence[Sequence[float]]) -> float:
    """The median turn's."""
    tokens = work.rows * work.row_tokens
    return statistics.median(tokens * len(seconds) / sum(seconds) for seconds in turns)


def told(work: RanksWork, result: dict[str, Any]) -> str:
    """One line about a work."""
    parts = [f"{name} {tokens_per_second(work, result[name]):,.0f} tokens/s" for name in ways(work)]
    return ", ".join([*parts, f"peak {result['peak_gb']:g} GB", f"loss {result['loss']:g}"])


def ways(work: RanksWork) -> tuple[str, ...]:
    """Who takes the steps of a work."""
    return ("together",) if work.spread else ("alone", "together")


def rows_of(work: RanksWork, result: dict[str, Any]) -> list[Row]:
    """The figures of one work."""
    names = {"alone": "one GPU", "together": f"{result['gpus']} GPUs"}
    speeds = {name: tokens_per_second(work, result[name]) for name in ways(work)}
    rows = [Row(f"{work.title} | {names[name]}", round(speed), "tokens/s") for name, speed in speeds.items()]
    if not work.spread:
        what, times = f"{work.title} | {names['together']} over one", round(speeds["together"] / speeds["alone"], 3)
        rows.append(Row(what, times, "x") if work.at_least is None else at_least(what, times, "x", work.at_least))
    return [*rows, Row(f"{work.title} | peak memory of a GPU", result["peak_gb"], "GB")]


def save(
    path: Path, machine: Machine, found: dict[str, dict[str, Any]], *, works: Sequence[RanksWork], gpus: int
) -> None:
    """Write the figures of all works so far, and every repetition."""
    by_name = {work.name: work for work in works}
    write_tree(
        path,
        [row for name, result in found.items() for row in rows_of(by_name[name], result)],
        device=f"{gpus} x {machine.title}",
        date=datetime.now(UTC).date().isoformat(),
        commit=current_commit(),
        versions=machine.versions,
        more={"code": code_hash(OUR_CODE), "repetitions": found},
    )


def earlier(path: Path) -> dict[str, dict[str, Any]]:
    """What earlier calls with this very code found: works may be spread over calls."""
    if not path.is_file():
        return {}
    tree = json.loads(path.read_text("utf-8"))
    return tree["repetitions"] if tree.get("code") == code_hash(OUR_CODE) else {}


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, help="the file to write; on a CPU it has to be named")
    parser.add_argument("--log", type=Path, help="a file that gets what the processes print")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a trial with a tiny base")
    parser.add_argument("--gpus", type=int, default=2, help="processes, a device each")
    parser.add_argument("--only", nargs="+", metavar="WORK", help=", ".join(work.name for work in (*WORKS, *TRIALS)))
    a = parser.parse_args(words)
    if a.results is None and a.device == "cpu":
        parser.error("a trial on a CPU does not belong among the results: name a file with --results")
    a.results = a.results or RESULTS / "gpu_ranks.json"
    return a


if __name__ == "__main__":
    sys.exit(main())
