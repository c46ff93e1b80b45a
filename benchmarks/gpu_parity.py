"""Does a base in fp8 or nf4 train the same adapters? Loss curves, gradients and held-out scores beside bf16.

Run: python benchmarks/gpu_parity.py [--base NAME|FOLDER|FILE.gguf]
SmolLM2-135M on banking77 (rows made by prepare_gpu.sh): three learning rates x three seeds, nine slots in one run over
one resident base, the same rows in the same order for every format. Each format is a process of its own; what was
measured before with the same settings and code is kept, so that formats can be spread over calls.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

if __name__ == "__main__":
    # The repository's root, not this folder, is where the benchmarks are a package.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.gpu.curves import BIN_STEPS, binned, gaps
from benchmarks.gpu.machine import OUR_CODE, code_hash, read_machine
from benchmarks.gpu.processes import Budget, run
from benchmarks.gpu.works import REAL_ROWS, BaseFormat
from benchmarks.report import REPOSITORY, RESULTS, Row, at_least, at_most, current_commit, write_tree

# The least cosine of any module's gradient, by (format of the base, weights of the plain fp32 path).
COSINES = {
    ("bf16", "original weights"): 0.9999,
    ("fp8", "original weights"): 0.99,
    ("nf4", "own weights"): 0.9999,
    ("nf4-fp8", "own weights"): 0.99,
}
ORIGINAL = "original weights"


def main(words: Sequence[str] | None = None) -> int:
    """Measure the formats that are missing, write after each, print the figures."""
    a = parse(words)
    spec = make_spec(a)
    machine, code = read_machine(a.device), code_hash(OUR_CODE)
    made_with = {"spec": spec, "code": code, "machine": machine.key}
    found = kept(a.results, made_with) if not a.again else {}
    budget, slowest = Budget(a.seconds), 0.0
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    for base in a.formats.split(","):
        if base in found:
            continue
        if not budget.allows(slowest):
            print(f"left out: {base}, {slowest:.0f} s are needed", flush=True)
            continue
        command = [sys.executable, "-m", "benchmarks.ours.parity", json.dumps({**spec, "base": base})]
        timeout = budget.left if a.seconds else None
        outcome = run(command, environment=environment, folder=REPOSITORY, log=a.log, timeout=timeout)
        slowest = max(slowest, outcome.wall_s)
        print(f"{base}: {outcome.failed or 'trained'} ({outcome.wall_s:.0f} s)", flush=True)
        if outcome.result is None:
            continue
        found[base] = outcome.result
        write_tree(
            a.results,
            report_rows(found),
            device=machine.title,
            date=datetime.now(UTC).date().isoformat(),
            commit=current_commit(),
            versions=machine.versions,
            more={"made_with": made_with, "code": code, "formats": compact(found)},
        )
    for row in report_rows(found):
        met = "" if row.met is None else f" ({row.bound}: {'ok' if row.met else 'SHORT'})"
        print(f"{row.what}: {row.value:.5g} {row.unit}{met}")
    return 0 if found else 1


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="gpu_parity.py", description=__doc__)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--prepared", type=Path, default=REPOSITORY / ".peers", help="what prepare_gpu.sh made")
    parser.add_argument("--formats", default=",".join(get_args(BaseFormat)))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rows", type=int, default=16, help="rows of each slot and step")
    parser.add_argument("--heldout", type=int, default=3080, help="test rows that the adapters are judged on")
    parser.add_argument("--seconds", type=float, default=0, help="start nothing that would end later; 0: no limit")
    parser.add_argument("--again", action="store_true", help="forget what was measured")
    parser.add_argument("--results", type=Path, default=RESULTS / "gpu_parity.json")
    parser.add_argument("--log", type=Path, default=Path(tempfile.gettempdir()) / "tenon-gpu" / "gpu_parity.log")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    a = parser.parse_args(words)
    unknown = set(a.formats.split(",")) - set(get_args(BaseFormat))
    if unknown:
        parser.error(f"--formats: {', '.join(sorted(unknown))} is none of {', '.join(get_args(BaseFormat))}")
    return a


def make_spec(a: argparse.Namespace) -> dict[str, Any]:
    """The spec of all formats: the base made ready first, so that no process's time counts it."""
    from benchmarks.ours.parity import ParitySpec
    from tenon.bases.locate import locate_base
    from tenon.models.prepare import prepare_base
    from tenon.settings import read_settings

    settings = read_settings()
    begun = time.monotonic()
    folder = prepare_base(locate_base(a.base, settings), settings)
    print(f"{a.base} is ready in {folder} ({time.monotonic() - begun:.0f} s)", flush=True)
    rows_file = (a.prepared / REAL_ROWS).resolve()
    spec = ParitySpec(
        str(folder), str(rows_file), "bf16", steps=a.steps, rows=a.rows, heldout=a.heldout, device=a.device
    )
    return json.loads(json.dumps(asdict(spec)))


def kept(path: Path, made_with: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier call measured with the same settings, code and machine; paths do not count."""
    if not path.is_file():
        return {}
    tree = json.loads(path.read_text("utf-8"))

    def settings(made: Mapping[str, Any]) -> dict[str, Any]:
        spec = {name: value for name, value in made["spec"].items() if name not in ("folder", "rows_file")}
        return {**made, "spec": spec}

    return expanded(tree["formats"]) if settings(tree["made_with"]) == settings(made_with) else {}


def compact(found: Mapping[str, Any]) -> dict[str, Any]:
    """As the file keeps it: of the curves their bins."""
    return {
        base: {**one, "losses": [[round(float(v), 4) for v in binned(curve)] for curve in one["losses"]]}
        for base, one in found.items()
    }


def expanded(formats: Mapping[str, Any]) -> dict[str, Any]:
    """Curves whose bins are those of the file."""
    return {
        base: {**one, "losses": [[value for value in curve for _ in range(BIN_STEPS)] for curve in one["losses"]]}
        for base, one in formats.items()
    }


def report_rows(found: Mapping[str, Any]) -> list[Row]:
    """Gaps of the curves to bf16's, cosines, and what the adapters score on the bf16 base."""
    return [*gap_rows(found), *cosine_rows(found), *heldout_rows(found)]


def gap_rows(found: Mapping[str, Any]) -> list[Row]:
    """For each format and learning rate; the bound is one seed's standard deviation of bf16's curves."""
    reference = found.get("bf16")
    if reference is None:
        return []
    rows = []
    for base, one in found.items():
        if base == "bf16":
            continue
        for gap in gaps(one["losses"], reference["losses"], one["rates"]):
            what = f"loss curves of {base} against bf16, lr {gap.lr:g}"
            rows.append(at_most(f"{what}: mean gap, one seed's deviation its bound", gap.gap, "nats", gap.deviation))
            rows.append(Row(f"{what}: mean signed gap", gap.signed, "nats"))
    return rows


def cosine_rows(found: Mapping[str, Any]) -> list[Row]:
    """The least over modules and slots, at each checked step."""
    rows = []
    for base, one in found.items():
        for step, references in one["cosines"].items():
            for weights, cosines in references.items():
                who, against = (
                    (base, weights) if "plain" not in weights else (f"{base}'s control, {weights},", ORIGINAL)
                )
                what = f"gradient of {who} against plain fp32 over its {against}, step {step}: least of all modules"
                bound = COSINES.get((base, weights))
                value = cosines["least"]
                rows.append(Row(what, value, "cosine") if bound is None else at_least(what, value, "cosine", bound))
    return rows


def heldout_rows(found: Mapping[str, Any]) -> list[Row]:
    """Means over all slots, and the seeds' deviation of bf16's."""
    rows = []
    for base, one in found.items():
        for name, unit in (("loss", "nats/token"), ("accuracy", "share")):
            value = statistics.fmean(judged[name] for judged in one["heldout"])
            rows.append(Row(f"held-out {name} on the bf16 base, adapters trained on {base}", value, unit))
            if base == "bf16":
                rows.append(Row(f"held-out {name}, one seed's deviation, bf16", seed_deviation(one, name), unit))
    return rows


def seed_deviation(one: Mapping[str, Any], name: str) -> float:
    """The standard deviation over the seeds of a held-out figure, the mean over learning rates."""
    groups: dict[float, list[float]] = {}
    for judged, lr in zip(one["heldout"], one["rates"], strict=True):
        groups.setdefault(lr, []).append(judged[name])
    return statistics.fmean(statistics.stdev(group) if len(group) > 1 else 0.0 for group in groups.values())


if __name__ == "__main__":
    sys.exit(main())
