"""Cuts a JSON array into its elements without holding the array: a scan over brackets finds where each one ends.

This module does not parse elements and does not know files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from tenon.errors import DataError

# Strings, and the brackets outside of them. A string that the buffer cuts off matches up to the buffer's end.
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[{}\[\]]', re.DOTALL)
_BETWEEN = b" \t\r\n,"


class Element(NamedTuple):
    """The raw bytes of one element of the array, and the line where it begins."""

    line: int
    raw: bytes


class ArrayScanner:
    """Feed it the bytes of a file that begins with `[`; it yields each element as soon as it is whole."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._buffer = b""
        self._scanned = 0
        # Where the current element, or the gap before the next one, begins in the buffer; and the line of that place.
        self._begin = 0
        self._line = 1
        self._depth = 0

    def feed(self, chunk: bytes) -> Iterator[Element]:
        """Elements that end within what was fed so far."""
        self._buffer = self._buffer[self._begin :] + chunk
        self._scanned -= self._begin
        self._begin = 0
        return self._scan(last=False)

    def finish(self) -> Iterator[Element]:
        """What is left at the end of the file. Raises DataError data-json-broken when the array never ended."""
        yield from self._scan(last=True)
        if self._depth > 0:
            raise DataError(
                "data-json-broken",
                f"{self._name}:{self._line}: the array that the file begins with never ends",
                hint="the file was cut off, or a bracket or quote is missing: make or copy it again",
            )
        yield from self._gap(len(self._buffer))

    def _scan(self, *, last: bool) -> Iterator[Element]:
        for match in _TOKEN.finditer(self._buffer, self._scanned):
            token = match[0]
            if token[:1] == b'"':
                if match.end() == len(self._buffer) and not last:
                    return
            elif token in b"{[":
                yield from self._open(match.start(), match.end())
            else:
                yield from self._close(match.start(), match.end())
            self._scanned = match.end()

    def _open(self, start: int, end: int) -> Iterator[Element]:
        if self._depth < 2:
            yield from self._gap(start)
        self._depth += 1
        if self._depth == 1:
            self._move(end)

    def _close(self, start: int, end: int) -> Iterator[Element]:
        self._depth -= 1
        if self._depth == 1:
            yield Element(self._line, self._buffer[self._begin : end])
            self._move(end)
        elif self._depth == 0:
            yield from self._gap(start)
            self._move(end)

    def _gap(self, stop: int) -> Iterator[Element]:
        """Anything but commas and space between two elements is an element too: a number, a string, a slip."""
        gap = self._buffer[self._begin : stop]
        stripped = gap.strip(_BETWEEN)
        if stripped:
            self._move(self._begin + gap.index(stripped))
            yield Element(self._line, stripped)
        self._move(stop)

    def _move(self, position: int) -> None:
        self._line += self._buffer.count(b"\n", self._begin, position)
        self._begin = position
