"""Files and folders that are complete or absent, whatever kills the writer.

Written aside in the same folder, fsynced, renamed, and the folder fsynced. What is aside carries a flock for as long as
its writer lives, so that leftovers of killed writers can be told from work in progress and removed at the next open.
This module does not know what the files mean.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tenon.runs.space import disk_full, is_full

ASIDE = ".aside-"


def write_file_atomic(path: Path, data: bytes) -> None:
    """Write or replace one file: at every instant `path` is the old file, absent, or the new one, never a part.

    Raises RunError run-disk-full; other OSErrors as they come.
    """
    with _aside(path, need_bytes=len(data)) as aside:
        aside.write_bytes(data)
        _fsync(aside)
        aside.replace(path)
        _fsync(path.parent)


def write_folder_atomic(
    path: Path, writer: Callable[[Path], None], *, replace: bool = False, need_bytes: int | None = None
) -> None:
    """Let `writer` fill a folder, then give it its name: `path` is complete or absent.

    replace: an existing folder is moved aside first and removed afterwards; without it FileExistsError is raised.
    need_bytes: for the message when the disk is full. Raises RunError run-disk-full; the writer's errors as they come.
    """
    if path.exists() and not replace:
        raise FileExistsError(str(path))
    with _aside(path, folder=True, need_bytes=need_bytes) as aside:
        writer(aside)
        _fsync_tree(aside)
        retired = _retire(path) if replace else None
        aside.rename(path)
        _fsync(path.parent)
        if retired is not None:
            _remove(retired)


def remove_folder(path: Path) -> None:
    """Remove a folder so that it never shows half: its name goes first, then its contents."""
    retired = _retire(path)
    if retired is not None:
        _fsync(path.parent)
        _remove(retired)


def clean_leftovers(folder: Path) -> tuple[str, ...]:
    """Remove what killed writers left in `folder`; work in progress of living ones stays. Returns the removed names."""
    removed = []
    for leftover in sorted(folder.glob(f"{ASIDE}*")):
        if _writer_is_gone(leftover):
            _remove(leftover)
            removed.append(leftover.name)
    return tuple(removed)


def _retire(path: Path) -> Path | None:
    """Take the name off a folder; None when there is none."""
    retired = path.parent / f"{ASIDE}{secrets.token_hex(6)}-{path.name}"
    try:
        path.rename(retired)
    except FileNotFoundError:
        return None
    return retired


@contextmanager
def _aside(path: Path, *, folder: bool = False, need_bytes: int | None = None) -> Iterator[Path]:
    """A fresh, locked place beside `path`; removed unless it was renamed away."""
    aside, handle = _create_locked(path, folder=folder, need_bytes=need_bytes)
    try:
        yield aside
    except Exception as error:
        _remove(aside)  # before measuring what is free
        if is_full(error):
            raise disk_full(path, need_bytes, f"writing {path.name}", error) from error
        raise
    except BaseException:
        _remove(aside)
        raise
    finally:
        os.close(handle)


def _create_locked(path: Path, *, folder: bool, need_bytes: int | None) -> tuple[Path, int]:
    while True:
        aside = path.parent / f"{ASIDE}{secrets.token_hex(6)}-{path.name}"
        try:
            if folder:
                aside.mkdir()
                handle = os.open(aside, os.O_RDONLY)
            else:
                handle = os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except OSError as error:
            if is_full(error):
                raise disk_full(path, need_bytes, f"writing {path.name}", error) from error
            raise
        # Some network file systems lock no folders: then nothing is ever taken for a leftover there.
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        # A cleaner may have come between creation and lock: then the name is gone, and another one is taken.
        with suppress(FileNotFoundError):
            if aside.stat().st_ino == os.fstat(handle).st_ino:
                return aside, handle
        os.close(handle)


def _writer_is_gone(leftover: Path) -> bool:
    try:
        handle = os.open(leftover, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place, ignore_errors=True)
    else:
        with suppress(OSError):
            place.unlink(missing_ok=True)


def _fsync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            _fsync(Path(root) / name)
        _fsync(Path(root))


def _fsync(place: Path) -> None:
    handle = os.open(place, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
