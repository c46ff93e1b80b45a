"""Stop strings over text that comes in pieces. This module knows no tokens."""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Finds the stop string that is complete first, and holds back what may yet become one.

    What `push` and `finish` return, joined, is the text before the stop string, or all of it: the same however the text
    was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """What is certain now. After a stop string was found nothing more comes."""
        if self.found:
            return ""
        self._held += piece
        ends = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.found = True
            text, self._held = self._held[: min(ends)[1]], ""
            return text
        keep = max((_begun(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def finish(self) -> str:
        """What was held back: no stop string came of it."""
        text, self._held = self._held, ""
        return text


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of the text are the beginning of the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((count for count in range(longest, 0, -1) if text.endswith(stop[:count])), 0)
