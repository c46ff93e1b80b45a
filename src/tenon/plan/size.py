"""How much data there is, and how many optimiser steps come of it. Pure arithmetic; knows no files."""

from __future__ import annotations

import math

from tenon.plan.values import BatchPlan, LimitsPlan
from tenon.values import Value


class DataSize(Value):
    """What the caller knows, or has sampled, of the data.

    rows: rows of the training sources in one epoch, weights applied, before a held-out split. mean_tokens: of a row.
    longest_tokens: of the longest row, 0 when unknown. validation_rows: rows of `data.validation`. supervised_share:
    share of tokens that have a label. exact: every row was counted and tokenised.
    """

    rows: int
    mean_tokens: float
    longest_tokens: int = 0
    validation_rows: int = 0
    supervised_share: float = 0.5
    exact: bool = False


def rows_per_step(batch: BatchPlan, mean_tokens: float) -> float:
    """Rows of one optimiser step; an estimate when the batch is counted in tokens."""
    return float(batch.rows) if batch.rows else max(1.0, batch.tokens / max(mean_tokens, 1.0))


def count_steps(
    train_rows: int, mean_tokens: float, batch: BatchPlan, limits: LimitsPlan, seconds_per_step: float
) -> int:
    """Steps until the first limit: epochs x rows / rows of a step, steps, or minutes / seconds of a step."""
    bounds = [limits.steps] if limits.steps else []
    if limits.epochs:
        rows = max(1, round(limits.epochs * train_rows))
        bounds.append(math.ceil(rows / rows_per_step(batch, mean_tokens)))
    if limits.minutes:
        bounds.append(max(1, round(limits.minutes * 60 / max(seconds_per_step, 1e-9))))
    return min(bounds)
