"""How many engines there should be: more when sequences wait too long, fewer when one of them could go unmissed.

Pure: the time, and how long sequences wait, are told; this module starts and stops nothing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ScaleRule:
    """least, most: engines. up_delay_seconds: a wait that is too long; after up_seconds of nothing less, one is added.

    down_delay_seconds: a wait that is no wait; after down_seconds of nothing more, and with no more open sequences than
    down_share of what one engine less has places for, one goes. Between both waits nothing changes, nor does it while
    an engine is coming or going.
    """

    least: int
    most: int
    up_delay_seconds: float = 1.0
    up_seconds: float = 5.0
    down_delay_seconds: float = 0.1
    down_seconds: float = 60.0
    down_share: float = 0.7


class Scaler:
    """Decides from one moment to the next."""

    def __init__(self, rule: ScaleRule) -> None:
        self.rule = rule
        self._slow_since: float | None = None
        self._quiet_since: float | None = None

    def decide(self, now: float, *, delay_seconds: float, engines: int, settled: bool, share: float) -> int:
        """How many engines there should be. delay_seconds: the longest that a sequence waits, or has just waited.

        engines: that there are. settled: none of them is coming or going. share: open sequences over their places.
        """
        rule = self.rule
        if not settled:
            self._slow_since = self._quiet_since = None
            return engines
        fits = engines > 1 and share * engines <= rule.down_share * (engines - 1)
        slow = delay_seconds > rule.up_delay_seconds
        quiet = delay_seconds <= rule.down_delay_seconds and fits
        self._slow_since = (now if self._slow_since is None else self._slow_since) if slow else None
        self._quiet_since = (now if self._quiet_since is None else self._quiet_since) if quiet else None
        change = 0
        if self._slow_since is not None and now - self._slow_since >= rule.up_seconds:
            change = 1
        elif self._quiet_since is not None and now - self._quiet_since >= rule.down_seconds:
            change = -1
        if change:
            self._slow_since = self._quiet_since = None
        return max(rule.least, min(rule.most, engines + change))
