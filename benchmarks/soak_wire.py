"""HTTP as a soak needs it: a request is written whole, its answer is read line by line, and either can be cut off.

HTTP/1.0, so that an answer ends with its connection. This module does not know what is asked.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens."""

    host: str
    port: int


class Exchange:
    """One request and its answer. Use as an async context manager; leaving closes the connection."""

    def __init__(self, address: Address, path: str, body: object | None, key: str) -> None:
        """body: sent as JSON, or as it is when it is bytes; None is a GET."""
        self._address, self._key = address, key
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.0", f"Host: {address.host}"]
        lines += [f"Content-Length: {len(data)}", "Content-Type: application/json", f"Authorization: Bearer {key}"]
        self._request = "\r\n".join([*lines, "", ""]).encode() + data

    async def __aenter__(self) -> Exchange:
        self._reader, self._writer = await asyncio.open_connection(self._address.host, self._address.port)
        self._writer.write(self._request)
        with suppress(ConnectionError):  # refused before all of it was read: the answer is there all the same
            await self._writer.drain()
        return self

    async def __aexit__(self, *_ignored: object) -> None:
        self._writer.close()
        with suppress(ConnectionError):
            await self._writer.wait_closed()

    async def status(self) -> int:
        """The answer's status; its headers are read."""
        line = await self._reader.readline()
        while (await self._reader.readline()).strip():
            pass
        return int(line.split()[1])

    async def whole(self) -> Any:
        """All of the body, as JSON where it is JSON."""
        data = await self._reader.read()
        return json.loads(data) if data[:1] in (b"{", b"[") else data.decode()

    async def events(self) -> AsyncIterator[Any]:
        """The events of a stream as they come, without the last `[DONE]`. Raises EOFError when that never came."""
        async for line in self._reader:
            if line.startswith(b"data: [DONE]"):
                return
            if line.startswith(b"data: "):
                yield json.loads(line[6:])
        raise EOFError("the stream broke off")
