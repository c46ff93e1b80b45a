"""Rates: so many a minute, with no more than a minute's worth at once.

    level(t) = min(capacity, level(t0) + (t - t0) capacity / 60)

The token bucket of traffic shaping: it fills at the rate and holds one minute. A request takes what it needs, or hears
how long it has to wait. What was taken too much is put back. One process's own, exact among its threads.
Source: Turner, 1986 (leaky bucket as a meter). This module does not know what is counted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

_SECONDS = 60.0


@dataclass(slots=True)
class Bucket:
    """per_minute: its rate, and the most that it holds. clock: seconds that only go forward."""

    per_minute: int
    clock: Callable[[], float] = time.monotonic
    _level: float = field(init=False)
    _at: float = field(init=False)
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._level, self._at = float(self.per_minute), self.clock()

    def take(self, count: int) -> float:
        """Take so many, and 0.0; or nothing, and the seconds after which there are enough.

        More than it ever holds counts as all that it holds: such a request waits for a full minute's worth.
        """
        wanted = min(count, self.per_minute)
        with self._lock:
            self._fill()
            if wanted <= self._level:
                self._level -= wanted
                return 0.0
            return (wanted - self._level) * _SECONDS / self.per_minute

    def put_back(self, count: int) -> None:
        """Give back what was taken and not used."""
        with self._lock:
            self._fill()
            self._level = min(float(self.per_minute), self._level + count)

    def _fill(self) -> None:
        now = self.clock()
        self._level = min(float(self.per_minute), self._level + max(0.0, now - self._at) * self.per_minute / _SECONDS)
        self._at = now
