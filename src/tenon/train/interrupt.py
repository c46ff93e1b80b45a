"""Stopping a run within a bounded time: SIGTERM and Ctrl-C.

While a gradient is being made nothing that is kept changes, so the signal may end that work at once, in the middle of a
step of any length. While parameters change or a checkpoint is written the signal only leaves a mark, and the loop stops
at the next safe place. This module does not know what is trained.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopNow(BaseException):
    """Raised out of interruptible work. Not an Exception, so that nothing on the way takes it for an error."""


class StopSignal:
    """Remembers that the run was asked to stop, and may end interruptible work at once."""

    def __init__(self) -> None:
        self.requested = False
        self._interruptible = False

    def request(self) -> None:
        """Ask the run to stop."""
        self.requested = True
        if self._interruptible:
            self._interruptible = False
            raise StopNow

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Work that may be ended at any instruction because its results are not kept. Raises StopNow."""
        self._interruptible = True
        try:
            if self.requested:
                raise StopNow
            yield
        finally:
            self._interruptible = False

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
