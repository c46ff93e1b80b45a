"""From how much work on a CPU a second thread pays, where threads sleep while they wait (see `kernels.threads`).

Run: python -m benchmarks.small_work        (some seconds, nothing else running)

At growing numbers of tokens of SmolLM2-135M: a slot's low-rank product, and what stands between the large products, by
one thread and by all. `threads_for` takes one thread below `WORTH_THREADS`; what that costs at most is written too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benchmarks.report import Row, write
from tenon.kernels.rms_norm import rms_norm
from tenon.kernels.rotary import Rotation, rotary
from tenon.kernels.swiglu import swiglu_reference
from tenon.kernels.threads import NORM_ELEMENT, ROTARY_ELEMENT, SWIGLU_ELEMENT, WORTH_THREADS
from tenon.settings import child_environment, read_settings

HIDDEN, FEED_FORWARD, HEADS, HEAD = 576, 1536, 9, 64
TOKENS, RANKS = (2, 16, 64, 256, 1024), (16, 64)
SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Work:
    """size: as `threads_for` is told it."""

    name: str
    size: int
    run: Callable[[], object]


def works(tokens: int) -> Iterator[Work]:
    """What a pass of so many tokens does beside its large products, in one layer."""
    x, gate_up = torch.randn(tokens, HIDDEN), torch.randn(tokens, 2 * FEED_FORWARD)
    heads, angles = torch.randn(tokens, HEADS, HEAD), Rotation(torch.randn(tokens, HEAD), torch.randn(tokens, HEAD))
    for rank in RANKS:
        a_DR = torch.randn(3 * rank, HIDDEN).t()
        yield Work(f"q, k and v of rank {rank}", tokens * a_DR.numel(), lambda a_DR=a_DR: x @ a_DR)
    yield Work("norm", NORM_ELEMENT * x.numel(), lambda: rms_norm(x, x[0], 1e-5))
    yield Work("rotation", ROTARY_ELEMENT * x.numel(), lambda: rotary(heads, angles))
    yield Work("swiglu", SWIGLU_ELEMENT * tokens * FEED_FORWARD, lambda: swiglu_reference(gate_up))


@torch.inference_mode()
def measure(threads: int) -> list[Row]:
    """One thread against all."""
    rows, lost = [], 0.0
    for tokens in TOKENS:
        for work in works(tokens):
            torch.set_num_threads(1)
            one = _microseconds(work.run)
            torch.set_num_threads(threads)
            every = _microseconds(work.run)
            taken = one if work.size < WORTH_THREADS else every
            lost = max(lost, taken - min(one, every))
            name = f"{work.name}, {tokens:,} tokens"
            rows += [Row(f"{name}: one thread", one, "us"), Row(f"{name}: {threads} threads", every, "us")]
    return [*rows, Row("lost at most by the number of threads that is taken", lost, "us")]


def _microseconds(run: Callable[[], object]) -> float:
    for _ in range(10):
        run()
    began, runs = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS:
        run()
        runs += 1
    return (time.perf_counter() - began) / runs * 1e6


def main() -> None:
    """Measure in a process with the environment of a worker, whose threads sleep while they wait; write the file."""
    if "OMP_WAIT_POLICY" not in os.environ:
        words, environment = [sys.executable, "-m", "benchmarks.small_work"], child_environment(read_settings())
        raise SystemExit(subprocess.run(words, env=environment, check=False).returncode)
    rows = measure(torch.get_num_threads())
    for row in rows:
        print(f"{row.what}: {row.value:.4g} {row.unit}")
    print(write("small_work", rows))


if __name__ == "__main__":
    main()
