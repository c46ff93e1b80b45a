"""Twenty-five SIGKILLs at random instants over one run, and one full disk: the adapter is bit for bit the same.

Run: python -m benchmarks.spine_survival
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.report import Row, at_least, write
from benchmarks.survival import fill_disk_once, finish, kill_at_random, longest_life, outcome, small_disk
from tests.journeys.world import World, make_world

KILLS = 25
OVERRIDES = ("limits.epochs=250", "checkpoint.every=5", "validation.every=40")
DISK_BYTES = 24 << 20


def main() -> None:
    """One undisturbed run, one that is killed again and again, one whose disk is full."""
    with tempfile.TemporaryDirectory() as name:
        world = make_world(Path(name) / "world")
        calm = world.plan_run(world.root / "runs" / "calm", *OVERRIDES)
        seconds = finish(world, calm)
        expected = outcome(calm)
        killed = world.plan_run(world.root / "runs" / "killed", *OVERRIDES)
        worked = kill_at_random(world, killed, kills=KILLS, life_seconds=longest_life(calm, seconds, KILLS), seed=0)
        found = outcome(killed)
        rows = [
            Row("steps of the run", len(expected.losses), "steps"),
            at_least("SIGKILLs survived", KILLS, "kills", KILLS),
            Row("lives that trained before they were killed", worked, "lives"),
            at_least("adapter after the kills bit-identical", float(found.adapter == expected.adapter), "1 = yes", 1),
            at_least("loss curve after the kills identical", float(found.losses == expected.losses), "1 = yes", 1),
            *disk_rows(world, expected.adapter),
        ]
    path = write("spine_survival", rows)
    for row in rows:
        print(f"{row.what}: {row.value:g} {row.unit}" + ("" if row.met is None else " ok" if row.met else " SHORT"))
    print(path)


def disk_rows(world: World, expected: str) -> list[Row]:
    """A real file system that runs full while the run writes checkpoints."""
    place = world.root / "disk"
    with small_disk(place, DISK_BYTES):
        run = world.plan_run(place / "run", *OVERRIDES)
        words = fill_disk_once(world, run, leave_bytes=64 << 10, after_checkpoints=2)
        stopped = "run-disk-full" in words
        finish(world, run)
        same = outcome(run).adapter == expected
    return [
        at_least("the full disk was said by its code", float(stopped), "1 = yes", 1),
        at_least("adapter after a full disk bit-identical", float(same), "1 = yes", 1),
    ]


if __name__ == "__main__":
    main()
