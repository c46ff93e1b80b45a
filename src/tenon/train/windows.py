"""Which rows the next optimiser step of a slot takes: a pure function of the plan and a cursor.

A cursor counts rows since the start of the run; the order of an epoch's rows is a function of (seed, epoch) alone, so a
resumed run takes exactly the rows that it would have taken. This module does not know tensors or adapters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tenon.data.order import RowOrder
from tenon.plan.values import BatchPlan, LimitsPlan


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a slot stands: optimiser steps done, rows taken, seconds trained (for a time limit)."""

    step: int = 0
    rows: int = 0
    seconds: float = 0.0


class WindowFeed:
    """Cuts the endless row order of a slot into windows, one for each optimiser step."""

    def __init__(self, order: RowOrder, batch: BatchPlan, limits: LimitsPlan, length: Callable[[int], int]) -> None:
        """length: tokens of a row, asked only when windows are cut by tokens."""
        self._order, self._batch, self._limits, self._length = order, batch, limits, length
        self._epoch = -1
        self._epoch_rows = np.zeros(0, dtype=np.int64)
        rows = order.epoch_rows
        self.total_rows = max(1, round(limits.epochs * rows)) if limits.epochs > 0 else 0

    @property
    def epoch_rows(self) -> int:
        """Rows of one epoch, dropped ones included."""
        return self._order.epoch_rows

    def progress(self, cursor: Cursor) -> float:
        """Share of the run that is done: of its rows, its steps or its time, whichever is furthest; 1.0 is the end."""
        limits = self._limits
        shares = [0.0]
        if self.total_rows:
            shares.append(cursor.rows / self.total_rows)
        if limits.steps:
            shares.append(cursor.step / limits.steps)
        if limits.minutes:
            shares.append(cursor.seconds / (60.0 * limits.minutes))
        return min(1.0, max(shares))

    def steps(self, cursor: Cursor) -> int:
        """All steps of the run: exact for windows of rows, an estimate from the steps so far for windows of tokens."""
        limits = self._limits
        candidates = [limits.steps] if limits.steps else []
        if self.total_rows and self._batch.rows:
            candidates.append(-(-self.total_rows // self._batch.rows))
        elif self.total_rows and cursor.rows:
            candidates.append(max(cursor.step, round(cursor.step * self.total_rows / cursor.rows)))
        return min(candidates, default=0)

    def next(self, cursor: Cursor) -> list[int]:
        """Row indices of the step at this cursor; empty when the run is over."""
        if self.progress(cursor) >= 1.0:
            return []
        rows: list[int] = []
        tokens = 0
        while not self.total_rows or cursor.rows + len(rows) < self.total_rows:
            if self._batch.rows and len(rows) == self._batch.rows:
                break
            row = self._row_at(cursor.rows + len(rows))
            if self._batch.tokens:
                tokens += self._length(row)
                # Rows that the data policy drops have no tokens: an epoch of nothing else would never fill a window.
                if rows and (tokens > self._batch.tokens or (not tokens and len(rows) >= self.epoch_rows)):
                    break
            rows.append(row)
        return rows

    def _row_at(self, place: int) -> int:
        epoch, offset = divmod(place, self._order.epoch_rows)
        if epoch != self._epoch:
            self._epoch, self._epoch_rows = epoch, self._order.epoch(epoch)
        return int(self._epoch_rows[offset])


def draw_key(seed: int, step: int, place: int) -> int:
    """The dropout key (signed 32 bits) of the row at a place of a step's window."""
    digest = hashlib.blake2b(f"{seed}:{step}:{place}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, signed=True)
