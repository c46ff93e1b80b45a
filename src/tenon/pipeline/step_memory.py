"""How a run's steps are made on the device that it has: the plan's decision, and what is measured beside it.

This module does not know how a step is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import psutil

from tenon.models.decoder import Decoder
from tenon.pipeline.slot_data import Emit, SlotData
from tenon.plan.fit import HOST_SHARE, load_of
from tenon.plan.values import Plan, SlotPlan
from tenon.train.memory import AS_PLANNED, GpuMemory, Limits, Measured, StepMemory
from tenon.train.slot import SlotTraining


def step_memory(
    plan: Plan, decoder: Decoder, slots: Sequence[SlotTraining], data: Sequence[SlotData], emit: Emit
) -> StepMemory:
    """On a GPU the memory is measured when base and slots are loaded; on a CPU the plan's decision stands."""
    if decoder.device.type != "cuda":
        return AS_PLANNED
    rows = [_row_tokens(slot, own) for slot, own in zip(plan.slots, data, strict=True)]
    load = load_of(
        plan,
        longest_tokens=max(longest for _, longest in rows),
        step_tokens=sum(
            slot.batch.tokens or slot.batch.rows * mean for slot, (mean, _) in zip(plan.slots, rows, strict=True)
        ),
    )
    available = min(plan.machine.host_memory_bytes, psutil.virtual_memory().available)
    return Measured(
        load.steps(plan.frozen),
        GpuMemory(decoder.device),
        slots,
        keeping=plan.keeping,
        limits=Limits(plan.memory_limit_bytes, HOST_SHARE * available / plan.devices.count),
        emit=emit,
    )


def _row_tokens(slot: SlotPlan, data: SlotData) -> tuple[float, int]:
    """(mean, most) tokens of a row as it is trained on. Where not all are tokenised yet, any may be the longest."""
    limit, report = slot.data.max_tokens, data.dataset.report
    if report.lengths is None:
        return float(limit), limit
    longest = max((row.tokens for row in report.lengths.longest), default=limit)
    return min(report.lengths.mean_tokens, float(limit)), min(longest, limit) if report.complete else limit
