"""What the data are and what became of every row: counts, reasons, lengths, problems. Nothing is dropped silently.

This module does not know how rows are read or tokenised.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from tenon.errors import DataError
from tenon.values import Value

# Upper edges of the length histogram, in tokens: doubling, with a step between.
LENGTH_EDGES = tuple(sorted({2**n for n in range(4, 21)} | {3 * 2**n for n in range(4, 19)}))
LONGEST_SHOWN = 5
PLACES_SHOWN = 5
WORTH_A_WARNING = 0.05


class Problem(Value):
    """Something that stops a run (or would): the parts of the error."""

    code: str
    what: str
    got: str = ""
    hint: str = ""


class Drop(Value):
    """Rows that are not used, for one reason. places: `file:line` of the first of them."""

    code: str
    reason: str
    rows: int
    places: tuple[str, ...]


class LongRow(Value):
    """One of the longest rows. tokens: its length before any cut."""

    source: str
    tokens: int


class SourceReport(Value):
    """One source. formats: each format met, with the reason. rows_read: good and bad ones. repeated: rows that hold
    what an earlier row of the same side holds. kept: rows of it in train or validation. weight: passes per epoch.
    """

    path: str
    role: Literal["train", "validation"]
    files: int
    formats: tuple[tuple[str, str], ...]
    weight: float
    rows_read: int
    repeated: int
    shared: int
    kept: int
    drops: tuple[Drop, ...] = ()


class LengthReport(Value):
    """Lengths of the training rows. edges: n + 1 token counts. counts: rows with edges[i] <= length < edges[i + 1]."""

    edges: tuple[int, ...]
    counts: tuple[int, ...]
    mean_tokens: float
    median_tokens: int
    longest: tuple[LongRow, ...]


class DataReport(Value):
    """The whole data of one slot.

    complete: every row was tokenised; else figures in tokens cover `tokenised` rows of both sides. repeated: rows that
    hold what an earlier row holds. shared: train rows taken out because a validation source holds them too. shortened:
    rows cut to the limit. problems: what stops a run. warnings: what it should know.
    """

    sources: tuple[SourceReport, ...]
    train_rows: int
    validation_rows: int
    repeated: int
    repeated_dropped: bool
    shared: int
    shortened: int
    drops: tuple[Drop, ...]
    complete: bool
    tokenised: int
    train_tokens: int
    train_supervised_tokens: int
    validation_tokens: int
    validation_supervised_tokens: int
    lengths: LengthReport | None
    labels: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def rows_read(self) -> int:
        """Rows of all sources."""
        return sum(source.rows_read for source in self.sources)


class Findings:
    """Collects what is wrong: raises at once for a run, notes everything for a report.

    strict: raise the first problem.
    """

    def __init__(self, *, strict: bool) -> None:
        self._strict = strict
        self.problems: list[Problem] = []
        self.warnings: list[str] = []

    def problem(self, error: DataError) -> None:
        """A problem that stops a run."""
        if self._strict:
            raise error
        self.problems.append(Problem(code=error.code, what=error.what, got=error.got, hint=error.hint))

    def warn(self, text: str) -> None:
        """Something to know."""
        self.warnings.append(text)


def describe_lengths(full: np.ndarray, longest: Sequence[LongRow]) -> LengthReport | None:
    """Histogram over the lengths (int32), its empty ends cut off; None without rows."""
    if not len(full):
        return None
    edges = np.array((0, *LENGTH_EDGES, 1 << 31), dtype=np.int64)
    counts, _ = np.histogram(full, bins=edges)
    filled = np.flatnonzero(counts)
    first, last = int(filled[0]), int(filled[-1])
    return LengthReport(
        edges=tuple(int(edge) for edge in edges[first : last + 2]),
        counts=tuple(int(count) for count in counts[first : last + 1]),
        mean_tokens=round(float(full.mean()), 2),
        median_tokens=int(np.median(full)),
        longest=tuple(longest),
    )


def merge_drops(drops: Iterable[Drop]) -> tuple[Drop, ...]:
    """One entry a code, the most frequent first."""
    merged: dict[str, Drop] = {}
    for drop in drops:
        known = merged.get(drop.code)
        if known is None:
            merged[drop.code] = drop
            continue
        places = (known.places + drop.places)[:PLACES_SHOWN]
        merged[drop.code] = known.model_copy(update={"rows": known.rows + drop.rows, "places": places})
    return tuple(sorted(merged.values(), key=lambda drop: (-drop.rows, drop.code)))


class SampleRow(Value):
    """One row as the model will see it. pieces: (text of one or more tokens, whether they are supervised)."""

    source: str
    pieces: tuple[tuple[str, bool], ...]
    tokens: int
    supervised: int
