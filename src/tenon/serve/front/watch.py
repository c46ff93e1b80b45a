"""Whether a version that an alias was moved to does its work: outcomes are counted, and a guard rolls the alias back.

Only what the version is to blame for counts as a failure: errors whose code begins with `adapter-` (its files, its
weights, its template). What clients do wrong, full queues and a stopping server do not. Every server counts for itself;
of several that decide alike the first rolls back, for the alias must still stand where it stood.
This module knows no HTTP.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from tenon.errors import AdapterError, TenonError
from tenon.registry.store import Registry
from tenon.serve.front.names import Dealt
from tenon.serve.watching.life_metrics import LifeMetrics

# Of one version so many outcomes are remembered; a guard that looks further back sees these.
_MOST_KEPT = 10_000


@dataclass(frozen=True, slots=True)
class Trip:
    """A guard has tripped: so many of so many requests failed, the last one with `error`."""

    dealt: Dealt
    failed: int
    requests: int
    error: TenonError

    @property
    def reason(self) -> str:
        """In one sentence, as it is kept with the alias."""
        return (
            f"{self.failed} of {self.requests} requests to version {self.dealt.version} failed, the last with "
            f"{self.error.code}"
        )


@dataclass(slots=True)
class _Move:
    """What was counted since an alias was moved last. outcomes: of each version (when, failed)."""

    since: float
    outcomes: dict[int, deque[tuple[float, bool]]] = field(default_factory=dict)
    tripped: bool = False


class Watch:
    """Counts outcomes by alias and version. Safe to use from any thread."""

    def __init__(
        self,
        registry: Registry,
        metrics: LifeMetrics,
        say: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """say: told in a sentence what was rolled back, or could not be. clock: seconds."""
        self._registry, self._metrics, self._say, self._clock = registry, metrics, say, clock
        self._moves: dict[str, _Move] = {}
        self._lock = threading.Lock()

    def note(self, dealt: Dealt, error: TenonError | None) -> Trip | None:
        """Count one request that a version answered, or failed; the trip of the alias's guard, once a move."""
        if error is not None and not error.code.startswith("adapter-"):
            return None
        outcome = "answered" if error is None else "failed"
        self._metrics.outcomes.labels(dealt.spec, str(dealt.version), outcome).inc()
        guard = dealt.alias.guard
        if guard is None or guard.errors is None or dealt.version not in dealt.alias.watched:
            return None
        with self._lock:
            move = self._moves.get(dealt.spec)
            if move is None or move.since < dealt.alias.target.since:
                move = self._moves[dealt.spec] = _Move(dealt.alias.target.since)
            if move.tripped or move.since != dealt.alias.target.since:  # a request that began before the last move
                return None
            found = move.outcomes.setdefault(dealt.version, deque(maxlen=_MOST_KEPT))
            now = self._clock()
            found.append((now, error is not None))
            while found[0][0] < now - guard.seconds:
                found.popleft()
            failed = sum(bad for _, bad in found)
            if error is None or len(found) < guard.requests or failed <= guard.errors * len(found):
                return None
            move.tripped = True
        return Trip(dealt, failed, len(found), error)

    def roll_back(self, trip: Trip) -> None:
        """Roll the alias back, unless somebody moved it meanwhile. Reads and writes files."""
        spec = trip.dealt.spec
        try:
            moved = self._registry.roll_back_from(spec, trip.dealt.alias.target, trip.reason)
        except AdapterError as error:
            self._say(f"{spec} should be rolled back ({trip.reason}), and cannot be: {error.what}; {error.hint}")
            return
        if moved is not None:
            self._metrics.rollbacks.labels(spec).inc()
            left = trip.dealt.alias.target.describe()
            self._say(f"{spec} was rolled back from {left} to {moved.target.describe()}: {trip.reason}")
