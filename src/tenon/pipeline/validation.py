"""Validation while training: the slot's held-out rows, judged by the metric that the plan names.

This module does not know what follows from a validation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tenon.pipeline.engine import Workbench
from tenon.pipeline.judging import validate_slot
from tenon.pipeline.slot_data import SlotData
from tenon.ranks.group import Ranks
from tenon.train.loop import Validation
from tenon.train.slot import SlotTraining


class Validator:
    """Validates any slot of a run (see train.loop.RunPorts.validate): the first rank judges, and tells the others."""

    def __init__(self, bench: Workbench, data: Mapping[int, SlotData], base_hash: str, ranks: Ranks) -> None:
        self._bench, self._data, self._base_hash, self._ranks = bench, data, base_hash, ranks

    def __call__(self, training: SlotTraining) -> Validation | None:
        """The figures of the slot's validation rows; None when it has none."""
        data = self._data[training.number]
        rows = data.dataset.validation
        if not len(rows):
            return None
        found = self._ranks.first_finds(
            lambda: asdict(self._find(training, data)), meanwhile=self._bench.decoder.walk.follow
        )
        return None if found is None else _validation(found)

    def _find(self, training: SlotTraining, data: SlotData) -> Validation:
        found = validate_slot(self._bench, training, data.dataset.validation, data, self._base_hash)
        self._bench.decoder.walk.follow()
        deciding = found[training.plan.validation.metric]
        metrics = {name: metric.value for name, metric in found.items()}
        return Validation(metrics, deciding.value, deciding.higher_is_better)


def _validation(told: dict[str, Any]) -> Validation:
    return Validation(told["metrics"], told["value"], told["higher_is_better"])
