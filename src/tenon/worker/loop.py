"""What every worker process does around its work: requests in, events out, signals, exit statuses.

    train RUN_FOLDER         events go to the run folder's events.jsonl; the plan is in the folder
    evaluate|generate|inspect|check|serve REQUEST.json
    chat REQUESTS.jsonl      one request a line: a ChatStart, then ChatTurns
    engine -                 an EngineRequest, then jobs, a line each (tenon.serve.pool.job_lines)

TARGET `-` reads the request from standard input (for train the target is always a folder). Standard output carries
events as JSON lines and nothing else: whatever a library prints goes to standard error, which the light side keeps as a
log. `--watch` ends the work, saved, when standard input is closed: a worker does not outlive its terminal unnoticed.

Exit statuses: 0 done, or a server that was stopped; 1 and 2 an error, told as an `error` event; 75 stopped and saved,
resume it. An unexpected exception leaves its traceback in the log and no event. This module knows no arithmetic
(pipeline) and no screens (cli).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TextIO, TypeVar

from tenon.errors import EXIT_USAGE, StopRequestedError, TenonError, UsageError
from tenon.kernels.gpu_errors import gpu_errors
from tenon.plan.requests import (
    ChatRequest,
    ChatStart,
    ChatTurn,
    CheckRequest,
    EngineRequest,
    EvaluateRequest,
    GenerateRequest,
    InspectRequest,
    ServeRequest,
)
from tenon.settings import Settings, read_settings
from tenon.values import Value

KINDS = ("train", "evaluate", "generate", "inspect", "check", "serve", "chat", "engine")
_V = TypeVar("_V", bound=Value)


class Emit(Protocol):
    """Tells the light side one event."""

    def __call__(self, kind: str, /, **fields: Any) -> None: ...


class Pipeline(Protocol):
    """The work itself: `tenon.pipeline`, or a stand-in."""

    def train(self, run_folder: Path, settings: Settings, /) -> None: ...

    def evaluate(self, request: EvaluateRequest, emit: Emit, settings: Settings, /) -> None: ...

    def generate(self, request: GenerateRequest, emit: Emit, settings: Settings, /) -> None: ...

    def inspect_data(self, request: InspectRequest, emit: Emit, settings: Settings, /) -> None: ...

    def check_kernels(self, request: CheckRequest, emit: Emit, settings: Settings, /) -> None: ...

    def serve(self, request: ServeRequest, emit: Emit, settings: Settings, /) -> None: ...

    def chat(self, requests: Iterator[ChatRequest], emit: Emit, settings: Settings, /) -> None: ...

    def engine(self, request: EngineRequest, lines: Iterator[str], emit: Emit, settings: Settings, /) -> None: ...


class Channel:
    """Standard output as lines of events, taken away from everybody else."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.interrupted = False

    @classmethod
    def claim_stdout(cls) -> Channel:
        """Keep the real standard output for events; what libraries print there goes to standard error."""
        sys.stdout.flush()
        private = os.dup(1)
        os.dup2(2, 1)
        return cls(os.fdopen(private, "w", encoding="utf-8"))

    def emit(self, kind: str, /, **fields: Any) -> None:
        """Write one event. Raises StopRequestedError when the user has interrupted the answer that is being written."""
        line = json.dumps({"t": round(time.time(), 3), "kind": kind, **fields}, ensure_ascii=False)
        self._stream.write(line + "\n")
        self._stream.flush()
        if self.interrupted and kind == "token":
            self.interrupted = False
            raise StopRequestedError("usage-answer-stopped", "the answer was interrupted", hint="type the next message")


def work(argv: Sequence[str], load_pipeline: Callable[[], Pipeline]) -> int:
    """Do one piece of work; returns the exit status."""
    words = [word for word in argv if word != "--watch"]
    if len(words) != 2 or words[0] not in KINDS:
        sys.stderr.write(f"usage: python -m tenon.worker {{{'|'.join(KINDS)}}} TARGET [--watch]\n")
        return EXIT_USAGE
    channel = Channel.claim_stdout()
    kind, target = words
    _listen_to_signals(kind, channel)
    try:
        request = _first_request(kind, target)
        if "--watch" in argv and kind not in ("chat", "engine"):  # these read their input, and see its end
            threading.Thread(target=_stop_at_end_of_input, name="watch", daemon=True).start()
        pipeline = load_pipeline()
        settings = read_settings()
        with gpu_errors(resume="start it again"):
            if kind == "train":
                pipeline.train(Path(target), settings)
            elif kind == "chat":
                pipeline.chat(_chat_requests(request, target, channel), channel.emit, settings)
            elif kind == "engine":
                pipeline.engine(_parse(EngineRequest, request), sys.stdin, channel.emit, settings)
            else:
                _answer(kind, request, pipeline=pipeline, channel=channel, settings=settings)
    except TenonError as error:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # it ends anyway, and is to say why
        channel.emit("error", code=error.code, what=error.what, got=error.got, hint=error.hint)
        return error.exit_status
    return 0


def _answer(kind: str, request: str, *, pipeline: Pipeline, channel: Channel, settings: Settings) -> None:
    """One request, answered in events."""
    if kind == "evaluate":
        pipeline.evaluate(_parse(EvaluateRequest, request), channel.emit, settings)
    elif kind == "generate":
        pipeline.generate(_parse(GenerateRequest, request), channel.emit, settings)
    elif kind == "check":
        pipeline.check_kernels(_parse(CheckRequest, request), channel.emit, settings)
    elif kind == "serve":
        pipeline.serve(_parse(ServeRequest, request), channel.emit, settings)
    else:
        pipeline.inspect_data(_parse(InspectRequest, request), channel.emit, settings)


def _first_request(kind: str, target: str) -> str:
    """The text of the request (for chat from standard input: of the first one); empty for train: the folder says it."""
    if kind == "train":
        return ""
    if target == "-":
        return sys.stdin.readline()
    try:
        return Path(target).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(
            "usage-worker-request", f"{target}: the request cannot be read", got=str(error), hint="give a request file"
        ) from error


def _chat_requests(first: str, target: str, channel: Channel) -> Iterator[ChatRequest]:
    """Requests of a conversation: all lines of a file, or of standard input for as long as it stays open."""
    lines = iter(first.splitlines())
    yield _parse(ChatStart, next(lines, ""))
    for line in lines if target != "-" else sys.stdin:
        if line.strip():
            channel.interrupted = False
            yield _parse(ChatTurn, line)


def _parse(request_type: type[_V], text: str) -> _V:
    """A request from its JSON. Raises UsageError when it is none."""
    try:
        return request_type.from_json(text)
    except ValueError as error:
        raise UsageError(
            "usage-worker-request",
            f"the request is no {request_type.__name__}",
            got=str(error).replace("\n", "; ")[:300],
            hint="let the tenon command start the worker, of the same version",
        ) from error


def _listen_to_signals(kind: str, channel: Channel) -> None:
    """SIGTERM and Ctrl-C stop the work. Training replaces these handlers once it has something to save.

    In a conversation Ctrl-C ends the answer, not the worker, and SIGTERM ends it at once: nothing is lost. An engine
    heeds neither, since supervisors send them to every process of a server: its front says when it may end.
    """

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise StopRequestedError("run-stopped", "stopped before any work was done", hint="start it again")

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        channel.interrupted = True

    if kind == "engine":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return
    if kind == "chat":
        signal.signal(signal.SIGINT, interrupt)
        return
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


def _stop_at_end_of_input() -> None:
    """Wait until whoever started this process is gone, then ask ourselves to stop."""
    while os.read(0, 65536):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
