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

from tenon.data.dataset import Dataset, open_dataset
from tenon.data.store import RowStore
from tenon.errors import DataError
from tenon.plan.values import DataPlan, SlotPlan, SourcePlan
from tenon.settings import Settings

_PROGRESS_SECONDS = 0.2


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

    Raises DataError for the first thing that would spoil the run, data-unseen-label among them.
    """
    on_progress = progress_events(emit)
    with ExitStack() as stack:
        dataset = stack.enter_context(
            open_dataset(slot.data, base_folder=base_folder, settings=settings, on_progress=on_progress)
        )
        for text in dataset.report.warnings:
            emit("warning", code="data", text=text)
        if not slot.evaluation.enabled:
            yield SlotData(dataset, None, "")
        elif not slot.evaluation.sources:
            has_rows = len(dataset.validation) > 0
            yield SlotData(dataset, dataset.validation if has_rows else None, dataset.content_hash)
        else:
            judged = stack.enter_context(
                open_dataset(
                    judging_plan(slot.data, slot.evaluation.sources),
                    base_folder=base_folder,
                    settings=settings,
                    on_progress=on_progress,
                )
            )
            _require_known_labels(dataset.labels, judged.labels)
            yield SlotData(dataset, judged.train, judged.content_hash)


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


def _require_known_labels(known: Sequence[str], judged: Sequence[str]) -> None:
    unseen = sorted(set(judged) - set(known))
    if known and unseen:
        raise DataError(
            "data-unseen-label",
            f"the evaluation data have {len(unseen)} labels that the training data never have",
            got=", ".join(unseen[:5]) + (", …" if len(unseen) > 5 else ""),
            hint="correct the labels, or add training rows for them",
        )
