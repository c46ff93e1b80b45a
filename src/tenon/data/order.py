"""The order of rows in every epoch, as a function of (seed, epoch) alone: no state is carried from one to the next.

Row indices are global: those of source 0 first, then those of source 1, and so on. This module does not know rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

_ROWS, _MIX = 0, 1


class RowOrder:
    """Which rows an epoch takes, and in which order.

    sizes: rows of each source. weights: passes over each source per epoch; a fraction takes another part of the source
    in each epoch, and comes round to every row before it repeats one. A source of weight above zero gives at least one
    row. shuffle False: each source in its own order, source after source.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], *, seed: int, shuffle: bool) -> None:
        self._sizes = tuple(sizes)
        self._takes = tuple(_take(size, weight) for size, weight in zip(sizes, weights, strict=True))
        self._firsts = tuple(sum(self._sizes[:source]) for source in range(len(self._sizes)))
        self._seed = seed
        self._shuffle = shuffle

    @property
    def epoch_rows(self) -> int:
        """Rows of every epoch."""
        return sum(self._takes)

    def epoch(self, number: int) -> np.ndarray:
        """Global row indices of epoch `number` (from 0) in order, int64."""
        parts = [self._part(source, number) for source in range(len(self._sizes))]
        rows = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
        if self._shuffle and len(parts) > 1:
            rows = rows[permutation(len(rows), self._seed, _MIX, number)]
        return rows

    def _part(self, source: int, epoch: int) -> np.ndarray:
        """Rows of the source: a window of the endless row of its passes, each pass a permutation of its own."""
        size, take = self._sizes[source], self._takes[source]
        if take == 0:
            return np.zeros(0, dtype=np.int64)
        start, stop = epoch * take, (epoch + 1) * take
        pieces = [
            self._pass(source, number)[max(start - number * size, 0) : stop - number * size]
            for number in range(start // size, (stop - 1) // size + 1)
        ]
        return np.concatenate(pieces) + self._firsts[source]

    def _pass(self, source: int, number: int) -> np.ndarray:
        size = self._sizes[source]
        if not self._shuffle:
            return np.arange(size, dtype=np.int64)
        return permutation(size, self._seed, _ROWS, source, number)


def _take(size: int, weight: float) -> int:
    if size == 0 or weight <= 0:
        return 0
    return max(1, round(size * weight))


def permutation(size: int, seed: int, *counters: int) -> np.ndarray:
    """A permutation of range(size) that depends on the seed and the counters alone, int64.

    Drawn by sorting the raw words of Philox, whose values are part of its definition: it is the same in every version
    of numpy, so that a run resumes exactly.
    """
    text = ",".join(map(str, (seed, *counters)))
    key = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), dtype="<u8")
    words = np.random.Philox(key=key).random_raw(size)
    return np.argsort(words, kind="stable").astype(np.int64)
