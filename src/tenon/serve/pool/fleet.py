"""The engine processes of one server: started, watched, replaced when they are lost, and let go when they are too many.

Each has a place, by number: a GPU, or a part of a CPU. A place whose engine was lost gets a new one, later each time it
happens. This module knows no jobs: whoever asks says how many sequences an engine has, and is told of those lost.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tenon.errors import TenonError
from tenon.serve.pool.job_lines import Pass
from tenon.serve.pool.replica import Patience, Replica, StartEngine, State


@dataclass(slots=True)
class _Place:
    """wanted: whether an engine is to be here. failures: lost in a row. not_before: when the next may start."""

    number: int
    replica: Replica | None = None
    wanted: bool = False
    failures: int = 0
    not_before: float = 0.0


@dataclass(frozen=True, slots=True)
class Heard:
    """What one engine told, in order; lost: why it is gone, where it is."""

    replica: Replica
    passes: list[Pass]
    lost: TenonError | None


class Fleet:
    """Belongs to one thread. `count`: engines that are wanted."""

    def __init__(
        self, start: StartEngine, *, most: int, count: int, patience: Patience, say: Callable[[dict[str, Any]], None]
    ) -> None:
        """most: places. say: gets the events of engines that concern the user."""
        self._start, self._patience, self._say = start, patience, say
        self._places = [_Place(number) for number in range(most)]
        self._rolling: deque[int] = deque()
        self._last: TenonError | None = None
        self.restarts = 0
        self.count = 0
        self.want(count)

    # ---- what is there ------------------------------------------------------------------------------------------

    @property
    def replicas(self) -> list[Replica]:
        """Those whose process lives."""
        return [place.replica for place in self._places if place.replica is not None]

    @property
    def ready(self) -> list[Replica]:
        """Those that take sequences."""
        return [replica for replica in self.replicas if replica.state == State.READY]

    @property
    def settled(self) -> bool:
        """Whether nothing is coming or going."""
        return len(self.ready) == self.count == len(self.replicas)

    def states(self) -> Counter[str]:
        """How many there are of each state."""
        found = Counter(replica.state.value for replica in self.replicas)
        found[State.LOST.value] = sum(place.wanted and place.replica is None for place in self._places)
        return found

    # ---- what is wanted -----------------------------------------------------------------------------------------

    def want(self, count: int) -> None:
        """Have so many engines: places are taken from the first on, and given up from the last."""
        for place in self._places:
            place.wanted = place.number < count
        self.count = count

    def roll(self) -> None:
        """Replace every engine by a new one, one after the other."""
        self._rolling = deque(replica.number for replica in self.replicas)

    def move(self, now: float, sequences: Callable[[Replica], int]) -> None:
        """Start and let go what is to be started and let go. Raises TenonError when nothing starts any more."""
        self._require_hope()
        for place in self._places:
            replica = place.replica
            if replica is None:
                if place.wanted and now >= place.not_before:
                    place.replica = Replica(place.number, self._start(place.number), now)
            elif not place.wanted and replica.state in (State.READY, State.STARTING):
                replica.become(State.DRAINING, now)
            elif replica.state == State.DRAINING and not sequences(replica):
                replica.become(State.ENDING, now)
                replica.close()
            elif replica.state == State.ENDING and now - replica.state_since > self._patience.end_seconds:
                replica.worker.kill()
        self._roll_on(now)

    def _roll_on(self, now: float) -> None:
        """Let the next engine go that is to be replaced, once all others are well."""
        if self._rolling and self.settled:
            replica = self._places[self._rolling.popleft()].replica
            if replica is not None:
                replica.become(State.DRAINING, now)

    # ---- what is heard ------------------------------------------------------------------------------------------

    def hear(self, now: float) -> list[Heard]:
        """What all engines have told since, and who is lost."""
        return [self._hear(place, place.replica, now) for place in self._places if place.replica is not None]

    def _hear(self, place: _Place, replica: Replica, now: float) -> Heard:
        passes = replica.hear(now, self._say)
        if replica.gone(now):
            lost = self._bury(place, replica, now, None)
        else:
            overdue = replica.overdue(now, self._patience)
            lost = None if overdue is None else self._bury(place, replica, now, overdue)
            if replica.state == State.READY and now - replica.state_since > self._patience.well_seconds:
                place.failures = 0
        return Heard(replica, passes, lost)

    def _bury(self, place: _Place, replica: Replica, now: float, why: TenonError | None) -> TenonError | None:
        """Clear a place; why it was lost, or None where it was to go."""
        expected = replica.state == State.ENDING
        why = why if expected or why is not None else replica.fate()
        replica.bury()
        replica.become(State.LOST, now)
        place.replica = None
        if expected:
            replica.worker.log.unlink(missing_ok=True)
            return None
        assert why is not None
        place.failures += 1
        self.restarts += 1
        patience = self._patience
        wait = min(patience.backoff_seconds * 2 ** (place.failures - 1), patience.most_backoff_seconds)
        place.not_before = now + wait
        self._last = why
        return why

    def _require_hope(self) -> None:
        """Raises the last engine's error when starting it again has helped nowhere."""
        failures = [place.failures for place in self._places if place.wanted]
        if self._last and failures and min(failures) >= self._patience.starts and not self.ready:
            raise self._last

    def close(self) -> None:
        """End all: those that are well within a moment."""
        for replica in self.replicas:
            replica.close()
        for place in self._places:
            if place.replica is not None:
                place.replica.worker.wait(self._patience.end_seconds)
                place.replica.bury()
                place.replica.worker.log.unlink(missing_ok=True)
                place.replica = None
