"""Answers over HTTP: server-sent events, and what happens when the client goes away.

This module does not know what the answers say.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from tenon.errors import TenonError
from tenon.serve.front.gate import Answers
from tenon.serve.http.api_errors import ApiError, as_api_error, error_body
from tenon.serve.watching.records import CLIENT_GONE, current

DONE = "data: [DONE]\n\n"
# One event of a stream, which is what OpenAPI before 3.2 describes in the place of the whole.
_EVENT = {
    "type": "object",
    "properties": {
        "data": {"type": "string", "description": "A chunk as JSON, an error as JSON, or `[DONE]`."},
        "event": {"type": "string"},
    },
    "required": ["data"],
}
# What OpenAPI says of answers that may come as a stream.
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with `stream` server-sent events, each a chunk, and `[DONE]`.",
        "content": {"text/event-stream": {"schema": _EVENT}},
    }
}
# Ends of a line for Python's str.splitlines, and so for many clients, but not for server-sent events.
_LINE_ENDS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}
_T = TypeVar("_T")


async def unless_gone(request: Request, answers: Answers, work: Coroutine[Any, Any, _T]) -> _T:
    """The work's result; without one, its answers are ended. Raises ApiError 499 when the client goes away first."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ApiError(CLIENT_GONE, "the client went away")
    except BaseException:
        answers.cancel()
        raise
    finally:
        leaving.cancel()
        working.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Chunks as server-sent events. However it ends, the sequences end with it."""

    def __init__(self, answers: Answers, chunks: AsyncIterator[BaseModel]) -> None:
        current().stream = True
        super().__init__(events(chunks), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all chunks; stops when the client has gone."""
        with self._answers:
            await super().__call__(scope, receive, send)


async def events(chunks: AsyncIterator[BaseModel]) -> AsyncIterator[str]:
    """Each chunk as an event, then the end; an error in between is the last event."""
    try:
        async for chunk in chunks:
            yield f"data: {_in_a_line(chunk.model_dump_json(exclude_unset=True))}\n\n"
    except TenonError as error:
        told = as_api_error(error)
        current().error = told.code
        yield f"data: {json.dumps(error_body(told))}\n\n"
    else:
        yield DONE


def _in_a_line(text: str) -> str:
    """JSON that nobody takes for several lines (RFC 8259 lets any character of a string be written as its escape)."""
    return text if text.isascii() else text.translate(_LINE_ENDS)
