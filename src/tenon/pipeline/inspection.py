"""A look at the data as training would see them, without a model. This module does not know tensors or screens."""

from __future__ import annotations

from tenon.data.dataset import inspect
from tenon.pipeline.base import find_base
from tenon.pipeline.slot_data import Emit, progress_events
from tenon.plan.requests import InspectRequest
from tenon.settings import Settings


def inspect_slots(request: InspectRequest, emit: Emit, settings: Settings) -> None:
    """A report, sample rows and lengths for each slot of a plan."""
    folder = find_base(request.plan.base, settings)
    for slot in request.plan.slots:
        report, rows = inspect(
            slot.data, base_folder=folder, settings=settings, rows=request.rows, on_progress=progress_events(emit)
        )
        emit("report", slot=slot.name, report=report.model_dump(mode="json"))
        for row in rows:
            emit(
                "row",
                slot=slot.name,
                source=row.source,
                pieces=[list(piece) for piece in row.pieces],
                tokens=row.tokens,
                supervised=row.supervised,
            )
        if report.lengths is not None:
            emit("lengths", slot=slot.name, edges=list(report.lengths.edges), counts=list(report.lengths.counts))
    emit("finished")
