"""The data of one slot, open: its rows, and those that it will be judged on.

This module does not know tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tenon.adapters.asking import stop_ids_of
from tenon.data.dataset import Dataset, open_dataset
from tenon.data.store import RowStore
from tenon.errors import DataError
from tenon.evaluate.cases import find_task_early
from tenon.plan.values import DataPlan, SlotPlan, SourcePlan
from tenon.runs.metric_table import choose_metrics, fit_any_rows
from tenon.settings import Settings

_PROGRESS_SECONDS = 0.2
_LABELS_SHOWN = 8


class Emit(Protocol):
    """Writes one event."""

    def __call__(self, kind: str, /, **fields: Any) -> object: ...


@dataclass(frozen=True, slots=True)
class SlotData:
    """dataset: train and validation rows. evaluation: rows to judge on after training (None: there are none).

    evaluation_hash: content hash of what `evaluation` holds.
    """

    dataset: Dataset
    evaluation: RowStore | None
    evaluation_hash: str


@contextmanager
def open_slot_data(slot: SlotPlan, base_folder: Path, settings: Settings, emit: Emit) -> Iterator[SlotData]:
    """Open everything that the slot will read, so that a bad row is found before any time is spent.

    Raises DataError for the first thing that would spoil the run, data-unseen-label among them; RecipeError
    recipe-metric-inapplicable; AdapterError adapter-stop-token.
    """
    on_progress = progress_events(emit)
    with ExitStack() as stack:
        dataset = stack.enter_context(
            open_dataset(slot.data, base_folder=base_folder, settings=settings, on_progress=on_progress)
        )
        for text in dataset.report.warnings:
            emit("warning", code="data", text=text)
        evaluation, evaluation_hash = _evaluation_rows(slot, dataset, stack, base_folder, settings, on_progress)
        _require_metrics(slot, dataset, evaluation)
        stop_ids_of(slot.name, slot.serving.generation.stop_tokens, dataset.renderer)
        yield SlotData(dataset, evaluation, evaluation_hash)


def _evaluation_rows(
    slot: SlotPlan,
    dataset: Dataset,
    stack: ExitStack,
    base_folder: Path,
    settings: Settings,
    on_progress: Callable[[str, int, int], None],
) -> tuple[RowStore | None, str]:
    """(rows to judge on after training, hash of the data that hold them)."""
    if not slot.evaluation.enabled:
        return None, ""
    if not slot.evaluation.sources:
        return (dataset.validation if len(dataset.validation) else None), dataset.content_hash
    plan = judging_plan(slot.data, slot.evaluation.sources)
    judged = stack.enter_context(
        open_dataset(plan, base_folder=base_folder, settings=settings, on_progress=on_progress)
    )
    _require_known_labels(dataset.labels, judged)
    return judged.train, judged.content_hash


def _require_metrics(slot: SlotPlan, dataset: Dataset, evaluation: RowStore | None) -> None:
    """Metrics that do not fit the rows are refused now, not when there is an adapter to judge.

    Raises RecipeError recipe-metric-inapplicable.
    """
    asked = (
        ("validation.metric", (slot.validation.metric,), dataset.validation, slot.validation.rows),
        ("evaluate.metrics", slot.evaluation.metrics, evaluation, slot.evaluation.rows),
    )
    for key, names, rows, most in asked:
        if rows is not None and len(rows) and not fit_any_rows(names):
            choose_metrics(names, find_task_early(rows, dataset.renderer, most=most), key=key)


def judging_plan(data: DataPlan, sources: Sequence[SourcePlan]) -> DataPlan:
    """Sources to be judged on, read and rendered as the training data are."""
    return data.model_copy(update={"train": tuple(sources), "validation": (), "heldout": 0.0, "shuffle": False})


def progress_events(emit: Emit) -> Callable[[str, int, int], None]:
    """A progress callback that writes `progress` events, a few a second and the last of each kind."""
    last = 0.0

    def on_progress(what: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done >= total or now - last >= _PROGRESS_SECONDS:
            last = now
            emit("progress", what=what, done=done, total=total)

    return on_progress


def _require_known_labels(known: Sequence[str], judged: Dataset) -> None:
    unseen = sorted(set(judged.labels) - set(known))
    if not known or not unseen:
        return
    rows = judged.train
    first = next(index for index in range(len(rows)) if rows.label(index) in unseen)
    raise DataError(
        "data-unseen-label",
        f"{rows.source(first)}: evaluate.data has {len(unseen)} label{'s' if len(unseen) > 1 else ''} that train never "
        f"had, here {rows.label(first)}",
        got=", ".join(unseen[:_LABELS_SHOWN]) + (", …" if len(unseen) > _LABELS_SHOWN else ""),
        hint="correct the labels, or add training rows that have them",
    )
