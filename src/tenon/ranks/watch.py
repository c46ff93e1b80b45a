"""Watches the processes of the other ranks, and the one that started them all, from a thread.

A rank that waits for its device, in a collective whose other side is gone, hears no signal and raises nothing. This
thread sees the process vanish, gives the loop some time to notice by itself, and then ends this one. This module does
not know what ranks say to each other.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import psutil
from torch.distributed.distributed_c10d import Store

_POLL_SECONDS = 0.25
_PARTING_SECONDS = 5.0


class RankWatch:
    """Watches from its making until `stop`."""

    def __init__(
        self, store: Store, number: int, count: int, *, on_lost: Callable[[str], None], grace_seconds: float
    ) -> None:
        """on_lost: told who is gone, in words; it has to end the process. grace_seconds: what the loop may take to
        notice a loss by itself, and to leave with its error.
        """
        store.set(f"process-{number}", str(os.getpid()))
        others = [other for other in range(count) if other != number]
        # Each rank's key is waited for: all are starting, or have met already.
        self._others = {f"rank {n}": _process(int(store.get(f"process-{n}"))) for n in others}
        self._parent, self._on_lost, self._grace_seconds = os.getppid(), on_lost, grace_seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="rank-watch", daemon=True)
        self._thread.start()

    def outlive_first(self) -> None:
        """Wait a little for the end of the first rank."""
        until, first = time.monotonic() + _PARTING_SECONDS, self._others.get("rank 0")
        while first is not None and _lives(first) and time.monotonic() < until:
            time.sleep(0.02)

    def stop(self) -> None:
        """The others may go."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(_POLL_SECONDS):
            if os.getppid() != self._parent:
                # Nobody is left to say it to the loop, and nobody waits for what it would save.
                self._on_lost("the process that started the ranks")
            gone = [name for name, process in self._others.items() if process is None or not _lives(process)]
            if gone:
                if not self._over.wait(self._grace_seconds):
                    self._on_lost(gone[0])
                return


def _process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
