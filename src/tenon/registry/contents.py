"""What the files of a version hold, read so that nothing can change between the check and the use.

This module does not know what the files are for.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from tenon.errors import AdapterError
from tenon.registry.peft_check import MAX_FILE_BYTES
from tenon.runs.checkpoints import FileFacts
from tenon.units import format_bytes


def read_content(folder: Path, name: str, facts: FileFacts) -> bytearray:
    """What a file holds, which must be what was registered. Links are not followed, and nothing is mapped: a file that
    is cut short while it is mapped would end the process.

    Raises AdapterError adapter-damaged, adapter-too-large.
    """
    if facts.size_bytes > MAX_FILE_BYTES:
        raise AdapterError(
            "adapter-too-large",
            f"{folder / name}: no adapter file is larger than {format_bytes(MAX_FILE_BYTES)}",
            got=format_bytes(facts.size_bytes),
            hint="use another version",
        )
    try:
        handle = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        what = "is a link" if (folder / name).is_symlink() else "is missing"
        raise damaged(folder, f"{name} {what}", got=str(error.strerror)) from error
    with os.fdopen(handle, "rb", buffering=0) as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise damaged(folder, f"{name} is no file")
        if found.st_size != facts.size_bytes:
            raise damaged(folder, f"{name} has {found.st_size:,} bytes instead of {facts.size_bytes:,}")
        content = bytearray(facts.size_bytes)
        read_bytes = 0
        while read_bytes < len(content) and (count := file.readinto(memoryview(content)[read_bytes:])):
            read_bytes += count
    if read_bytes < len(content) or hashlib.sha256(content).hexdigest() != facts.sha256:
        raise damaged(folder, f"{name} does not hold what was registered")
    return content


def damaged(folder: Path, what: str, *, got: str = "") -> AdapterError:
    """The error of a version whose files are not what was registered."""
    return AdapterError(
        "adapter-damaged",
        f"{folder}: {what}",
        got=got,
        hint=f"use another version, or remove this one: tenon adapters remove {folder.parent.name}@{folder.name}",
    )
