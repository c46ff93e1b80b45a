"""How far loss curves lie apart, beside how far chance alone takes them: arithmetic on lists of losses.

Shape legend: N slots, S seeds, B bins of steps. This module runs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BIN_STEPS = 10


@dataclass(frozen=True, slots=True)
class Gap:
    """One learning rate. gap: mean |difference| of the curves of equal seeds. signed: the mean difference.

    deviation: the standard deviation over the seeds of the reference's curves, averaged over its bins.
    """

    lr: float
    gap: float
    signed: float
    deviation: float


def binned(losses: Sequence[float], steps: int = BIN_STEPS) -> np.ndarray:
    """(B) means of so many neighbouring steps; an incomplete last bin is left out unless it is the only one."""
    values = np.asarray(losses, dtype=np.float64)
    whole = len(values) // steps
    return values[: whole * steps].reshape(whole, steps).mean(axis=1) if whole else values.mean(keepdims=True)


def gaps(curves: Sequence[Sequence[float]], reference: Sequence[Sequence[float]], rates: Sequence[float]) -> list[Gap]:
    """One Gap for each learning rate. curves, reference: losses of N slots in the same order; rates: of each slot.

    Slots of one rate differ in their seed alone, which also draws the order of rows: the same one for both.
    """
    found = []
    for lr in dict.fromkeys(rates):
        mine = [i for i, rate in enumerate(rates) if rate == lr]
        ours_SB, theirs_SB = (np.stack([binned(each[i]) for i in mine]) for each in (curves, reference))
        difference_SB = ours_SB - theirs_SB
        deviation = float(theirs_SB.std(axis=0, ddof=1).mean()) if len(mine) > 1 else 0.0
        found.append(Gap(lr, float(np.abs(difference_SB).mean()), float(difference_SB.mean()), deviation))
    return found
