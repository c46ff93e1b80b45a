"""Around every request: a name of its own, bodies that are bounded in size and time, answers that are counted.

This module does not know the routes.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Sequence

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tenon.serve.watching.records import Observer, Record, begin

REQUEST_ID = "x-request-id"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# What clients may call a request; anything else would be a way to write into logs.
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Named:
    """Gives every request a name, the client's own where it brings a plain one, and sends it back with the answer.

    HEAD is answered as GET, of which the server sends the head.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        brought = _header(scope, REQUEST_ID.encode()) or ""
        name = brought if _REQUEST_ID.fullmatch(brought) else f"req-{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = name

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (REQUEST_ID.encode(), name.encode("ascii"))]
            await send(message)

        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        await self._app({**scope, "method": method}, receive, named)


class BodyBound:
    """Refuses bodies of more than `most_bytes` with 413, at the latest when the byte too many comes, and with 408 those
    that take longer than `seconds`.
    """

    def __init__(self, app: ASGIApp, most_bytes: int, seconds: float) -> None:
        self._app, self._most, self._seconds = app, most_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        taken, whole, deadline = 0, False, asyncio.get_running_loop().time() + self._seconds
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")

        async def bounded() -> Message:
            nonlocal taken, whole
            if whole:  # what comes now is that the client goes away, whenever that is
                return await receive()
            if announced.isdigit() and int(announced) > self._most:
                raise self._refusal()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"a body has to come within {self._seconds:.0f} seconds") from None
            taken += len(message.get("body", b""))
            if taken > self._most:
                raise self._refusal()
            whole = not message.get("more_body", False)
            return message

        await self._app(scope, bounded, send)

    def _refusal(self) -> HTTPException:
        return HTTPException(413, f"a body may have {self._most:,} bytes; send less, or ask for fewer at a time")


class Watched:
    """Keeps a record of every request and tells the observers when it has ended; what no route knows is one route."""

    def __init__(self, app: ASGIApp, observers: Sequence[Observer], keep_prompts: bool) -> None:
        self._app, self._observers, self._keep_prompts = app, observers, keep_prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = Record(
            id=scope["state"]["request_id"],
            method=scope["method"] if scope["method"] in _METHODS else "other",
            parent=_header(scope, b"traceparent"),
            keep_prompts=self._keep_prompts,
        )
        begin(record)

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            record.route, record.ended = getattr(scope.get("route"), "path", "other"), time.monotonic()
            for observer in self._observers:
                observer.ended(record)


def _header(scope: Scope, wanted: bytes) -> str | None:
    return next((value.decode("latin-1") for name, value in scope["headers"] if name == wanted), None)
