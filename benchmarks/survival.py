"""Kill a run at random instants, fill its disk, and see whether what comes out is what would have come out.

Used by `benchmarks.spine_survival` and by the suite. Nothing here is measured against a bound.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tenon.runs.checkpoints import hash_file
from tenon.runs.events import curve, read_events
from tests.journeys.world import World

RESUMABLE_EXITS = (1, 75)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to: the hash of its adapter's tensors, and every step's loss."""

    adapter: str
    losses: tuple[float, ...]


def finish(world: World, run: Path) -> float:
    """Let a worker work on the run to its end; returns the seconds it took."""
    started = time.monotonic()
    worker = world.start_worker(run)
    output, _ = worker.communicate(timeout=600)
    if worker.returncode != 0:
        raise RuntimeError(f"the worker ended with {worker.returncode}: {output.decode()[-2000:]}")
    return time.monotonic() - started


def outcome(run: Path) -> Outcome:
    """Read a finished run."""
    (adapter,) = run.glob("adapter/*/adapter_model.safetensors")
    losses = tuple(float(event["loss"] or 0.0) for event in curve(run / "events.jsonl", adapter.parent.name))
    return Outcome(hash_file(adapter), losses)


def longest_life(calm: Path, seconds: float, kills: int) -> float:
    """How long a life may be, so that even `kills` of the longest do not finish the work of a calm run that took
    seconds.

    A life is the start of the process and its share of the steps.
    """
    steps = [float(event["t"] or 0) for event in read_events(calm / "events.jsonl") if event["kind"] == "step"]
    work_seconds = steps[-1] - steps[0]
    return seconds - work_seconds + work_seconds / kills


def kill_at_random(world: World, run: Path, *, kills: int, life_seconds: float, seed: int) -> int:
    """SIGKILL the run's worker `kills` times, each at a random instant of at most life_seconds; then let it finish.

    Returns how many of the lives had done some steps of their own.
    """
    draw = random.Random(seed)
    worked = 0
    for _ in range(kills):
        before = _events(run)
        worker = world.start_worker(run)
        _wait(worker, draw.uniform(0.0, life_seconds))
        if worker.poll() is not None:
            raise RuntimeError(f"the run ended before it could be killed {kills} times; make it longer")
        os.killpg(worker.pid, signal.SIGKILL)
        worker.communicate()
        worked += _events(run) > before + 3
    finish(world, run)
    return worked


def _wait(worker: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        worker.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return


def _events(run: Path) -> int:
    path = run / "events.jsonl"
    return path.read_bytes().count(b'"kind": "step"') if path.is_file() else 0


@contextmanager
def small_disk(place: Path, size_bytes: int) -> Iterator[None]:
    """A file system of a fixed size at `place` (tmpfs; needs root). Raises PermissionError where mounts are refused."""
    place.mkdir(parents=True, exist_ok=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(place)],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode != 0:
        raise PermissionError(made.stderr.strip())
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def fill_disk_once(world: World, run: Path, *, leave_bytes: int, after_checkpoints: int) -> str:
    """Fill the run's file system once it has some checkpoints, wait for the run to stop by itself, then free it.

    Returns the worker's last words. The caller resumes the run.
    """
    worker = world.start_worker(run)
    while len(list((run / "checkpoints").glob("step-*/manifest.json"))) < after_checkpoints:
        if worker.poll() is not None:
            raise RuntimeError("the run ended before its disk could be filled; make it longer")
        time.sleep(0.01)
    ballast = run.parent / "ballast"
    free = shutil.disk_usage(run).free
    ballast.write_bytes(b"\0" * max(0, free - leave_bytes))
    output, _ = worker.communicate(timeout=300)
    ballast.unlink()
    if worker.returncode not in RESUMABLE_EXITS:
        raise RuntimeError(f"the worker ended with {worker.returncode} on a full disk: {output.decode()[-2000:]}")
    return output.decode()
