"""Rows of a data set as tokens, by index: what the trainer, the validation and the evaluation read.

Large data are tokenised in the background while rows are read already; a row that is not ready is made on the spot, the
same tokens either way. Shape legend: N rows of the store. This module does not know splits or epochs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from tenon.data.rows import Chat, Row
from tenon.data.shards import NOTHING, SHARD_ROWS, Fault, Tokenised, word_flags, word_ids
from tenon.data.spool import mapped_io
from tenon.data.tokens import ShardTask, TokenFile
from tenon.data.workers import BACKGROUND_NICE, WorkerPool
from tenon.errors import DataError, TenonError
from tenon.plan.values import DataPlan

log = logging.getLogger("tenon.data")
# What becomes of a tokenised row, before any policy.
KEPT, SHORTENED, LONG, UNSUPERVISED, FAULTY = range(5)
# Fewer rows than this are tokenised here: starting processes would take longer.
ROWS_WORTH_PROCESSES = 2 * SHARD_ROWS


@dataclass(frozen=True, slots=True, eq=False)
class TokenRow:
    """One row, ready to train on.

    ids: int32 token ids. supervised: bool, the loss mask. Both are empty when the row is dropped by the recipe's
    policy, which in large data is known only now: skip it.
    """

    ids: np.ndarray
    supervised: np.ndarray
    source: str


@dataclass(frozen=True, slots=True)
class Policy:
    """What the recipe says about rows that are too long or cannot be learnt from."""

    max_tokens: int
    on_long: str
    on_bad: str

    @classmethod
    def of(cls, plan: DataPlan) -> Policy:
        """The policy of a plan."""
        return cls(plan.max_tokens, plan.on_long, plan.on_bad)

    def classify(self, full: np.ndarray, supervised: np.ndarray, faulty: np.ndarray) -> np.ndarray:
        """uint8 code of each row, from full lengths, supervised tokens within the limit, and faults."""
        long = full > self.max_tokens
        codes = np.where(long, SHORTENED if self.on_long == "truncate" else LONG, KEPT).astype(np.uint8)
        codes[(supervised == 0) & (codes != LONG)] = UNSUPERVISED
        codes[faulty] = FAULTY
        return codes

    def code(self, row: Tokenised) -> int:
        """The code of one row."""
        one = self.classify(
            np.array([row.full_tokens]), np.array([row.supervised_tokens]), np.array([row.fault is not None])
        )
        return int(one[0])

    def stops(self, code: int) -> bool:
        """Whether a row of this code ends the run."""
        return self.on_long == "stop" if code == LONG else code in (UNSUPERVISED, FAULTY) and self.on_bad == "stop"

    def stopping_codes(self) -> list[int]:
        """The codes that end the run."""
        return [code for code in (LONG, UNSUPERVISED, FAULTY) if self.stops(code)]

    def error(self, code: int, source: str, full_tokens: int, fault: Fault | None, *, further: int = 0) -> DataError:
        """The error for a row of a code that ends the run. further: how many more rows are like it."""
        more = f" ({further} further row{'s' if further > 1 else ''} cannot be used)" if further else ""
        if code == LONG:
            return DataError(
                "data-row-too-long",
                f"{source}: the row has {full_tokens} tokens, the limit is {self.max_tokens}{more}",
                hint="raise data.max_tokens, or set data.on_long: truncate or drop",
            )
        if fault is not None:
            return DataError(fault.code, f"{source}: {fault.reason}{more}", got=fault.got, hint=fault.hint)
        cut = f" once it is cut to {self.max_tokens} tokens" if full_tokens > self.max_tokens else ""
        return DataError(
            "data-row-unsupervised",
            f"{source}: the row has no supervised token{cut}{more}",
            hint="raise data.max_tokens or correct the row, or set data.on_bad: drop",
        )


@dataclass(frozen=True, slots=True, eq=False)
class Measures:
    """What is known of the rows of a store, N of them. known: bool, whether the row is tokenised; else the rest is 0.

    full: tokens before any cut. kept: tokens that are trained on, 0 for dropped rows. supervised: of those. codes: as
    in `Policy.classify`.
    """

    known: np.ndarray
    full: np.ndarray
    kept: np.ndarray
    supervised: np.ndarray
    codes: np.ndarray


class Feeder:
    """Tokenises what is missing of some files in worker processes, and remembers a row that stops the run."""

    def __init__(self, files: Sequence[TokenFile], policy: Policy, *, workers: int) -> None:
        self._files = files
        self._policy = policy
        self._workers = workers
        self._jobs: list[tuple[TokenFile, ShardTask]] = []
        self._pool: WorkerPool[None] | None = None
        self._error: TenonError | None = None
        self._told = False
        self._done = 0
        self._on_done: Callable[[int, int], None] | None = None

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the workers."""
        return self._pool.pids if self._pool is not None else ()

    def raise_error(self) -> None:
        """Raise what went wrong in the background, if anything did."""
        if self._error is not None:
            raise self._error
        error = self._pool.error if self._pool is not None else None
        if isinstance(error, OSError) and not self._told:
            # Without a cache every row is still made on the spot: no reason to end a run.
            self._told = True
            log.warning("tokens are no longer cached: %s", error)
        elif isinstance(error, TenonError):
            raise error

    def start(self) -> None:
        """Begin in the background; trained-on rows are checked as they come."""
        self._begin(self._workers, nice=BACKGROUND_NICE, on_result=self._check)

    def complete(self, on_done: Callable[[int, int], None] | None) -> None:
        """Tokenise everything before returning. on_done: called with (rows done, rows in all) of what was missing."""
        for file in self._files:
            file.verify()
        self._on_done = on_done
        missing = sum(len(file.missing()) for file in self._files) * SHARD_ROWS
        workers = self._workers if missing > ROWS_WORTH_PROCESSES and self._workers > 1 else 0
        pool = self._begin(workers, nice=0, on_result=self._count)
        memo: dict[Any, Any] = {}
        for file in self._files:
            file.lend(memo)
        with mapped_io("the token cache"):
            pool.join(memo)

    def close(self) -> None:
        """End the workers, nothing of theirs is left running, and give the files back."""
        self._end_pool()
        for file in self._files:
            file.close()

    def _end_pool(self) -> None:
        if self._pool is not None:
            self._pool.close()

    def _begin(self, workers: int, *, nice: int, on_result: Callable[[int, None], None]) -> WorkerPool[None]:
        self._end_pool()
        self._jobs = [(file, task) for file in self._files for task in file.missing()]
        self._done = 0
        self._pool = WorkerPool([task for _, task in self._jobs], workers=workers, nice=nice, on_result=on_result)
        self._pool.start()
        return self._pool

    def _count(self, index: int, _: None) -> None:
        file, task = self._jobs[index]
        file.mark_ready(task.number)
        self._done += 1
        if self._on_done is not None:
            rows = len(self._jobs) * SHARD_ROWS
            self._on_done(min(self._done * SHARD_ROWS, rows), rows)

    def _check(self, index: int, result: None) -> None:
        self._count(index, result)
        file, task = self._jobs[index]
        shard = file.shard(task.number)
        if shard is None or self._error is not None:
            return
        first = task.number * SHARD_ROWS
        faulty = np.zeros(len(shard.full), dtype=bool)
        faulty[list(shard.faults)] = True
        codes = self._policy.classify(shard.full, shard.supervised, faulty)
        wanted = file.selected[first : first + len(codes)]
        stopping = np.flatnonzero(np.isin(codes, self._policy.stopping_codes()) & wanted)
        if len(stopping):
            place = int(stopping[0])
            row = shard.row(place)
            source = file.reader.source(first + place)
            self._error = self._policy.error(int(codes[place]), source, row.full_tokens, row.fault)


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """Which rows a store holds. file_of: int32 index of the file. row_of: int64 row in it. sizes: rows of each source,
    in order; the rows of a source are neighbours.
    """

    file_of: np.ndarray
    row_of: np.ndarray
    sizes: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.row_of)

    def keep(self, mask: np.ndarray) -> Selection:
        """The rows where the mask holds."""
        bounds = np.cumsum((0, *self.sizes))
        sizes = tuple(int(mask[start:stop].sum()) for start, stop in pairwise(bounds))
        return Selection(self.file_of[mask], self.row_of[mask], sizes)


class RowStore:
    """The rows of one side of a split, by index from 0, source after source (see `RowOrder`).

    exact: every row was tokenised before the store was made, and no row of it is dropped. It depends on the size of the
    data alone, never on what a cache holds.
    """

    def __init__(
        self, files: Sequence[TokenFile], selection: Selection, policy: Policy, feeder: Feeder, *, exact: bool
    ) -> None:
        self._files = tuple(files)
        self._selection = selection
        self._policy = policy
        self._feeder = feeder
        self.exact = exact

    def __len__(self) -> int:
        return len(self._selection)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each source."""
        return self._selection.sizes

    def row(self, index: int) -> TokenRow:
        """Row `index` as tokens. Raises the DataError of a row that stops the run: this one, or one met meanwhile."""
        self._feeder.raise_error()
        file, number = self._place(index)
        tokens = file.row(number)
        code = self._policy.code(tokens)
        source = file.reader.source(number)
        if self._policy.stops(code):
            raise self._policy.error(code, source, tokens.full_tokens, tokens.fault)
        words = tokens.words if code in (KEPT, SHORTENED) else NOTHING
        return TokenRow(word_ids(words), word_flags(words), source)

    def length(self, index: int) -> int:
        """Tokens of row `index`; 0 for a dropped row."""
        return len(self.row(index).ids)

    def raw(self, index: int) -> Row:
        """Row `index` as it was read."""
        file, number = self._place(index)
        return file.reader.row(number)

    def label(self, index: int) -> str | None:
        """The label of row `index`, or None when it has none."""
        row = self.raw(index)
        return row.label if isinstance(row, Chat) else None

    def source(self, index: int) -> str:
        """Where row `index` came from: "file:line"."""
        file, number = self._place(index)
        return file.reader.source(number)

    def check(self) -> None:
        """Raise the error of any row that was found to stop the run."""
        self._feeder.raise_error()

    def measures(self) -> Measures:
        """What is known of every row so far."""
        return measure(self._files, self._selection, self._policy)

    def fault(self, index: int) -> Fault | None:
        """Why row `index` could not be rendered, or None."""
        file, number = self._place(index)
        return file.row(number).fault

    def _place(self, index: int) -> tuple[TokenFile, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._files[self._selection.file_of[index]], int(self._selection.row_of[index])


def measure(files: Sequence[TokenFile], selection: Selection, policy: Policy) -> Measures:
    """Gather lengths and codes of the selected rows from the shards that are ready."""
    size = len(selection)
    known, faulty = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
    full, supervised = np.zeros(size, dtype=np.int32), np.zeros(size, dtype=np.int32)
    for number, file in enumerate(files):
        inside = np.flatnonzero(selection.file_of == number)
        rows = selection.row_of[inside]
        for first, shard in file.shards():
            start, stop = np.searchsorted(rows, (first, first + len(shard.full)))
            places, local = inside[start:stop], rows[start:stop] - first
            known[places] = True
            full[places], supervised[places] = shard.full[local], shard.supervised[local]
            if shard.faults:
                faulty[places] = np.isin(local, list(shard.faults))
    codes = policy.classify(full, supervised, faulty)
    codes[~known] = KEPT
    used = (codes == KEPT) | (codes == SHORTENED)
    kept = np.where(used, np.minimum(full, policy.max_tokens), 0)
    return Measures(known, full, kept, np.where(used, supervised, 0), codes)
