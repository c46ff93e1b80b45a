"""One line of JSON for each request. No prompt and no answer unless prompts are asked for, and never a key.

    {"time": "2026-11-26T10:00:00.123Z", "id": "req-…", "tenant": "acme", "model": "bot@3", "status": 200, …}

Lines are written by a thread of its own: a slow disk keeps no stream waiting. When too many lines wait, new ones are
dropped, as are those that cannot be written; the next line says how many. This module does not know HTTP.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from tenon.serve.watching.records import Record

_MOST_WAITING = 10_000
_LAST_LINES_SECONDS = 5.0


class RequestLog:
    """An observer that writes. Close it to have the last lines written."""

    def __init__(
        self, write: Callable[[str], None], *, decode: Callable[[Sequence[int]], str], prompts: bool = False
    ) -> None:
        """write: takes a line without its end; may block. decode: token ids as text; only called with prompts."""
        self._write, self._decode, self.prompts = write, decode, prompts
        self._waiting: queue.Queue[Record | None] = queue.Queue(_MOST_WAITING)
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name="request-log", daemon=True)
        self._thread.start()

    def ended(self, record: Record, /) -> None:
        """Have its line written."""
        try:
            self._waiting.put_nowait(record)
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Write what waits, as far as whoever takes it does so soon: a pipe that nobody reads keeps no server alive."""
        with suppress(queue.Full):
            self._waiting.put(None, timeout=_LAST_LINES_SECONDS)
        self._thread.join(_LAST_LINES_SECONDS)

    def _run(self) -> None:
        while (record := self._waiting.get()) is not None:
            line = line_of(record)
            if self.prompts:
                line["prompts"] = [self._decode(ids) for ids in record.prompts]
            dropped, self._dropped = self._dropped, 0
            if dropped:
                line["dropped_before"] = dropped
            try:
                self._write(json.dumps(line, ensure_ascii=True, separators=(",", ":")))
            except OSError:  # a full disk, a reader that is gone: answers go on
                self._dropped += dropped + 1


def line_of(record: Record) -> dict[str, Any]:
    """What a line says: times in seconds; what did not come so far is left out."""
    ended = record.began if record.ended is None else record.ended
    seconds = record.began_unix_seconds
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    found: dict[str, Any] = {
        "time": f"{whole}.{int(seconds * 1000) % 1000:03d}Z",
        "id": record.id,
        "method": record.method,
        "route": record.route,
        "status": record.status,
        "outcome": record.outcome,
        "error": record.error,
        "tenant": record.tenant,
        "key": record.key,
        "model": record.model,
        "stream": record.stream if record.model else None,
        "sequences": record.sequences or None,
        "prompt_tokens": record.prompt_tokens if record.submitted else None,
        "completion_tokens": record.completion_tokens if record.submitted else None,
        "finish": list(record.finish) or None,
        "adapter_wait_seconds": _rounded(None if record.waits is None else record.waits.adapter_seconds),
        "queue_seconds": _rounded(None if record.waits is None else record.waits.place_seconds),
        "first_token_seconds": _rounded(record.first_token_seconds),
        "token_seconds": _rounded(record.token_seconds),
        "seconds": _rounded(ended - record.began),
    }
    return {name: value for name, value in found.items() if value is not None}


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
