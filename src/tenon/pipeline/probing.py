"""What a finished slot says of a few of its rows, recorded for whoever serves it (`registry.probes`).

This module does not know where probes are kept, nor what is made of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tenon.batch import NO_SLOT
from tenon.data.pack import PackRow
from tenon.data.store import TokenRow
from tenon.infer.score import score
from tenon.pipeline.engine import Workbench
from tenon.plan.values import Plan
from tenon.registry.probes import ANSWER_TOKENS, WINDOW_TOKENS, Probe, Probes

# Of so many rows for each probe the shortest are taken: what they cost falls on every run.
_CHOICE = 4


class Rows(Protocol):
    """Rows as tokens, by index."""

    def __len__(self) -> int: ...
    def row(self, index: int) -> TokenRow:
        """One row; empty when it is dropped by the recipe's policy."""
        ...


@dataclass(frozen=True, slots=True)
class _Window:
    """A part of a row: what stands before an answer, and the answer's beginning."""

    prompt: np.ndarray
    answer: np.ndarray

    def row(self, slot: int) -> PackRow:
        """As it is scored."""
        supervised = np.arange(len(self.prompt) + len(self.answer)) >= len(self.prompt)
        return PackRow(slot, np.concatenate([self.prompt, self.answer]).astype(np.int64), supervised)


def record_probes(bench: Workbench, slot: int, rows: Rows, *, count: int, plan: Plan) -> Probes:
    """Score `count` rows under a slot and under the bare base, teacher-forced, all in one pass."""
    windows = _choose(rows, count)
    scores = score(bench.decoder, bench.bank, [w.row(number) for w in windows for number in (slot, NO_SLOT)])
    logprobs = [tuple(map(float, each.logprobs)) for each in scores]
    probes = [
        Probe(
            prompt_ids=tuple(window.prompt.tolist()),
            answer_ids=tuple(window.answer.tolist()),
            logprobs=adapter,
            base_logprobs=base,
        )
        for window, adapter, base in zip(windows, logprobs[::2], logprobs[1::2], strict=True)
        if all(map(math.isfinite, (*adapter, *base)))
    ]
    return Probes(
        precision=plan.precision, base_format=plan.base_format, device=plan.machine.device, probes=tuple(probes)
    )


def _choose(rows: Rows, count: int) -> list[_Window]:
    """Windows of rows from all over the store, the shortest of them; the same ones every time."""
    tried = min(len(rows), count * _CHOICE)
    places = [number * len(rows) // tried for number in range(tried)]
    found = [window for place in places if (window := _window(rows, place)) is not None]
    found.sort(key=lambda window: len(window.prompt) + len(window.answer))
    return found[:count]


def _window(rows: Rows, place: int) -> _Window | None:
    """The row's last answer with what stands before it; None where there is nothing to score."""
    row = rows.row(place)
    supervised = np.flatnonzero(row.supervised[1:]) + 1  # nothing stands before a row's first token
    if not len(supervised):
        return None
    breaks = np.flatnonzero(np.diff(supervised) > 1)
    first = int(supervised[breaks[-1] + 1] if len(breaks) else supervised[0])
    last = min(int(supervised[-1]) + 1, first + ANSWER_TOKENS)
    answer = row.ids[first:last]
    return _Window(row.ids[max(0, first - (WINDOW_TOKENS - len(answer))) : first], answer)
