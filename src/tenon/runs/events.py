"""The event log of a run: one JSON object a line, appended and never changed; all live views read from it.

Every event has `t` (unix seconds) and `kind`. The kinds that this package reads itself:

    start    ranks            work begins at step 1: the first time, or again when no checkpoint was left
    resume   step ranks       work goes on after `step`; later steps in the log belong to a life that was lost
    memory   text …           what layers keep and how many tokens are computed at once; step: in which memory ran out
    step     slot step loss … one optimiser step of one slot
    gpu      gpu …            the load of one GPU over the last seconds
    validation slot step …    one validation of one slot
    checkpoint step           a checkpoint was published
    proof    verdict …        the fast path was held against plain torch
    warning  code text        something a user should know
    stopped  step             asked to stop, saved: resume it
    failed   code text        ended with an error
    finished                  all done

A line that is torn (a killed writer, a full disk) is passed over by every reader. Non-finite numbers are written as the
strings `nan`, `inf` and `-inf`, because JSON has none. This module does not know what the figures mean.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias

from tenon.runs.space import disk_full, is_full

Scalar: TypeAlias = str | int | float | bool | None
Event: TypeAlias = dict[str, Scalar]


class EventSink(Protocol):
    """Something that is told every event: a tracker, a live view."""

    def emit(self, event: Event) -> None:
        """Take one event; called in order, from one thread."""
        ...

    def close(self) -> None:
        """No event follows; finish what is buffered."""
        ...


class EventLog:
    """Writes events.jsonl of one run; for the one process that holds the run's lock. Any of its threads may emit.

    clock: gives unix seconds.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock
        self._handle: int | None = None
        # Reentrant: a signal may end an emit half way, and its handler may emit.
        self._lock = threading.RLock()

    def emit(self, kind: str, **fields: Scalar) -> Event:
        """Append one event and return it. Raises RunError run-disk-full."""
        with self._lock:
            event: Event = {"t": round(self._clock(), 6), "kind": kind, **fields}
            finite = {key: _finite(value) for key, value in event.items()}
            self._append(json.dumps(finite, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        return event

    def sync(self) -> None:
        """Return when everything that was emitted would survive a power cut."""
        with self._lock:
            if self._handle is not None:
                os.fsync(self._handle)

    def close(self) -> None:
        """Close the file; a later emit opens it again."""
        with self._lock:
            if self._handle is not None:
                os.close(self._handle)
                self._handle = None

    def read(self) -> Iterator[Event]:
        """All events so far, oldest first."""
        return read_events(self.path)

    def _append(self, line: bytes) -> None:
        if self._handle is None:
            self._handle = os.open(self.path, os.O_CREAT | os.O_APPEND | os.O_RDWR, 0o644)
            line = _newline_if_torn(self._handle) + line
        try:
            written = os.write(self._handle, line)
            while written < len(line):
                written += os.write(self._handle, line[written:])
        except OSError as error:
            self.close()  # so that the next emit looks for a torn line
            if is_full(error):
                raise disk_full(self.path, len(line), "the event log", error) from error
            raise


class Broadcast:
    """Emits into the log of a run and to sinks. A sink that fails is reported once and dropped; training goes on."""

    def __init__(self, log: EventLog, sinks: Sequence[EventSink] = ()) -> None:
        self.log = log
        self._sinks = list(sinks)

    def emit(self, kind: str, **fields: Scalar) -> Event:
        """Append one event to the log, then tell every sink. Raises what the log raises, and nothing of a sink."""
        event = self.log.emit(kind, **fields)
        for sink in tuple(self._sinks):
            self._guard(sink, lambda sink=sink: sink.emit(event))
        return event

    def close(self) -> None:
        """Close every sink, then the log."""
        for sink in tuple(self._sinks):
            self._guard(sink, sink.close)
        self._sinks.clear()
        self.log.close()

    def _guard(self, sink: EventSink, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - a tracker may raise anything of its own, and must never stop a run
            self._sinks.remove(sink)
            text = f"{type(sink).__name__} failed and gets no more events: {type(error).__name__}: {error}"
            self.log.emit("warning", code="run-tracker-failed", text=text[:500])


def read_events(path: Path) -> Iterator[Event]:
    """All events of a log, oldest first; none when there is no file. Torn lines are passed over."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            event = _parse(line)
            if event is not None:
                yield event


def follow_events(path: Path, *, stop: Callable[[], bool], poll_seconds: float = 0.2) -> Iterator[Event]:
    """All events so far and then each new one as it comes, until `stop()` is true and everything was read.

    The file may not exist yet. A line that is being written is waited for.
    """
    offset = 0
    while True:
        last_round = stop()  # asked before reading, so that nothing written before it became true is missed
        lines, offset = _whole_lines(path, offset)
        for line in lines:
            event = _parse(line)
            if event is not None:
                yield event
        if last_round:
            return
        if not lines:
            time.sleep(poll_seconds)


def curve(path: Path, slot: str, *, kind: str = "step") -> list[Event]:
    """The `kind` events of one slot, one a step, in order of steps: what the run that never stopped would have logged.

    A step that was done twice counts as it was done last; steps after the one that a run resumed from are forgotten.
    """
    by_step: dict[int, Event] = {}
    for event in read_events(path):
        if event["kind"] == "start":
            by_step.clear()
        step = event.get("step")
        if not isinstance(step, int):
            continue
        if event["kind"] == "resume":
            by_step = {done: kept for done, kept in by_step.items() if done <= step}
        elif event["kind"] == kind and event.get("slot") == slot:
            by_step[step] = event
    return [by_step[step] for step in sorted(by_step)]


def _whole_lines(path: Path, offset: int) -> tuple[list[bytes], int]:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return [], offset
    end = data.rfind(b"\n") + 1
    return data[:end].splitlines(), offset + end


def _parse(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    if not isinstance(event, dict) or not isinstance(event.get("kind"), str):
        return None
    return event


def _newline_if_torn(handle: int) -> bytes:
    """What must come before the next line: nothing, or a newline when a killed writer left half a line."""
    size = os.fstat(handle).st_size
    return b"\n" if size and os.pread(handle, 1, size - 1) != b"\n" else b""


def _finite(value: Scalar) -> Scalar:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
