"""Opens the data of a plan: rows on two sides, tokens by index, and the report of what became of every row.

Small data are tokenised before `open_dataset` returns, so that a bad row stops a run before the model is loaded; large
data are tokenised in the background, and the first rows are there at once. This module does not know epochs or tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from tenon.data.gather import Gathered, OnProgress, describe_source, gather
from tenon.data.render import Renderer
from tenon.data.report import (
    LONGEST_SHOWN,
    PLACES_SHOWN,
    WORTH_A_WARNING,
    DataReport,
    Drop,
    Findings,
    LongRow,
    SampleRow,
    describe_lengths,
    merge_drops,
)
from tenon.data.spool import mapped_io
from tenon.data.store import FAULTY, LONG, SHORTENED, UNSUPERVISED, Feeder, Measures, Policy, RowStore, Selection
from tenon.data.template import read_template
from tenon.data.tokenizer import ChatTokenizer
from tenon.data.tokens import Rendering, TokenFile, token_spec
from tenon.errors import DataError
from tenon.plan.values import DataPlan
from tenon.settings import Settings
from tenon.values import canonical_json, hash_text

# Data up to this size are tokenised before training starts.
SMALL_ROWS = 20_000
SMALL_BYTES = 64 << 20
REASONING_WORDS = ("reasoning", "thinking")
DROP_REASONS = {
    LONG: ("data-row-too-long", "the row is longer than data.max_tokens"),
    UNSUPERVISED: ("data-row-unsupervised", "the row has no supervised token"),
}


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """The data of one slot, open. Close it (or use it as a context manager) to end its background work.

    train, validation: rows by index. weights: passes per epoch over each entry of `train.sizes`. report: as known when
    the data set was opened. content_hash: SHA-256 over what the rows of both sides hold, in order, and the weights.
    labels: sorted labels of labelled rows. renderer: how rows became tokens.
    """

    train: RowStore
    validation: RowStore
    weights: tuple[float, ...]
    report: DataReport
    content_hash: str
    labels: tuple[str, ...]
    renderer: Renderer
    feeder: Feeder

    def check(self) -> None:
        """Raise the error of any row that was found to stop the run since the data set was opened."""
        self.feeder.raise_error()

    def close(self) -> None:
        """End background work. Rows can be read no more."""
        self.feeder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_dataset(
    plan: DataPlan, *, base_folder: Path, settings: Settings, on_progress: OnProgress | None = None
) -> Dataset:
    """Open the data of a plan, rendered with the tokenizer of a prepared base.

    on_progress: called with (what is being done, how much is done, how much there is).
    Raises DataError for the first thing that would spoil the run; BaseModelError for a damaged tokenizer.
    """
    opened = _open(plan, base_folder, settings, on_progress, Findings(strict=True), complete=False)
    if not opened.train.exact:
        opened.feeder.start()
    return opened


def inspect(
    plan: DataPlan, *, base_folder: Path, settings: Settings, rows: int = 5, on_progress: OnProgress | None = None
) -> tuple[DataReport, tuple[SampleRow, ...]]:
    """Go through all of the data as training would; the report with every problem in it, and rows spread over train.

    Raises DataError only for what cannot be read at all.
    """
    with _open(plan, base_folder, settings, on_progress, Findings(strict=False), complete=True) as opened:
        used = np.flatnonzero(opened.train.measures().kept)
        picked = used[np.unique(np.linspace(0, len(used) - 1, num=min(rows, len(used))).astype(int))]
        tokenizer = opened.renderer.tokenizer
        return opened.report, tuple(sample_row(opened.train, int(index), tokenizer) for index in picked)


def sample_row(store: RowStore, index: int, tokenizer: ChatTokenizer) -> SampleRow:
    """Row `index` as pieces of text; tokens that make a character only together are one piece."""
    row = store.row(index)
    pieces: list[tuple[str, bool]] = []
    pending: list[int] = []
    for place, (token, flag) in enumerate(zip(row.ids.tolist(), row.supervised.tolist(), strict=True)):
        pending.append(token)
        text = tokenizer.decode(pending, keep_special=True)
        last = place + 1 == len(row.ids) or bool(row.supervised[place + 1]) != flag
        if last or not text.endswith("\ufffd"):
            pieces.append((text, flag))
            pending = []
    return SampleRow(source=row.source, pieces=tuple(pieces), tokens=len(row.ids), supervised=int(row.supervised.sum()))


def _open(
    plan: DataPlan,
    base_folder: Path,
    settings: Settings,
    on_progress: OnProgress | None,
    findings: Findings,
    *,
    complete: bool,
) -> Dataset:
    gathered = gather(plan, settings, findings, on_progress)
    rendering = Rendering(base_folder, read_template(plan.template), plan.supervise, plan.system, plan.max_tokens)
    renderer = rendering.renderer()
    policy = Policy.of(plan)
    sides = (gathered.select(gathered.split.train), gathered.select(gathered.split.validation))
    files = _token_files(gathered, sides, rendering, renderer, settings)
    feeder = Feeder(files, policy, workers=max(plan.workers, 1))
    small = len(gathered.hashes) <= SMALL_ROWS and _bytes(gathered) <= SMALL_BYTES
    stores = tuple(RowStore(files, side, policy, feeder, exact=False) for side in sides)
    try:
        if small or complete:
            feeder.complete(None if on_progress is None else _row_progress(on_progress))
        measures = tuple(store.measures() for store in stores)
        drops = _judge_rows(stores, measures, policy, findings)
        templates = renderer.tokenizer.templates.values() if rendering.template is None else [rendering.template]
        report = _report(gathered, stores, measures, drops, plan, tuple(templates), findings)
    except BaseException:
        feeder.close()
        raise
    if small:
        kept = [side.keep(measure.kept > 0) for side, measure in zip(sides, measures, strict=True)]
        stores = tuple(RowStore(files, side, policy, feeder, exact=True) for side in kept)
    return Dataset(
        train=stores[0],
        validation=stores[1],
        weights=tuple(source.plan.weight for source in gathered.sources),
        report=report,
        content_hash=_content_hash(gathered),
        labels=gathered.labels,
        renderer=renderer,
        feeder=feeder,
    )


def _row_progress(on_progress: OnProgress) -> Callable[[int, int], None]:
    return lambda done, total: on_progress("tokenising rows", done, total)


def _bytes(gathered: Gathered) -> int:
    return sum(int(table.sizes.sum(dtype=np.int64)) for source in gathered.sources for table in source.tables)


def _token_files(
    gathered: Gathered,
    sides: Sequence[Selection],
    rendering: Rendering,
    renderer: Renderer,
    settings: Settings,
) -> list[TokenFile]:
    files: list[TokenFile] = []
    tables = [table for source in gathered.sources for table in source.tables]
    for number, (file, table) in enumerate(zip(gathered.files, tables, strict=True)):
        selected = np.zeros(len(table), dtype=bool)
        for side in sides:
            selected[side.row_of[side.file_of == number]] = True
        with mapped_io(file.rows.name):
            files.append(TokenFile(token_spec(file, rendering, renderer, settings.cache), renderer, selected))
    return files


def _content_hash(gathered: Gathered) -> str:
    split = gathered.split
    sides = {
        name: hashlib.sha256(gathered.hashes[rows].astype("<u8").tobytes()).hexdigest()
        for name, rows in (("train", split.train), ("validation", split.validation))
    }
    sizes = gathered.select(split.train).sizes
    weights = [[size, source.plan.weight] for size, source in zip(sizes, gathered.sources, strict=True) if size]
    return hash_text(canonical_json({**sides, "weights": weights}))


def _judge_rows(
    stores: Sequence[RowStore], measures: Sequence[Measures], policy: Policy, findings: Findings
) -> list[list[tuple[int, Drop]]]:
    """Stop at the first row that must not be; else say what is dropped: for each store (source, drop)."""
    stopping = policy.stopping_codes()
    for store, measure in zip(stores, measures, strict=True):
        rows = np.flatnonzero(np.isin(measure.codes, stopping))
        if len(rows):
            first = int(rows[0])
            code, tokens = int(measure.codes[first]), int(measure.full[first])
            fault = store.fault(first)
            findings.problem(policy.error(code, store.source(first), tokens, fault, further=len(rows) - 1))
    train = measures[0]
    if len(train.known) and train.known.all() and not train.supervised.any():
        findings.problem(
            DataError(
                "data-no-supervised",
                "no row of the data has a supervised token: there is nothing to learn",
                got=f"{len(train.known)} rows",
                hint="see what is supervised with `tenon data`, and correct data.supervise or the rows",
            )
        )
    return [_drops(store, measure) for store, measure in zip(stores, measures, strict=True)]


def _drops(store: RowStore, measure: Measures) -> list[tuple[int, Drop]]:
    found: list[tuple[int, Drop]] = []
    bounds = np.cumsum((0, *store.sizes))
    for (code, reason), rows in _dropped_rows(store, measure).items():
        owners = np.searchsorted(bounds, rows, side="right") - 1
        for owner in np.unique(owners):
            inside = np.array(rows)[owners == owner]
            places = tuple(store.source(int(row)) for row in inside[:PLACES_SHOWN])
            found.append((int(owner), Drop(code=code, reason=reason, rows=len(inside), places=places)))
    return found


def _dropped_rows(store: RowStore, measure: Measures) -> dict[tuple[str, str], list[int]]:
    """(code, reason) -> rows; of rows that the renderer refused, the first one of each code lends its reason."""
    found = {
        told: np.flatnonzero(measure.codes == code).tolist()
        for code, told in DROP_REASONS.items()
        if (measure.codes == code).any()
    }
    reasons: dict[str, str] = {}
    for row in np.flatnonzero(measure.codes == FAULTY).tolist():
        fault = store.fault(row)
        if fault is not None:
            told = (fault.code, reasons.setdefault(fault.code, fault.reason))
            found.setdefault(told, []).append(row)
    return found


def _report(
    gathered: Gathered,
    stores: Sequence[RowStore],
    measures: Sequence[Measures],
    drops: Sequence[list[tuple[int, Drop]]],
    plan: DataPlan,
    templates: Sequence[str],
    findings: Findings,
) -> DataReport:
    dropped = [pair for side in drops for pair in side]
    kept = np.zeros(len(gathered.sources), dtype=np.int64)
    for store in stores:
        kept += np.array(store.sizes)
    for number, drop in dropped:
        kept[number] -= drop.rows
    sources = tuple(
        describe_source(gathered, number, kept=int(kept[number]), drops=[d for owner, d in dropped if owner == number])
        for number in range(len(gathered.sources))
    )
    train, validation = measures
    _warn(gathered, stores, plan, findings)
    _warn_unwritten(gathered, templates, findings)
    return DataReport(
        sources=sources,
        train_rows=len(stores[0]) - sum(drop.rows for _, drop in drops[0]),
        validation_rows=len(stores[1]) - sum(drop.rows for _, drop in drops[1]),
        repeated=len(gathered.split.repeated),
        repeated_dropped=plan.on_duplicate == "drop",
        shared=len(gathered.split.shared),
        shortened=sum(int((measure.codes == SHORTENED).sum()) for measure in measures),
        drops=merge_drops(drop for source in sources for drop in source.drops),
        complete=bool(train.known.all() and validation.known.all()),
        tokenised=int(train.known.sum() + validation.known.sum()),
        train_tokens=int(train.kept.sum(dtype=np.int64)),
        train_supervised_tokens=int(train.supervised.sum(dtype=np.int64)),
        validation_tokens=int(validation.kept.sum(dtype=np.int64)),
        validation_supervised_tokens=int(validation.supervised.sum(dtype=np.int64)),
        lengths=describe_lengths(train.full[train.known & (train.codes != FAULTY)], _longest(stores[0], train)),
        labels=gathered.labels,
        problems=tuple(findings.problems),
        warnings=tuple(findings.warnings),
    )


def _longest(store: RowStore, measure: Measures) -> list[LongRow]:
    order = np.argsort(-measure.full, kind="stable")[:LONGEST_SHOWN]
    return [LongRow(source=store.source(int(row)), tokens=int(measure.full[row])) for row in order if measure.full[row]]


def _warn(gathered: Gathered, stores: Sequence[RowStore], plan: DataPlan, findings: Findings) -> None:
    split = gathered.split
    used = len(stores[0]) + len(stores[1])
    if plan.on_duplicate == "keep" and len(split.repeated) > WORTH_A_WARNING * used:
        findings.warn(f"{len(split.repeated)} rows repeat earlier ones; data.on_duplicate: drop takes them out")
    if len(split.shared):
        findings.warn(f"{len(split.shared)} train rows were taken out, because validation holds them too")
    if (plan.heldout > 0 or plan.validation) and not len(stores[1]):
        findings.warn("validation has no row: the data are too few for the share held out")


def _warn_unwritten(gathered: Gathered, templates: Sequence[str], findings: Findings) -> None:
    """Templates leave out without a word what they do not know."""
    tables = [table for source in gathered.sources for table in source.tables]
    with_tools, with_reasoning = sum(t.with_tools for t in tables), sum(t.with_reasoning for t in tables)
    if with_tools and not any("tools" in template for template in templates):
        findings.warn(f"the chat template leaves out tools; rows that offer some: {with_tools}")
    if with_reasoning and not any(word in template for template in templates for word in REASONING_WORDS):
        findings.warn(f"the chat template leaves out reasoning; rows that hold some: {with_reasoning}")
