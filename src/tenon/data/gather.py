"""From the sources of a plan to rows on two sides: files found, formats detected, rows indexed, the split decided.

No token is needed for any of this. This module does not know tokenizers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tenon.data.index import IndexedFile, RowTable, bad_row_error, index_file, load_table, sample_format
from tenon.data.report import PLACES_SHOWN, Drop, Findings, SourceReport
from tenon.data.sources import find_files
from tenon.data.split import Split, split_rows
from tenon.data.spool import mapped_io, open_rows
from tenon.data.store import Selection
from tenon.errors import DataError
from tenon.plan.values import DataPlan, SourcePlan
from tenon.settings import Settings

# Called with what is being done, how much of it is done, and how much there is.
OnProgress = Callable[[str, int, int], None]
PLAIN_PROMPT = "{text}"
LABELS_SHOWN = 8


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """One source of the plan: its files and their rows."""

    plan: SourcePlan
    role: Literal["train", "validation"]
    files: tuple[IndexedFile, ...]
    tables: tuple[RowTable, ...]

    def __len__(self) -> int:
        return sum(map(len, self.tables))


@dataclass(frozen=True, slots=True, eq=False)
class Gathered:
    """All rows of all sources, one after another, and the split over them.

    hashes: uint64. label_ids: int32 into labels (sorted), -1 without. file_of, row_of: where each row lies, int32 and
    int64. source_of: int32.
    """

    sources: tuple[Source, ...]
    hashes: np.ndarray
    label_ids: np.ndarray
    labels: tuple[str, ...]
    file_of: np.ndarray
    row_of: np.ndarray
    source_of: np.ndarray
    split: Split

    @property
    def files(self) -> tuple[IndexedFile, ...]:
        """The files of all sources in order; `file_of` counts in it."""
        return tuple(file for source in self.sources for file in source.files)

    def select(self, rows: np.ndarray) -> Selection:
        """The selection of these rows; sizes has one entry per source, also where it gives none."""
        counts = np.bincount(self.source_of[rows], minlength=len(self.sources))
        return Selection(self.file_of[rows], self.row_of[rows], tuple(int(count) for count in counts))


def gather(plan: DataPlan, settings: Settings, findings: Findings, on_progress: OnProgress | None) -> Gathered:
    """Read, check, index and split everything that the plan names.

    Raises DataError for what cannot be read at all; other problems go to the findings.
    """
    asked = [(source, "train") for source in plan.train] + [(source, "validation") for source in plan.validation]
    sources = tuple(_open_source(source, role, plan, settings, on_progress) for source, role in asked)
    _refuse_unused_prompt(plan, sources)
    for source in sources:
        _judge_bad_rows(source, plan, findings)
    gathered = _join(sources, plan)
    _refuse_unseen_labels(gathered, findings)
    if not len(gathered.split.train):
        findings.problem(
            DataError(
                "data-no-rows",
                "no row is left to train on",
                got=f"{len(gathered.hashes)} good rows, {len(gathered.split.shared)} of them also in validation; "
                f"{_count_bad(sources)} bad rows",
                hint="see what is wrong with them: `tenon data RECIPE`"
                if not len(gathered.hashes)
                else "give more rows, or hold fewer out",
            )
        )
    return gathered


def _count_bad(sources: Sequence[Source]) -> int:
    return sum(count for source in sources for table in source.tables for count in table.bad_counts.values())


def _open_source(
    source: SourcePlan, role: str, plan: DataPlan, settings: Settings, on_progress: OnProgress | None
) -> Source:
    files: list[IndexedFile] = []
    for found in find_files(source.path, settings):
        with mapped_io(found.name):
            rows = open_rows(found, settings)
            form = sample_format(rows, asked=source.format, columns=source.columns, prompt=plan.prompt)
            report = _byte_progress(found.name, on_progress)
            files.append(index_file(rows, form, settings, workers=plan.workers, on_bytes=report))
    tables = tuple(load_table(file) for file in files)
    return Source(source, "train" if role == "train" else "validation", tuple(files), tables)


def _byte_progress(name: str, on_progress: OnProgress | None) -> Callable[[int, int], None] | None:
    if on_progress is None:
        return None
    return lambda done, total: on_progress(f"reading {name}", done, total)


def _refuse_unused_prompt(plan: DataPlan, sources: Sequence[Source]) -> None:
    forms = {file.form.name for source in sources for file in source.files}
    if plan.prompt != PLAIN_PROMPT and "labelled" not in forms:
        raise DataError(
            "data-prompt-unused",
            "data.prompt is for labelled rows, and no source has any",
            got=f"formats {', '.join(sorted(forms))}",
            hint="leave data.prompt out, or map text and label with columns",
        )


def _judge_bad_rows(source: Source, plan: DataPlan, findings: Findings) -> None:
    if plan.on_bad == "drop":
        return
    for file, table in zip(source.files, source.tables, strict=True):
        if table.bad:
            further = sum(table.bad_counts.values()) - 1
            findings.problem(bad_row_error(file.rows.name, file.rows.mark, table.bad[0], further=further))


def _join(sources: tuple[Source, ...], plan: DataPlan) -> Gathered:
    tables = [table for source in sources for table in source.tables]
    sizes = [len(table) for table in tables]
    labels = sorted({label for table in tables for label in table.labels})
    number = {label: index for index, label in enumerate(labels)}
    ids = [np.array([*(number[label] for label in table.labels), -1], dtype=np.int32) for table in tables]
    hashes = np.concatenate([table.hashes for table in tables])
    label_ids = np.concatenate([own[table.label_ids] for own, table in zip(ids, tables, strict=True)])
    source_sizes = [len(source) for source in sources]
    source_of = np.repeat(np.arange(len(sources), dtype=np.int32), source_sizes)
    roles = np.array([source.role == "validation" for source in sources])
    split = split_rows(
        hashes,
        label_ids,
        validation=roles[source_of],
        share=plan.heldout,
        by=plan.heldout_by,
        seed=plan.seed,
        keep_repeated=plan.on_duplicate == "keep",
    )
    return Gathered(
        sources=sources,
        hashes=hashes,
        label_ids=label_ids,
        labels=tuple(labels),
        file_of=np.repeat(np.arange(len(tables), dtype=np.int32), sizes),
        row_of=np.concatenate([np.arange(size, dtype=np.int64) for size in sizes]),
        source_of=source_of,
        split=split,
    )


def _refuse_unseen_labels(gathered: Gathered, findings: Findings) -> None:
    learnt = np.unique(gathered.label_ids[gathered.split.train])
    asked = gathered.label_ids[gathered.split.validation]
    if not (learnt >= 0).any():
        return
    unseen = [number for number in np.setdiff1d(asked, learnt) if number >= 0]
    if unseen:
        chosen = any(source.role == "validation" for source in gathered.sources)
        held = "" if chosen else "; data.heldout_by: fraction keeps a row of every label in train"
        first = gathered.split.validation[np.isin(asked, unseen)][0]
        names = [gathered.labels[number] for number in unseen]
        findings.problem(
            DataError(
                "data-unseen-label",
                f"{_place(gathered, int(first))}: validation has {len(unseen)} label{'s' if len(unseen) > 1 else ''} "
                f"that train never had, here {gathered.labels[gathered.label_ids[first]]}",
                got=", ".join(names[:LABELS_SHOWN]) + (", …" if len(names) > LABELS_SHOWN else ""),
                hint="correct the labels, or add training rows that have them" + held,
            )
        )


def _place(gathered: Gathered, row: int) -> str:
    """`file:line` of a row."""
    tables = [table for source in gathered.sources for table in source.tables]
    number = int(gathered.file_of[row])
    rows = gathered.files[number].rows
    return f"{rows.name}{rows.mark}{int(tables[number].lines[gathered.row_of[row]])}"


def describe_source(gathered: Gathered, number: int, *, kept: int, drops: Sequence[Drop]) -> SourceReport:
    """The report of one source. kept, drops: what tokenising left of it."""
    source, split = gathered.sources[number], gathered.split
    inside = gathered.source_of == number
    forms = dict.fromkeys((file.form.name, file.form.reason) for file in source.files)
    bad = sum(count for table in source.tables for count in table.bad_counts.values())
    return SourceReport(
        path=source.plan.path,
        role=source.role,
        files=len(source.files),
        formats=tuple(forms),
        weight=source.plan.weight,
        rows_read=len(source) + bad,
        repeated=int(inside[split.repeated].sum()),
        shared=int(inside[split.shared].sum()),
        kept=kept,
        drops=(*_bad_drops(source), *drops),
    )


def _bad_drops(source: Source) -> list[Drop]:
    drops: list[Drop] = []
    for file, table in zip(source.files, source.tables, strict=True):
        for code, count in sorted(table.bad_counts.items()):
            like = [bad for bad in table.bad if bad.code == code]
            places = tuple(f"{file.rows.name}{file.rows.mark}{bad.line}" for bad in like[:PLACES_SHOWN])
            drops.append(Drop(code=code, reason=like[0].reason if like else code, rows=count, places=places))
    return drops
