"""The learning rate's factor over the progress of a run, from 0 at the first step to 1 at the end.

Let w be the warm-up share, d the decay share, f the floor, and u = (x - w) / (1 - w) the progress after warm-up:

    x < w             x / w (without the floor; a run that is all warm-up ends at 1)
    constant          1
    linear            f + (1 - f) (1 - u)
    cosine            f + (1 - f) (1 + cos(pi u)) / 2
    cosine_restarts   the same with u replaced by the fractional part of n u, n cycles
    wsd               1 until x = 1 - d, then f + (1 - f) (1 - x) / d

A cycle of cosine_restarts begins at 1: its border belongs to the next cycle, and the end of the run to the last.
Sources: Loshchilov & Hutter, 2017 (cosine, warm restarts); Hu et al., 2024 (warmup-stable-decay).
This module does not know what progress is measured in.
"""

from __future__ import annotations

import math

from tenon.plan.values import SchedulePlan

# Progress is a quotient, so the border of a cycle may come out a rounding below the whole number that it is.
_ROUNDING = 1e-9


def factor(plan: SchedulePlan, progress: float) -> float:
    """What the learning rate is multiplied with at this progress (clamped to [0, 1])."""
    x = min(max(progress, 0.0), 1.0)
    if x < plan.warmup or plan.warmup >= 1.0:
        return x / plan.warmup
    u = (x - plan.warmup) / (1.0 - plan.warmup)
    return plan.floor + (1.0 - plan.floor) * _shape(plan, x, u)


def _shape(plan: SchedulePlan, x: float, u: float) -> float:
    if plan.kind == "linear":
        return 1.0 - u
    if plan.kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * u))
    if plan.kind == "cosine_restarts":
        turns = plan.cycles * u
        phase = 1.0 if u >= 1.0 else max(0.0, turns - math.floor(turns + _ROUNDING))
        return 0.5 * (1.0 + math.cos(math.pi * phase))
    if plan.kind == "wsd" and x > 1.0 - plan.decay:
        return (1.0 - x) / plan.decay
    return 1.0
