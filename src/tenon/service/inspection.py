"""Looking at data as training would see it, without a model. This module does not know screens."""

from __future__ import annotations

from collections.abc import Iterator

from tenon.plan.requests import InspectRequest
from tenon.plan.values import Plan
from tenon.processes import Event, ask_worker
from tenon.service.environment import require_training
from tenon.settings import Settings


def inspect_data(plan: Plan, rows: int, settings: Settings) -> Iterator[Event]:
    """Events `report` and `row` of `InspectRequest`, and progress. Raises DataError for what cannot be read at all."""
    require_training()
    return ask_worker("inspect", InspectRequest(plan=plan, rows=rows), settings=settings)
