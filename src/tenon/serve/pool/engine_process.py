"""An engine as a process of its own: jobs come in as lines, every pass goes out as one, and so does a sign of life.

    lines   one thread   reads what is asked; their end is the end of the engine: nobody is left to answer
    loop    the caller   makes passes, and writes after each what it came to
    ticks   one thread   has the loop make a turn when it has nothing to do

A sign of life is written by the loop itself: an engine that hangs gives none. This module knows no HTTP and no text.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from tenon.serve.jobs import Engines, Event, Job, Mailbox
from tenon.serve.pool.job_lines import AskedCancel, AskedUnload, Pass, add_event, pass_fields, read_asked

# An idle engine tells so often that it is well.
BEAT_SECONDS = 0.5


class Engine(Engines, Protocol):
    """What runs in the process."""

    def wake(self) -> None:
        """Have a turn made, also when there is nothing to do."""
        ...


class Tell(Protocol):
    """Writes one event."""

    def __call__(self, kind: str, /, **fields: object) -> object: ...


@dataclass(frozen=True, slots=True)
class _Numbered:
    """The mailbox of a job: its number is all that an event needs."""

    number: int

    def put(self, event: Event) -> None:
        raise AssertionError(f"events go out together, not alone: {event}")


class EngineProcess:
    """The loop's surroundings: give `deliver`, `on_start` and `on_turn` to the engine, then `run` it."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._pass = Pass()
        self._told_at = 0.0
        self._resident: frozenset[str] = frozenset()
        self._jobs: dict[int, Job] = {}
        self._engine: Engine | None = None

    def deliver(self, letters: list[tuple[Mailbox, Event]], /) -> None:
        """Keep events until the turn's end."""
        for mailbox, event in letters:
            assert isinstance(mailbox, _Numbered)
            add_event(self._pass, mailbox.number, event)

    def on_start(self, job: Job) -> None:
        """A job has got its place."""
        assert isinstance(job.mailbox, _Numbered)
        self._pass.began.append(job.mailbox.number)

    def on_turn(self) -> None:
        """Write what the turn came to; when it came to nothing, now and then that it was made."""
        engine, told, now = self._engine, self._pass, time.monotonic()
        if engine is None:
            return
        news = told.began or told.said or told.ended or told.failed or engine.resident != self._resident
        if not news and now - self._told_at < BEAT_SECONDS / 2:
            return
        if engine.resident != self._resident:
            self._resident = told.resident = engine.resident
        told.load, told.loads = engine.load, engine.loads
        for number, _ in (*told.ended, *told.failed):
            self._jobs.pop(number, None)
        self._pass, self._told_at = Pass(), now
        self._tell("pass", **pass_fields(told))

    def run(self, engine: Engine, lines: Iterator[str]) -> None:
        """Work until the lines end. Raises what the engine raises."""
        self._engine = engine
        over = threading.Event()
        for name, work in (("lines", lambda: self._listen(engine, lines)), ("ticks", lambda: _tick(engine, over))):
            # Daemons: the one that reads cannot be told to stop, and neither has anything to finish.
            threading.Thread(target=work, name=name, daemon=True).start()
        try:
            engine.run()
        finally:
            over.set()
            self.on_turn()

    def _listen(self, engine: Engine, lines: Iterator[str]) -> None:
        try:
            for line in lines:
                asked = read_asked(line)
                if isinstance(asked, AskedCancel):
                    job = self._jobs.get(asked.number)
                    if job is not None:
                        engine.cancel(job)
                elif isinstance(asked, AskedUnload):
                    engine.unload(asked.key)
                else:
                    self._jobs[asked.number] = Job(asked.request, asked.adapter, _Numbered(asked.number))
                    engine.submit(self._jobs[asked.number])
        finally:
            engine.stop()


def _tick(engine: Engine, over: threading.Event) -> None:
    while not over.wait(BEAT_SECONDS):
        engine.wake()
