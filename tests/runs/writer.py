"""A process that writes checkpoints until it is killed, for the tests that kill it.

Prints `ready`, then each step once its checkpoint is published. Usage: writer.py FOLDER FIRST_STEP
"""

from __future__ import annotations

import sys
from pathlib import Path

from tenon.runs.checkpoints import CheckpointStore

FILES = {"adapter.bin": 60_000, "optimizer/state.bin": 120_000, "loop.json": 300}


def content(step: int, name: str) -> bytes:
    """What file `name` of the checkpoint of `step` holds."""
    return f"{step}:{name};".encode() * (FILES[name] // 12)


def fill(step: int, folder: Path) -> None:
    """Write every file of the checkpoint of `step`."""
    for name in FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content(step, name))


def main() -> None:
    """Write checkpoint after checkpoint; every third one is the best so far."""
    store, step = CheckpointStore(Path(sys.argv[1]), keep=2), int(sys.argv[2])
    store.open()
    sys.stdout.write("ready\n")
    while True:
        sys.stdout.flush()
        store.write(step, lambda folder, step=step: fill(step, folder))
        if step % 3 == 0:
            store.mark_best(step)
        sys.stdout.write(f"{step}\n")
        step += 1


if __name__ == "__main__":
    main()
