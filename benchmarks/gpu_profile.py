"""Where the time of ours goes at some works of `gpu_step`, and what slows the card down: `benchmarks/gpu_profile.py`.

    python benchmarks/gpu_profile.py [--only WORK,…] [--results FILE] [--log FILE]

Each work is a process of its own (benchmarks/ours/profile.py). Writes benchmarks/results/gpu_profile.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # The repository's root, not this folder, is where the benchmarks are a package.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.gpu.machine import OUR_CODE, code_hash, read_machine
from benchmarks.gpu.processes import run
from benchmarks.gpu.works import WORKS, spec_of
from benchmarks.report import REPOSITORY, RESULTS, Row, current_commit, write_tree

DEFAULT = "8b-4x2048-bf16,8b-4x2048-fp8,8b-8x2048-bf16,8b-8x2048-bf16-slots,1b-4x2048-bf16,1b-16x64-bf16"
# A measured step is followed by profiled ones: enough undisturbed seconds for the card to reach its power limit.
STEPS = 10


def rows_of(name: str, found: dict[str, Any]) -> list[Row]:
    """What was read at one work, as figures."""
    rows = [
        Row(f"{name}: step", found["step_ms"], "ms"),
        Row(f"{name}: power", found["watts"] or 0, "W"),
        Row(f"{name}: clock", found["mhz"] or 0, "MHz"),
    ]
    rows += [Row(f"{name}: {group}", ms, "ms") for group, ms in found["kernels_ms"].items()]
    if alone := found["products_alone"]:
        rows += [
            Row(f"{name}: its large products alone", alone["ms_a_step"], "ms"),
            Row(f"{name}: rate of its large products alone", alone["tflops"], "TFLOP/s"),
            Row(f"{name}: the same in the first moments", alone["tflops_at_first"], "TFLOP/s"),
            Row(f"{name}: clock with its large products alone", alone["mhz"] or 0, "MHz"),
        ]
    return rows


def main(words: Sequence[str] | None = None) -> int:
    """Profile, write, print. 1 when a work failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=DEFAULT)
    parser.add_argument("--results", type=Path, default=RESULTS / "gpu_profile.json")
    parser.add_argument("--log", type=Path, default=Path("gpu_profile.log"))
    a = parser.parse_args(words)
    machine, rows, longest, failed = read_machine("cuda"), [], {}, 0
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    for work in (work for name in a.only.split(",") for work in WORKS if work.name == name):
        spec = spec_of(work, device="cuda", rows_folder=str(REPOSITORY / ".peers"), steps=STEPS)
        command = [sys.executable, "-m", "benchmarks.ours.profile", json.dumps(asdict(spec))]
        outcome = run(command, environment=environment, folder=REPOSITORY, log=a.log, timeout=240)
        if outcome.result is None:
            print(f"{work.name}: {outcome.failed}")
            failed += 1
            continue
        found = rows_of(work.name, outcome.result)
        rows += found
        longest[work.name] = {"slowed_by": outcome.result["slowed_by"], "kernels": outcome.result["longest"]}
        for row in found:
            print(f"{row.what}: {row.value:g} {row.unit}")
        for kernel in outcome.result["longest"]:
            print("   ", *kernel)
        write_tree(
            a.results,
            rows,
            device=machine.title,
            date=datetime.now(UTC).date().isoformat(),
            commit=current_commit(),
            versions=machine.versions,
            more={"driver": machine.driver, "code": code_hash(OUR_CODE), "longest": longest},
        )
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
