"""What becomes of requests through aliases: they are counted, guards roll back, shadows are asked.

Belongs to the thread of the HTTP server but for `failed`, which any may call. This module knows no HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from tenon.errors import AdapterError
from tenon.serve.front.gate import Answers, Gate
from tenon.serve.front.names import Dealt, Names
from tenon.serve.front.shadow import Shadows, Tally
from tenon.serve.front.watch import Watch


@dataclass(frozen=True, slots=True)
class ShadowReport:
    """What came of one shadow on this server since it started. logprob_difference: mean over tokens, in nats."""

    alias: str
    version: int
    tally: Tally

    @property
    def logprob_difference(self) -> float | None:
        """The shadow's log probability less the other's, mean over tokens; None before there were any."""
        return self.tally.difference / self.tally.tokens if self.tally.tokens else None


class Life:
    """The aliases of one server while it runs."""

    def __init__(self, gate: Gate, names: Names, say: Callable[[str], None]) -> None:
        """say: told in a sentence what became of an alias."""
        metrics = gate.metrics.life
        self._watch = Watch(names.registry, metrics, say)
        self._shadows = Shadows(gate, names, metrics)

    def failed(self, dealt: Dealt, error: AdapterError) -> None:
        """A version could not even be asked. Reads and writes files."""
        trip = self._watch.note(dealt, error)
        if trip is not None:
            self._watch.roll_back(trip)

    def ended(self, answers: Answers) -> None:
        """The answers of a request have ended, in whatever way."""
        dealt = answers.target.dealt
        if dealt is None or not (answers.whole or answers.error is not None):
            return
        trip = self._watch.note(dealt, answers.error)
        if trip is not None:
            asyncio.get_running_loop().run_in_executor(None, self._watch.roll_back, trip)
        if answers.whole:
            self._shadows.offer(dealt, answers)

    def shadows(self) -> list[ShadowReport]:
        """What came of every shadow so far."""
        return [ShadowReport(alias, version, tally) for (alias, version), tally in self._shadows.tallies.items()]
