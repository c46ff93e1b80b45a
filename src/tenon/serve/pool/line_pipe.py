"""Lines to and from a process that is never waited for: what cannot be written now is kept, what has come is given.

This module does not know what the lines say.
"""

from __future__ import annotations

import os
from collections import deque

_READ_BYTES = 1 << 18
# What one write takes of a line: a view costs nothing, and pipes take at most so much anyway.
_WRITE_BYTES = 1 << 16


class LinePipe:
    """Two file descriptors. `reading` and `writing`: to watch; `writing` only while `pending`."""

    def __init__(self, *, reading: int, writing: int) -> None:
        self.reading, self.writing = reading, writing
        os.set_blocking(reading, False)
        os.set_blocking(writing, False)
        self._unread = bytearray()
        self._unwritten: deque[memoryview] = deque()
        self.ended = self._shut = False

    @property
    def pending(self) -> bool:
        """Whether lines still wait to be written."""
        return bool(self._unwritten)

    def send(self, line: str) -> None:
        """Write a line, now or when there is room. What nobody reads any more is dropped: `receive` tells the end."""
        if not self._shut:
            self._unwritten.append(memoryview(line.encode() + b"\n"))
            self.flush()

    def shut(self) -> None:
        """The descriptors are no longer its own."""
        self.ended = self._shut = True
        self._unwritten.clear()

    def flush(self) -> None:
        """Write as much of what waits as goes."""
        while self._unwritten:
            first = self._unwritten[0]
            try:
                written = os.write(self.writing, first[:_WRITE_BYTES])
            except BlockingIOError:
                return
            except BrokenPipeError:
                self._unwritten.clear()
                return
            if written == len(first):
                self._unwritten.popleft()
            else:
                self._unwritten[0] = first[written:]

    def receive(self) -> list[bytes]:
        """The whole lines that have come; `ended` is True once no more will."""
        while not self.ended:
            try:
                data = os.read(self.reading, _READ_BYTES)
            except BlockingIOError:
                break
            self._unread += data
            self.ended = not data
            if len(data) < _READ_BYTES:
                break
        whole, found, rest = self._unread.rpartition(b"\n")
        if not found:
            return []
        self._unread = rest
        return bytes(whole).split(b"\n")
