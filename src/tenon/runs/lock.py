"""One process a run: a flock that dies with its holder, so that nothing stale ever blocks.

The file's content (pid, host, since) only helps messages; the lock itself is the kernel's. A child process made by fork
shares the lock and keeps it for as long as it lives: children of a run are spawned. This module knows no run folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tenon.errors import RunError
from tenon.values import Value

# Whoever asks for the state of a run holds a shared lock for an instant; a new holder waits that long, and a bit.
_PATIENCE_SECONDS = 1.0


class Holder(Value):
    """Who took the lock, and when (unix seconds)."""

    pid: int
    host: str
    since: float


@contextmanager
def hold(path: Path, *, patience_seconds: float = _PATIENCE_SECONDS) -> Iterator[Holder]:
    """Hold the lock file `path` for the length of the block.

    Raises RunError run-busy, naming the holder, and run-not-writable.
    """
    try:
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise not_writable(path.parent, error) from error
    try:
        if not _try_lock(handle, patience_seconds):
            raise _busy(path)
        holder = Holder(pid=os.getpid(), host=socket.gethostname(), since=time.time())
        with suppress(OSError):  # on a full disk the lock still holds, it only cannot say whose it is
            os.ftruncate(handle, 0)
            os.pwrite(handle, holder.to_json().encode(), 0)
        yield holder
    finally:
        os.close(handle)


def not_writable(folder: Path, error: OSError) -> RunError:
    """The error of a folder that this user may not write to."""
    return RunError(
        "run-not-writable",
        f"{folder}: the folder cannot be written",
        got=error.strerror or type(error).__name__,
        hint="choose a folder that you may write to",
    )


def holder_of(path: Path) -> Holder | None:
    """Who holds the lock now; None when nobody does. A holder that has not yet written its name has pid 0."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read_holder(path)
    finally:
        os.close(handle)
    return None


def _try_lock(handle: int, patience_seconds: float) -> bool:
    give_up = time.monotonic() + patience_seconds
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > give_up:
                return False
            time.sleep(0.05)
        else:
            return True


def _busy(path: Path) -> RunError:
    holder = _read_holder(path)
    who = f"process {holder.pid} on {holder.host}" if holder.pid else "another process"
    hint = "wait for it, or stop it first (Ctrl-C or `kill -TERM` saves a checkpoint)"
    if holder.host == socket.gethostname() and holder.pid and not _lives(holder.pid):
        hint = "that process is gone, but a child of it still holds the run: stop the child"
    return RunError("run-busy", f"{path.parent}: the run is in use by {who}", hint=hint)


def _read_holder(path: Path) -> Holder:
    try:
        return Holder.model_validate(json.loads(path.read_bytes()))
    except (ValueError, FileNotFoundError):
        return Holder(pid=0, host="", since=0.0)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
