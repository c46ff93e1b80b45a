"""Who watches a server's requests: its log and its traces, as the request asks for them.

This module does not know what is seen, nor when.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from tenon.data.tokenizer import ChatTokenizer
from tenon.errors import UsageError
from tenon.pipeline.slot_data import Emit
from tenon.plan.requests import ServeRequest
from tenon.serve.watching.records import Observer
from tenon.serve.watching.request_log import RequestLog
from tenon.settings import Settings

if TYPE_CHECKING:
    from tenon.serve.watching.tracing import Tracing


@dataclass(frozen=True, slots=True)
class Watch:
    """Close it when no request comes any more."""

    log: RequestLog | None
    tracing: Tracing | None
    file: int | None

    @property
    def observers(self) -> tuple[Observer, ...]:
        """Those who are to be told of requests."""
        return tuple(each for each in (self.log, self.tracing) if each is not None)

    def close(self) -> None:
        """Let them tell what they still have."""
        for each in (self.log, self.tracing):
            if each is not None:
                each.close()
        if self.file is not None:
            os.close(self.file)


def open_watch(request: ServeRequest, settings: Settings, tokenizer: ChatTokenizer, emit: Emit) -> Watch:
    """Open what a request asks for. Raises UsageError usage-log."""

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, keep_special=True)

    log = tracing = file = None
    if request.log is not None:
        file = None if request.log == "-" else _open(Path(request.log))
        log = RequestLog(_writer(file, emit), decode=decode, prompts=request.log_prompts)
    if request.trace:
        # Only a server that traces needs the packages.
        from tenon.serve.watching.tracing import Tracing, otlp_processor

        tracing = Tracing(
            otlp_processor(settings.otlp_endpoint),
            version=metadata.version("tenonlm"),
            decode=decode,
            prompts=request.log_prompts,
        )
    return Watch(log, tracing, file)


def _open(path: Path) -> int:
    """For its owner alone: it says who asked when."""
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UsageError(
            "usage-log",
            f"cannot write to {path}: {error.strerror}",
            hint="give another file with --log, or - for events",
        ) from error


def _writer(file: int | None, emit: Emit) -> Callable[[str], None]:
    def tell(line: str) -> None:
        emit("request", **json.loads(line))

    def append(line: str) -> None:
        assert file is not None
        os.write(file, f"{line}\n".encode())  # one call for a line: several servers may write to one file

    return tell if file is None else append
