"""A connection that is closed only when its client has stopped sending.

A socket that is closed while something unread lies in it is reset, and a reset may overtake the answer: whoever sent a
body that was refused early would read nothing of why. So the answer is followed by an end of our side alone, and what
still comes is thrown away, for a while (RFC 9112, 9.6). This module does not know HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any


class LingeringTransport(asyncio.Transport):
    """The transport of a connection, but for how it is closed."""

    def __init__(
        self, inner: asyncio.Transport, *, loop: asyncio.AbstractEventLoop, sends: Callable[[], bool], seconds: float
    ) -> None:
        """sends: whether the client has not sent all of what it began. seconds: how long it may go on."""
        super().__init__()
        self._inner, self._loop, self._sends, self._seconds = inner, loop, sends, seconds
        self._timer: asyncio.TimerHandle | None = None

    @property
    def lingers(self) -> bool:
        """Whether all is said, and what comes is to be thrown away."""
        return self._timer is not None

    def close(self) -> None:
        """Close it, once the client has stopped sending or has had its time."""
        if self.is_closing():
            return
        if not self._sends():
            self._inner.close()
            return
        self._timer = self._loop.call_later(self._seconds, self._inner.abort)
        if self._inner.can_write_eof():
            self._inner.write_eof()
        self._inner.resume_reading()

    def hurry(self) -> None:
        """Wait no longer for a client that goes on sending."""
        if self._timer is not None:
            self._inner.close()

    def gone(self) -> None:
        """The connection is lost."""
        if self._timer is not None:
            self._timer.cancel()

    def is_closing(self) -> bool:
        """Whether nothing more is to be written."""
        return self._timer is not None or self._inner.is_closing()

    # ---- as it is -----------------------------------------------------------------------------------------------

    def abort(self) -> None:
        """Close it at once."""
        self._inner.abort()

    def write(self, data: Any) -> None:
        """Write, unless all is said."""
        if self._timer is None:
            self._inner.write(data)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """What is known of the connection."""
        return self._inner.get_extra_info(name, default)

    def get_write_buffer_size(self) -> int:
        """Bytes that wait to be taken."""
        return self._inner.get_write_buffer_size()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """How many may wait."""
        self._inner.set_write_buffer_limits(high, low)

    def pause_reading(self) -> None:
        """Take nothing more for now."""
        self._inner.pause_reading()

    def resume_reading(self) -> None:
        """Go on."""
        self._inner.resume_reading()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Another one speaks."""
        self._inner.set_protocol(protocol)
