"""Tokens on disk: a shard holds the tokens of a run of neighbouring rows, in one file that is complete or absent.

Shape legend: N rows of the shard, T tokens of all of them. A word is a token id with the supervised flag in its sign
bit. This module does not know where tokens come from or what is done with rows that are too long.

File: five little-endian int32 (magic, N, T, bytes of faults, CRC-32 of the rest), then int32 offsets (N + 1), full
lengths (N), supervised tokens (N), words (T), then the faults as JSON.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orjson

SHARD_ROWS = 2048
MAGIC = 0x74656E31
HEADER = 5
FLAG = np.int32(-(1 << 31))
MASK = np.int32((1 << 31) - 1)
NOTHING = np.zeros(0, dtype=np.int32)


class Fault(NamedTuple):
    """Why a row could not be rendered: what a DataError about it says."""

    code: str
    reason: str
    got: str
    hint: str


@dataclass(frozen=True, slots=True, eq=False)
class Tokenised:
    """One row's tokens. words: int32, at most the longest row allowed. full_tokens: its length before that cut."""

    words: np.ndarray
    full_tokens: int
    supervised_tokens: int
    fault: Fault | None = None


def make_words(ids: Sequence[int], supervised: Sequence[bool], max_tokens: int) -> Tokenised:
    """Pack ids and flags into words, cut at max_tokens."""
    words = np.array(ids[:max_tokens], dtype=np.int32)
    flags = np.array(supervised[:max_tokens], dtype=bool)
    words[flags] |= FLAG
    return Tokenised(words, len(ids), int(flags.sum()))


def word_ids(words: np.ndarray) -> np.ndarray:
    """Token ids, int32."""
    return words & MASK


def word_flags(words: np.ndarray) -> np.ndarray:
    """Which tokens are supervised, bool."""
    return words < 0


class ShardDamagedError(Exception):
    """The file is not what was written."""


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """An opened shard; arrays are views of the mapped file. offsets (N + 1), full (N), supervised (N), words (T)."""

    offsets: np.ndarray
    full: np.ndarray
    supervised: np.ndarray
    words: np.ndarray
    faults: dict[int, Fault]

    def row(self, index: int) -> Tokenised:
        """Row `index` of the shard."""
        words = self.words[self.offsets[index] : self.offsets[index + 1]]
        return Tokenised(words, int(self.full[index]), int(self.supervised[index]), self.faults.get(index))


def write_shard(path: Path, rows: Sequence[Tokenised]) -> None:
    """Write the shard aside and rename it into place."""
    lengths = [len(row.words) for row in rows]
    body = np.concatenate(
        [
            np.concatenate([[0], np.cumsum(lengths)]).astype("<i4"),
            np.array([row.full_tokens for row in rows], dtype="<i4"),
            np.array([row.supervised_tokens for row in rows], dtype="<i4"),
            *(row.words.astype("<i4") for row in rows),
        ]
    ).tobytes()
    body += orjson.dumps({str(index): list(row.fault) for index, row in enumerate(rows) if row.fault is not None})
    faults_bytes = len(body) - 4 * (3 * len(rows) + 1 + sum(lengths))
    crc = np.array(zlib.crc32(body), dtype="<u4").view("<i4")
    header = np.array([MAGIC, len(rows), sum(lengths), faults_bytes, crc], dtype="<i4")
    descriptor, aside = tempfile.mkstemp(prefix=f"{path.stem}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as out:
            out.write(header.tobytes())
            out.write(body)
        Path(aside).rename(path)
    except OSError:
        Path(aside).unlink(missing_ok=True)
        raise


def open_shard(path: Path) -> Shard:
    """Map a shard and verify it. Raises ShardDamagedError."""
    try:
        data = np.memmap(path, dtype=np.uint8, mode="r")
    except ValueError as error:
        raise ShardDamagedError(f"{path} is empty") from error
    raw = np.asarray(data)
    if len(raw) < 4 * HEADER:
        raise ShardDamagedError(f"{path} is cut off")
    magic, rows, tokens, faults_bytes, crc = (int(each) for each in raw[: 4 * HEADER].view("<i4"))
    end = 4 * (HEADER + 3 * rows + 1 + tokens)
    body = raw[4 * HEADER :]
    if magic != MAGIC or len(raw) != end + faults_bytes or zlib.crc32(body.data) != crc & 0xFFFFFFFF:
        raise ShardDamagedError(f"{path} is damaged")
    numbers = raw[4 * HEADER : end].view("<i4")
    faults = {int(index): Fault(*fault) for index, fault in orjson.loads(raw[end:].tobytes()).items()}
    offsets, full, supervised, words = np.split(numbers, [rows + 1, 2 * rows + 1, 3 * rows + 1])
    return Shard(offsets, full, supervised, words, faults)
