"""One client's connection: how long it may take to ask, to read, and to go away.

    header      a request's line and headers come within `header_seconds`
    body        the middleware's (`middleware.BodyBound`); what comes after the answer is thrown away for a while, also
                where the answer was the last one (`lingering`)
    answer      what was written is taken within `stalled_seconds`: at most `unsent_bytes` wait here, and while more
                wait the answer is not continued; a client that takes too little in that time is cut off
    at all      no more connections than there are handles for

uvicorn has none of these bounds, and asyncio closes a connection only when all that was written has been taken, which
may be never. This module does not know what is asked and answered.
"""

from __future__ import annotations

import asyncio
import json
import resource
from dataclasses import dataclass

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from tenon.serve.http.api_errors import ApiError, error_body
from tenon.serve.http.lingering import LingeringTransport

# Handles that everything else needs: files, the engine, the listening socket.
_OTHER_HANDLES = 128


@dataclass(frozen=True, slots=True)
class Bounds:
    """What connections may take. unsent_bytes: of one connection. linger_seconds: a body goes on after its answer."""

    header_seconds: float = 15.0
    body_seconds: float = 60.0
    stalled_seconds: float = 30.0
    linger_seconds: float = 10.0
    unsent_bytes: int = 1 << 16
    most_connections: int = 1 << 16


def raise_handles() -> int:
    """Let this process have as many handles as it may, and return how many connections that allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, 1 << 16) if hard != resource.RLIM_INFINITY else 1 << 16
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return max(soft - _OTHER_HANDLES, _OTHER_HANDLES)


def connection_class(bounds: Bounds) -> type[Connection]:
    """The protocol for uvicorn, which makes one for each connection."""

    class Bounded(Connection):
        _bounds = bounds

    return Bounded


class Connection(H11Protocol):
    """uvicorn's connection with bounds."""

    _bounds = Bounds()
    _reading: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A client has come; it has to ask soon."""
        self._lingering = LingeringTransport(
            transport, loop=self.loop, sends=self._client_sends, seconds=self._bounds.linger_seconds
        )
        super().connection_made(self._lingering)
        if len(self.connections) > self._bounds.most_connections:
            transport.abort()
            return
        transport.set_write_buffer_limits(high=self._bounds.unsent_bytes)
        self._reading = self.loop.call_later(self._bounds.header_seconds, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone, or was cut off."""
        super().connection_lost(exc)
        self._lingering.gone()
        for timer in (self._reading, self._writing):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        """The next bytes of a request."""
        if self._lingering.lingers:
            return
        super().data_received(data)
        self._watch_reading()

    def pause_writing(self) -> None:
        """More waits to be taken than may."""
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        """The client has taken most of it."""
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def on_response_complete(self) -> None:
        """All of an answer is written, though perhaps not taken."""
        super().on_response_complete()
        self._watch_reading()
        self._watch_writing()

    def shutdown(self) -> None:
        """The server ends."""
        super().shutdown()
        self._lingering.hurry()
        self._watch_writing()

    def send_400_response(self, msg: str) -> None:
        """What came is not HTTP. In the one shape that every error has, where an answer has not begun."""
        try:
            body = json.dumps(error_body(ApiError(400, msg))).encode()
            headers = [
                ("content-type", "application/json"),
                ("connection", "close"),
                ("content-length", f"{len(body)}"),
            ]
            for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
            self.transport.close()
        except h11.LocalProtocolError:
            self.transport.abort()

    def _client_sends(self) -> bool:
        """Whether there may be more of a request, or of what is none."""
        return self.conn.their_state in (h11.SEND_BODY, h11.ERROR)

    def _watch_reading(self) -> None:
        """Give what the client has begun its time: a header, or a body whose answer is complete already."""
        state, answered = self.conn.their_state, self.cycle is None or self.cycle.response_complete
        seconds = None
        if state is h11.IDLE and (self.cycle is None or self.conn.trailing_data[0]):
            seconds = self._bounds.header_seconds
        elif state is h11.SEND_BODY and answered:
            seconds = self._bounds.linger_seconds
        if seconds is None and self._reading is not None:
            self._reading.cancel()
            self._reading = None
        elif seconds is not None and self._reading is None and not self.transport.is_closing():
            self._reading = self.loop.call_later(seconds, self.transport.abort)

    def _watch_writing(self) -> None:
        """Give the client time to take what is written."""
        if self._writing is None and self.transport.get_write_buffer_size():
            self._writing = self.loop.call_later(self._bounds.stalled_seconds, self._stalled, self.cycle)

    def _stalled(self, cycle: object) -> None:
        self._writing = None
        ended = self.transport.is_closing() or (cycle is self.cycle and self.cycle.response_complete)
        if self.flow.write_paused or (ended and self.transport.get_write_buffer_size()):
            self.transport.abort()
