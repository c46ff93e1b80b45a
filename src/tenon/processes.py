"""Starts worker processes and listens to them: the light side's only way to heavy work.

A worker runs in a process group of its own, so that Ctrl-C in the terminal reaches the command first: the command
decides what becomes of the work. Its standard input is held open; when this process dies, however it dies, the worker
notices and stops, saved (`tenon.worker.loop`). This module does not know what the work is, nor how events are shown.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from tenon.errors import RunError, StopRequestedError, TenonError, error_of
from tenon.settings import Settings, child_environment
from tenon.values import Value

Event: TypeAlias = dict[str, Any]

_LOG_TAIL_BYTES = 4000


@dataclass(frozen=True, slots=True)
class Ended:
    """How a worker ended: its exit status (negative: the signal that killed it) and the error it told, if any."""

    status: int
    error: TenonError | None


class Worker:
    """One worker process. Use `start_worker`."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._stops = 0
        self.log = log
        self.error: TenonError | None = None

    @property
    def pid(self) -> int:
        """Its process id, which is also its process group."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """False once it has ended."""
        return self._process.poll() is None

    @property
    def pipes(self) -> tuple[int, int]:
        """File descriptors of its output and its input, for whoever waits for several workers at a time: `events` and
        `send` are not for use beside them.
        """
        assert self._process.stdout is not None and self._process.stdin is not None
        return self._process.stdout.fileno(), self._process.stdin.fileno()

    def send(self, request: Value) -> None:
        """Write one request to its standard input."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: `finish` says how
            self._process.stdin.write(request.to_json().encode() + b"\n")
            self._process.stdin.flush()

    def events(self) -> Iterator[Event]:
        """Its events as they come, until it closes its output. An `error` event is kept in `error` and not given."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            event = json.loads(line)
            if event["kind"] == "error":
                # Several processes may tell: the first one's is the cause, unless it only missed another one.
                if self.error is None or self.error.code == "train-rank-lost":
                    self.error = revive_error(event)
            else:
                yield event

    def interrupt(self) -> None:
        """Ctrl-C for the worker alone: in a conversation it ends the answer."""
        self._signal(signal.SIGINT)

    def stop(self) -> None:
        """Ask it to save and end; asked a second time, it is killed with everything that it started."""
        self._stops += 1
        self._signal(signal.SIGTERM if self._stops == 1 else signal.SIGKILL)

    def kill(self) -> None:
        """End it at once, with everything that it started: for work that has nothing to save."""
        if self.running:
            self._signal(signal.SIGKILL)
            self._process.wait()
        self.close_input()

    def wait(self, seconds: float) -> bool:
        """Whether it ends within so many seconds."""
        try:
            self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def fate(self) -> TenonError:
        """Why it has ended, though nobody asked it to: what it told, or what its status and its log say."""
        return self.error or _died(self._process.wait(), self.log)

    @property
    def stopping(self) -> bool:
        """Whether it was asked to stop."""
        return self._stops > 0

    def close_input(self) -> None:
        """No request follows: a conversation ends."""
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()

    def close_output(self) -> None:
        """Nobody listens any more."""
        if self._process.stdout is not None:
            self._process.stdout.close()

    def finish(self) -> Ended:
        """Wait for its end. Raises the error that it told, or RunError when it died without a word."""
        for _ in self.events():
            pass
        status = self._process.wait()
        self.close_input()
        if status == 0:
            return Ended(0, None)
        if self.error is None and self.stopping:
            raise StopRequestedError("run-stopped", "the work was stopped", hint="start it again")
        raise self.error or _died(status, self.log)

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(self.pid, number)
            else:
                self._process.send_signal(number)


def start_worker(
    kind: str, target: Path | None, *, settings: Settings, log: Path, detach: bool = False, processes: int = 1
) -> Worker:
    """Start `python -m tenon.worker KIND TARGET`; without a target it waits for its request on standard input.

    log: gets what it writes to standard error, appended. detach: it goes on when this process ends. processes: as many
    workers on the same target, which torchrun starts, stops and watches.
    """
    several = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [sys.executable, "-m", *(several if processes > 1 else ()), settings.worker, kind]
    command.append("-" if target is None else str(target))
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as log_file:
        process = subprocess.Popen(
            command if detach else [*command, "--watch"],
            stdin=subprocess.DEVNULL if detach else subprocess.PIPE,
            stdout=log_file if detach else subprocess.PIPE,
            stderr=log_file,
            env=child_environment(settings),
            process_group=None if detach else 0,
            start_new_session=detach,
        )
    return Worker(process, log)


def ask_worker(kind: str, request: Value, *, settings: Settings) -> Generator[Event]:
    """Have one request answered, as events. Raises what the worker raised. Leaving early stops the worker."""
    log = worker_log(kind, settings)
    worker = start_worker(kind, None, settings=settings, log=log)
    try:
        worker.send(request)
        yield from worker.events()
        worker.finish()
        log.unlink(missing_ok=True)
    finally:
        if worker.running:
            worker.stop()
            worker.close_input()
            _wait_or_kill(worker)


def worker_log(kind: str, settings: Settings) -> Path:
    """Where a worker without a run folder writes what it would print: removed when all went well."""
    return settings.home / "logs" / f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"


def revive_error(event: Event) -> TenonError:
    """The error that an `error` event tells, of the class that its code belongs to."""
    code, what = str(event["code"]), str(event["what"])
    return error_of(code, what, got=str(event.get("got", "")), hint=str(event["hint"]))


def _wait_or_kill(worker: Worker, patience_seconds: float = 10.0) -> None:
    deadline = time.monotonic() + patience_seconds
    while worker.running and time.monotonic() < deadline:
        time.sleep(0.02)
    if worker.running:
        worker.stop()


def _died(status: int, log: Path) -> RunError:
    """The error for a worker that ended without telling why."""
    if status == -signal.SIGKILL:
        return RunError(
            "run-worker-killed",
            "the worker process was killed (signal 9), most often because memory ran out",
            hint="look at the plan's memory, lower batch.micro_tokens or data.max_tokens; then start or resume it",
        )
    how = f"signal {-status}" if status < 0 else f"exit status {status}"
    return RunError(
        "run-worker-failed",
        f"the worker process ended unexpectedly ({how})",
        got=_last_line(log),
        hint=f"the whole report is in {log}; this is a fault of Tenon: please report it with that file",
    )


def _last_line(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LOG_TAIL_BYTES))
            lines = [line for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    except OSError:
        return ""
    return lines[-1].strip()[:300] if lines else ""
