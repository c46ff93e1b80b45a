"""One slot in training: its plan, its rows, its optimiser, and where it stands.

This module does not know the decoder or the other slots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from tenon.adapters.bank import Slot
from tenon.data.pack import PackRow
from tenon.errors import DataError
from tenon.plan.values import SlotPlan
from tenon.train.optimizers import SlotOptimizer
from tenon.train.schedule import factor
from tenon.train.windows import Cursor, WindowFeed, draw_key


class TokenisedRow(Protocol):
    """A row as token ids (int32) with its loss mask (bool) and its `file:line`."""

    @property
    def ids(self) -> np.ndarray: ...
    @property
    def supervised(self) -> np.ndarray: ...
    @property
    def source(self) -> str: ...


class Rows(Protocol):
    """Rows by index; they may be tokenised when asked for."""

    def row(self, index: int) -> TokenisedRow:
        """One row."""
        ...


@dataclass(frozen=True, slots=True)
class Best:
    """The best validation so far: its metric, the step, and how many validations came since without improvement."""

    value: float
    step: int
    since: int = 0


@dataclass(slots=True)
class SlotTraining:
    """The mutable state of one slot's training; everything in it but the fixed parts goes into a checkpoint.

    number: the slot in the bank. taken_rows: rows that the window being worked on took from the feed. validated: the
    step of the last validation (0: none). ended: why it takes no more steps ("" while it does).
    """

    number: int
    plan: SlotPlan
    slot: Slot
    feed: WindowFeed
    rows: Rows
    optimizer: SlotOptimizer
    cursor: Cursor = field(default_factory=Cursor)
    best: Best | None = None
    validated: int = 0
    taken_rows: int = 0
    ended: str = ""

    @property
    def steps(self) -> int:
        """All steps of the slot's run, as far as known; 0 when only a time limit ends it."""
        return self.feed.steps(self.cursor)

    @property
    def progress(self) -> float:
        """Share of the slot's run that is done; 1 once it has ended."""
        return 1.0 if self.ended else self.feed.progress(self.cursor)

    def window(self) -> list[PackRow]:
        """The rows of the next step; empty when the slot's run is over.

        Rows that the data policy drops are empty; a window of nothing else is passed over without a step. Raises
        DataError data-no-supervised when a whole epoch, or all of the run, has been passed over.
        """
        passed_rows = 0
        while not self.ended:
            indices = self.feed.next(self.cursor)
            packed = [row for place, index in enumerate(indices) if (row := self._pack(place, index)) is not None]
            self.taken_rows = len(indices)
            if packed:
                return packed
            self.cursor = replace(self.cursor, rows=self.cursor.rows + len(indices))
            passed_rows += len(indices)
            if self.feed.progress(self.cursor) >= 1.0 or not indices:
                self.ended = "done"
            if passed_rows >= self.feed.epoch_rows or (self.ended and not self.cursor.step):
                raise self._nothing_to_learn(passed_rows)
        return []

    def _nothing_to_learn(self, passed_rows: int) -> DataError:
        return DataError(
            "data-no-supervised",
            f"slot {self.plan.name}: {passed_rows} rows in a row were dropped: there is nothing to learn",
            hint="see why with `tenon data`, and correct data.supervise, data.on_long or the rows",
        )

    def _pack(self, place: int, index: int) -> PackRow | None:
        row = self.rows.row(index)
        if not len(row.ids):
            return None
        return PackRow(self.number, row.ids, row.supervised, index, draw_key(self.plan.seed, self.cursor.step, place))

    def learning_factor(self) -> float:
        """The schedule's factor for the step whose window was taken last.

        Progress is taken before the step, but during warm-up after it, so that no step is wasted on a rate of zero and
        the last one of the warm-up has the peak. (A time limit alone cannot tell how far a step will go.)
        """
        now, schedule = self.cursor, self.plan.schedule
        done = self.feed.progress(now)
        if done >= schedule.warmup:
            return factor(schedule, done)
        after = Cursor(now.step + 1, now.rows + self.taken_rows, now.seconds)
        return factor(schedule, min(self.feed.progress(after), schedule.warmup))

    def advance(self, seconds: float) -> None:
        """Count a finished step, and end the slot's run when a limit is reached."""
        now = self.cursor
        self.cursor = Cursor(now.step + 1, now.rows + self.taken_rows, now.seconds + seconds)
        if self.feed.progress(self.cursor) >= 1.0:
            self.ended = "done"

    @property
    def validation_due(self) -> bool:
        """Whether the step just done is to be validated: every so many steps, and at the end."""
        step, every = self.cursor.step, self.plan.validation.every
        if step == self.validated:
            return False
        return bool(self.ended) or (every > 0 and step % every == 0)

    def judge(self, value: float, *, higher_is_better: bool) -> bool:
        """Take note of a validation; true when it is the best so far. Ends the run when patience is at its end.

        NaN is never an improvement.
        """
        validation = self.plan.validation
        self.validated = self.cursor.step
        sign = 1.0 if higher_is_better else -1.0
        if self.best is None and math.isnan(value):
            return False
        if self.best is None or sign * (value - self.best.value) > validation.min_delta:
            self.best = Best(value, self.cursor.step)
            return True
        self.best = replace(self.best, since=self.best.since + 1)
        if validation.patience and self.best.since >= validation.patience:
            self.ended = "early stop"
        return False
