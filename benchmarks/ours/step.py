"""One measurement of Tenon's step: `python -m benchmarks.ours.step SPEC`, one line `RESULT {…}` out.

A step is timed whole, from rows on the host to updated adapters, the device idle before and after. Tokens are the
rows' own: prompt and answer, no padding. This module does not know how a step is made (contact) or what it must reach.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.rows import Row, drawn_window, read_rows, real_window
from benchmarks.gpu.works import Spec
from benchmarks.ours.contact import build
from tenon.data.pack import PackRow


def parse_spec(text: str) -> Spec:
    """Inverse of the JSON that the parent writes."""
    tree = json.loads(text)
    return Spec(**{**tree, "ranks": tuple(tree["ranks"])})


def windows(spec: Spec) -> list[list[PackRow]]:
    """The rows of all steps, dealt to the slots in turn."""
    steps, vocab = spec.warm + spec.steps, int(str(spec.shape["vocab"]))
    if spec.rows_file:
        rows = [Row(row.ids % vocab, row.supervised) for row in read_rows(Path(spec.rows_file), "train")]
        taken = [real_window(rows, step, spec.rows) for step in range(steps)]
    else:
        taken = [drawn_window(step, spec.rows, spec.row_tokens, vocab) for step in range(steps)]
    return [deal(window, len(spec.ranks)) for window in taken]


def deal(rows: Sequence[Row], slots: int) -> list[PackRow]:
    """Row i goes to slot i modulo slots."""
    return [PackRow(i % slots, row.ids, row.supervised, i) for i, row in enumerate(rows)]


def measure(spec: Spec) -> dict[str, Any]:
    """Run all steps; seconds and tokens of each measured one, memory, and the last loss."""
    started = time.perf_counter()
    taken = windows(spec)
    step = build(spec)
    cuda = spec.device == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    load_s = time.perf_counter() - started
    seconds, loss, first_at = [], 0.0, 0.0
    for rows in taken:
        begun = time.perf_counter()
        loss = step(rows)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
        first_at = first_at or time.time()
    return {
        "seconds": [round(s, 5) for s in seconds[spec.warm :]],
        "tokens": [sum(len(row.ids) for row in rows) for rows in taken[spec.warm :]],
        "first_s": round(seconds[0], 3),
        "first_at": first_at,
        "load_s": round(load_s, 2),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3) if cuda else None,
        "reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 3) if cuda else None,
        "loss": round(loss, 4),
    }


def main() -> None:
    """Measure what the command line says."""
    print("RESULT " + json.dumps(measure(parse_spec(sys.argv[1]))), flush=True)


if __name__ == "__main__":
    main()
