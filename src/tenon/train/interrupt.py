"""Stopping a run within a bounded time: SIGTERM and Ctrl-C.

While a gradient is being made nothing that is kept changes, so the signal may end that work at once, in the middle of a
step of any length. While parameters change or a checkpoint is written the signal only leaves a mark, and the loop stops
at the next safe place. Several ranks stop together: whichever heard a signal, all of them drop the same work.

Where ranks compute with each other's weights none may drop its work alone; there the signal leaves a mark, and they
stop together at the next pass (see `models.shards.Stop`). This module does not know what is trained.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tenon.ranks.group import ALONE, Ranks


class StopNow(BaseException):
    """Raised out of interruptible work. Not an Exception, so that nothing on the way takes it for an error."""


class StopSignal:
    """Remembers that the run was asked to stop, and may end interruptible work at once.

    at_once: False where ranks may stop at their passes alone.
    """

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self.requested = False
        self.at_once = True
        self._interruptible = False
        self._settled = True
        self._ranks = ranks

    def request(self) -> None:
        """Ask the run to stop."""
        self.requested = True
        if self._interruptible and self.at_once:
            self.now()

    @property
    def pending(self) -> bool:
        """Whether interruptible work goes on that should end."""
        return self.requested and self._interruptible

    def now(self) -> None:
        """End interruptible work. Raises StopNow."""
        self._interruptible = False
        raise StopNow

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Work that may be ended at any instruction because its results are not kept.

        Raises StopNow, on all ranks when it is raised on one: they wait for each other at the end of the block.
        """
        stopped = self._settled = False
        try:
            try:
                self._interruptible = True
                if self.requested and self.at_once:
                    raise StopNow
                yield
                stopped = self.requested
            finally:
                self._interruptible = False
        except StopNow:
            stopped = True
        (stopped_somewhere,) = self._ranks.largest(float(stopped))
        self._settled = True
        if stopped_somewhere:
            raise StopNow

    def settle(self) -> None:
        """After StopNow: agree on it, if it came where `interruptible` could not (while it left its block)."""
        if not self._settled:
            self._settled = True
            self._ranks.largest(1.0)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM and SIGINT as requests to stop, and give the signals back afterwards. Main thread only."""

        def on_signal(_number: int, _frame: FrameType | None) -> None:
            self.request()

        before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
