"""Rows as the GPU benchmarks take them: drawn ids of one length, or banking77's rendered rows from a small file.

A file of rows holds, for each part (train, test), the ids of all rows end to end, their lengths, and which tokens are
supervised. This module knows numpy alone: peers' processes, which have no tenon, read the same file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

DRAWN_FROM, DRAWN_TO = 10, 40_000


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """Token ids of one row, and which of them carry loss (the first never does)."""

    ids: np.ndarray
    supervised: np.ndarray


def drawn_window(step: int, rows: int, row_tokens: int, vocab: int) -> list[Row]:
    """The rows of one step: ids at random as a function of the step, every token supervised."""
    draw = np.random.default_rng(step)
    ids = draw.integers(min(DRAWN_FROM, vocab - 1), min(DRAWN_TO, vocab), (rows, row_tokens))
    return [Row(row, np.ones(row_tokens, dtype=bool)) for row in ids]


def real_window(rows: Sequence[Row], step: int, count: int) -> list[Row]:
    """The rows of one step in the file's order, beginning again at its end."""
    return [rows[(step * count + i) % len(rows)] for i in range(count)]


def write_rows(path: Path, parts: Mapping[str, Sequence[Row]]) -> None:
    """Write all parts into one file; ids must be below 65,536."""
    arrays: dict[str, np.ndarray] = {}
    for part, rows in parts.items():
        ids = np.concatenate([row.ids for row in rows])
        if ids.max() >= 1 << 16:
            raise ValueError(f"{part}: id {ids.max()} does not fit two bytes")
        arrays[f"{part}_ids"] = ids.astype(np.uint16)
        arrays[f"{part}_lengths"] = np.array([len(row.ids) for row in rows], dtype=np.int32)
        arrays[f"{part}_supervised"] = np.packbits(np.concatenate([row.supervised for row in rows]))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def read_rows(path: Path, part: Literal["train", "test"]) -> list[Row]:
    """The rows of one part, ids as int64. Raises FileNotFoundError."""
    with np.load(path) as arrays:
        ids = arrays[f"{part}_ids"].astype(np.int64)
        cuts = np.cumsum(arrays[f"{part}_lengths"])[:-1]
        supervised = np.unpackbits(arrays[f"{part}_supervised"], count=len(ids)).astype(bool)
    return [Row(*pair) for pair in zip(np.split(ids, cuts), np.split(supervised, cuts), strict=True)]
