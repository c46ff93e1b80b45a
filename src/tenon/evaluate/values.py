"""What an evaluation is asked: who is judged, and how.

This module does not know rows or decoders.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tenon.batch import NO_SLOT

# Called with (answers and likelihoods done, how many there are in all).
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class SubjectSlot:
    """Who is judged. label: `base`, `name@version` or a run's slot. slot: where it is in the bank."""

    label: str
    slot: int = NO_SLOT
    adapter_hash: str | None = None


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """What is measured and how.

    metrics: names, empty for those that suit the rows. rows: at most so many, 0 for all. labels: labels that may be
    answered besides those of the rows. intervals: whether figures get their 95% interval.
    max_rows, pass_tokens, cache_bytes: see `infer.generate`.
    """

    metrics: tuple[str, ...] = ()
    rows: int = 0
    max_new_tokens: int = 256
    labels: tuple[str, ...] = ()
    intervals: bool = True
    max_rows: int = 64
    pass_tokens: int = 1024
    cache_bytes: int = 1 << 30
