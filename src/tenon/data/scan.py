"""Scans a byte range of a JSONL file: parses each line, checks it, hashes what it holds. The hot loop of the index.

This module does not know caches, formats or other ranges.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from tenon.data.convert import Converter, make_converter
from tenon.data.formats import Format
from tenon.data.messages import BadRowError, shape_error
from tenon.data.readers import ENCODING_HINT, snippet
from tenon.data.rows import HASH_BYTES, Chat, row_tree
from tenon.data.spool import BAD_KEPT, BadRow

READ_BYTES = 4 << 20
# A key in canonical JSON: inside of a string its quotes would be escaped.
REASONING = b'"reasoning_content":'


@dataclass(frozen=True, slots=True, eq=False)
class Scan:
    """What one byte range holds. lines count from 1 at the first line that begins in the range."""

    offsets: np.ndarray
    sizes: np.ndarray
    lines: np.ndarray
    hashes: np.ndarray
    label_ids: np.ndarray
    labels: list[str]
    bad: list[BadRow]
    bad_counts: dict[str, int]
    line_count: int
    with_tools: int
    with_reasoning: int


@dataclass(frozen=True, slots=True)
class ScanTask:
    """Scan the lines that begin in [start, stop) of a JSONL file."""

    path: Path
    start: int
    stop: int
    first: int
    form: Format

    def run(self, memo: dict[Any, Any]) -> Scan:  # noqa: ARG002  the protocol of tasks
        """The scan; never raises for what the rows hold."""
        return _Scanner(make_converter(self.form)).scan(self)


class _Scanner:
    """The hot loop: about 6 microseconds a row."""

    def __init__(self, convert: Converter) -> None:
        self._convert = convert
        self._parts: list[tuple[np.ndarray, ...]] = []
        self._label_ids: dict[str | None, int] = {None: -1}
        self._bad: list[BadRow] = []
        self._bad_counts: dict[str, int] = {}
        self._line = 0
        self._with_tools = 0
        self._with_reasoning = 0

    def scan(self, task: ScanTask) -> Scan:
        with task.path.open("rb", buffering=0) as stream:
            position = task.start
            if position > task.first:
                position = _next_line(stream, position)
            stream.seek(position)
            rest = b""
            while position < task.stop:
                chunk = stream.read(READ_BYTES)
                lines = (rest + chunk).split(b"\n")
                rest = lines.pop()
                if not chunk:
                    lines, rest = ([rest] if rest else []), b""
                position = self._scan_lines(lines, position, task.stop)
                if not chunk:
                    break
        parts = self._parts or [_no_rows()]
        offsets, sizes, lines, hashes, label_ids = (np.concatenate(column) for column in zip(*parts, strict=True))
        labels = [label for label in self._label_ids if label is not None]
        return Scan(
            offsets=offsets,
            sizes=sizes,
            lines=lines,
            hashes=hashes,
            label_ids=label_ids,
            labels=labels,
            bad=self._bad,
            bad_counts=self._bad_counts,
            line_count=self._line,
            with_tools=self._with_tools,
            with_reasoning=self._with_reasoning,
        )

    def _scan_lines(self, lines: list[bytes], position: int, stop: int) -> int:
        """Take the lines that begin before `stop`; the byte position after them."""
        offsets: list[int] = []
        numbers: list[int] = []
        sizes: list[int] = []
        labels: list[int] = []
        digests: list[bytes] = []
        convert, label_ids, loads = self._convert, self._label_ids, orjson.loads
        dumps, sorted_keys = orjson.dumps, orjson.OPT_SORT_KEYS
        number = self._line
        for raw in lines:
            if position >= stop:
                break
            number += 1
            size = len(raw)
            try:
                tree = loads(raw)
                if type(tree) is not dict:
                    raise shape_error("the row is not an object", snippet(raw))
                row = convert(tree, "")
            except (BadRowError, orjson.JSONDecodeError) as error:
                self._note(raw, number, error)
                position += size + 1
                continue
            canonical = dumps(row_tree(row), option=sorted_keys)
            label = None
            if type(row) is Chat:
                label = row.label
                self._with_tools += row.tools is not None
                self._with_reasoning += REASONING in canonical
            if label not in label_ids:
                label_ids[label] = len(label_ids) - 1
            digests.append(blake2b(canonical, digest_size=HASH_BYTES).digest())
            offsets.append(position)
            sizes.append(size)
            numbers.append(number)
            labels.append(label_ids[label])
            position += size + 1
        self._line = number
        if offsets:
            self._parts.append(
                (
                    np.array(offsets, dtype=np.int64),
                    np.array(sizes, dtype=np.int32),
                    np.array(numbers, dtype=np.int64),
                    np.frombuffer(b"".join(digests), dtype="<u8"),
                    np.array(labels, dtype=np.int32),
                )
            )
        return position

    def _note(self, raw: bytes, number: int, error: Exception) -> None:
        if not raw.strip():
            return
        bad = _why_bad(raw, number, error)
        self._bad_counts[bad.code] = self._bad_counts.get(bad.code, 0) + 1
        if len(self._bad) < BAD_KEPT:
            self._bad.append(bad)


def _next_line(stream: Any, position: int) -> int:
    """Where the first line begins that starts at or after `position`."""
    position -= 1
    stream.seek(position)
    while chunk := stream.read(1 << 16):
        found = chunk.find(b"\n")
        if found >= 0:
            return position + found + 1
        position += len(chunk)
    return position


def _no_rows() -> tuple[np.ndarray, ...]:
    return tuple(np.zeros(0, dtype=kind) for kind in (np.int64, np.int32, np.int64, np.uint64, np.int32))


def _why_bad(raw: bytes, number: int, error: Exception) -> BadRow:
    if isinstance(error, BadRowError):
        return BadRow(number, error.code, error.reason, error.got, error.hint)
    try:
        raw.decode()
    except UnicodeDecodeError as wrong:
        got = f"byte 0x{raw[wrong.start]:02x} at column {wrong.start + 1}"
        return BadRow(number, "data-encoding", "the line is not UTF-8", got, ENCODING_HINT)
    why = f"{error.msg} at column {error.colno}" if isinstance(error, orjson.JSONDecodeError) else str(error)
    hint = "correct the line, or set data.on_bad: drop"
    return BadRow(number, "data-json-broken", f"broken JSON: {why}", snippet(raw), hint)
