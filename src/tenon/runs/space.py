"""Disk space: asked for before something is written, and named when it has run out.

Quotas do not show in the free space of a file system: they are met only while writing, and reported the same way.
This module does not know what is written.
"""

from __future__ import annotations

import errno
import re
import shutil
from pathlib import Path

from tenon.errors import RunError
from tenon.units import format_bytes

_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# Writers in other languages (safetensors) report the operating system's words instead of an OSError.
_FULL_WORDS = re.compile(r"No space left on device|Disk quota exceeded|File too large")


def free_bytes(path: Path) -> int:
    """Free bytes of the file system that holds `path`, or would hold it."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def require_space(path: Path, need_bytes: int, why: str) -> None:
    """Refuse early: raises RunError run-disk-full unless `need_bytes` are free where `path` lies."""
    free = free_bytes(path)
    if free < need_bytes:
        raise disk_full(path, need_bytes, why)


def disk_full(path: Path, need_bytes: int | None, why: str, error: Exception | None = None) -> RunError:
    """The error of a full disk (or quota, or file size limit), with what is needed and what is free.

    error: what the system said; a quota or a limit is full while the disk is not.
    """
    need = f"needed {format_bytes(need_bytes)}, " if need_bytes is not None else ""
    said = _FULL_WORDS.search(str(error))
    return RunError(
        "run-disk-full",
        f"{path}: no space for {why}",
        got=(f"{said[0]}; " if said else "") + f"{need}free {format_bytes(free_bytes(path))}",
        hint="free some space; earlier checkpoints are intact and `tenon resume RUN` goes on from the newest",
    )


def is_full(error: Exception) -> bool:
    """Whether `error` says that the disk, the quota or the file size limit is exhausted."""
    if isinstance(error, OSError):
        return error.errno in _FULL_ERRNOS
    return _FULL_WORDS.search(str(error)) is not None
