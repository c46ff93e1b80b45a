"""How fast a disk writes and reads: measured with one file of bounded size, which is removed again.

This module does not know what the disk is for.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from tenon.runs.space import free_bytes
from tenon.values import Value

FILE_BYTES = 256 * 1024**2
MOST_SECONDS = 3.0
_PIECE_BYTES = 4 * 1024**2


class DiskSpeed(Value):
    """Speeds in bytes a second, None when nothing was measured; problem says why then."""

    folder: str
    free_bytes: int
    write_bytes_per_second: float | None = None
    read_bytes_per_second: float | None = None
    problem: str = ""


def measure_disk(folder: Path, *, file_bytes: int = FILE_BYTES, most_seconds: float = MOST_SECONDS) -> DiskSpeed:
    """Write a file to disk, and read it back past the cache of the kernel, each for at most so many seconds."""
    free = free_bytes(folder)
    if free < 2 * file_bytes:
        return DiskSpeed(folder=str(folder), free_bytes=free, problem="too little free space to measure")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, prefix="doctor-") as file:
            handle = file.fileno()
            write = _write(handle, file_bytes, most_seconds)
            read = _read(handle, most_seconds)
    except OSError as error:
        return DiskSpeed(folder=str(folder), free_bytes=free, problem=str(error))
    return DiskSpeed(folder=str(folder), free_bytes=free, write_bytes_per_second=write, read_bytes_per_second=read)


def _write(handle: int, file_bytes: int, most_seconds: float) -> float:
    # Random, so that a file system that compresses has work to do.
    piece = os.urandom(min(_PIECE_BYTES, file_bytes))
    written, started = 0, time.monotonic()
    while written < file_bytes and time.monotonic() - started < most_seconds:
        written += os.write(handle, piece)
    os.fsync(handle)
    return written / max(time.monotonic() - started, 1e-9)


def _read(handle: int, most_seconds: float) -> float:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.lseek(handle, 0, os.SEEK_SET)
    found, started = 0, time.monotonic()
    while time.monotonic() - started < most_seconds and (piece := os.read(handle, _PIECE_BYTES)):
        found += len(piece)
    return found / max(time.monotonic() - started, 1e-9)
