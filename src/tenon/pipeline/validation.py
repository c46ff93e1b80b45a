"""Validation while training: the slot's held-out rows, judged by the metric that the plan names.

This module does not know what follows from a validation.
"""

from __future__ import annotations

from collections.abc import Mapping

from tenon.pipeline.engine import Workbench
from tenon.pipeline.judging import validate_slot
from tenon.pipeline.slot_data import SlotData
from tenon.train.loop import Validation
from tenon.train.slot import SlotTraining


class Validator:
    """Validates any slot of a run (see train.loop.RunPorts.validate)."""

    def __init__(self, bench: Workbench, data: Mapping[int, SlotData], base_hash: str) -> None:
        self._bench, self._data, self._base_hash = bench, data, base_hash

    def __call__(self, training: SlotTraining) -> Validation | None:
        """The figures of the slot's validation rows; None when it has none."""
        data = self._data[training.number]
        rows = data.dataset.validation
        if not len(rows):
            return None
        found = validate_slot(self._bench, training, rows, data, self._base_hash)
        deciding = found[training.plan.validation.metric]
        metrics = {name: metric.value for name, metric in found.items()}
        return Validation(metrics, deciding.value, deciding.higher_is_better)
