"""One engine process as the front sees it: its state, its lines, and when it was last heard of.

This module does not know what is done about a process that is lost, nor where jobs come from.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from tenon.errors import RunError, TenonError
from tenon.processes import Worker, revive_error
from tenon.serve.jobs import Load
from tenon.serve.pool.job_lines import Pass, read_pass
from tenon.serve.pool.line_pipe import LinePipe

# From the end of a process's output to its own end.
_PARTING_SECONDS = 2.0

# Starts the process of an engine, which has its first request already. The number says on which GPU, or part of a CPU.
StartEngine = Callable[[int], Worker]


class State(StrEnum):
    """starting: loads the base. ready: takes sequences. draining: finishes those that it has, and takes none.

    ending: has none any more and was told to go. lost: is gone, and will be started again.
    """

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    ENDING = "ending"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Patience:
    """silence_seconds: a ready engine that is not heard of for so long is lost, as is one that does not start within
    start_seconds. drain_seconds: what an engine that is to go may take to finish what it has; what is left then goes
    on elsewhere. backoff_seconds, most_backoff_seconds: before an engine that was lost is started again: doubled each
    time that it is lost before it was ready for well_seconds. starts: in a row that may fail while nothing is ready.
    """

    silence_seconds: float = 120.0
    start_seconds: float = 900.0
    drain_seconds: float = 30.0
    end_seconds: float = 5.0
    backoff_seconds: float = 1.0
    most_backoff_seconds: float = 60.0
    well_seconds: float = 60.0
    starts: int = 5


class Replica:
    """One process, from its start to its end. `number`: its place, which a successor takes over."""

    def __init__(self, number: int, worker: Worker, now: float) -> None:
        self.number, self.worker = number, worker
        self.state = State.STARTING
        self.started, self.heard, self.state_since = now, now, now
        self.load, self.loads = Load(), 0
        self.resident: frozenset[str] = frozenset()
        reading, writing = worker.pipes
        self.pipe = LinePipe(reading=reading, writing=writing)
        self._silent_since: float | None = None

    def become(self, state: State, now: float) -> None:
        """Change its state."""
        self.state, self.state_since = state, now

    def hear(self, now: float, say: Callable[[dict[str, Any]], None]) -> list[Pass]:
        """What it has told since. say: gets events that are neither passes nor its own affairs (phases, warnings)."""
        passes: list[Pass] = []
        for line in self.pipe.receive():
            self.heard = now
            event = json.loads(line)
            kind = event["kind"]
            if kind == "pass":
                passes.append(self._note(read_pass(event)))
            elif kind == "error":
                self.worker.error = self.worker.error or revive_error(event)
            elif kind == "ready" and self.state == State.STARTING:
                self.become(State.READY, now)
            else:
                say(event)
        return passes

    def overdue(self, now: float, patience: Patience) -> TenonError | None:
        """Why it is given up, where it has been silent for too long."""
        silent = now - self.heard
        starting = self.state == State.STARTING
        limit = patience.start_seconds if starting else patience.silence_seconds
        if (now - self.started if starting else silent) <= limit or self.state == State.ENDING:
            return None
        return RunError(
            "run-engine-silent",
            f"engine {self.number} {'did not start within' if starting else 'was not heard of for'} {limit:g} s",
            hint=f"it is started again; what it wrote is in {self.worker.log}",
        )

    def gone(self, now: float) -> bool:
        """Whether it has ended. Its output ends a moment before, and only the process's end says how it came to it."""
        if not self.pipe.ended:
            return False
        if self._silent_since is None:
            self._silent_since = now
        return not self.worker.running or now - self._silent_since > _PARTING_SECONDS

    def close(self) -> None:
        """No more is asked of it: it ends once what it computes at the moment is done."""
        self.worker.close_input()

    def fate(self) -> TenonError:
        """Why it has ended, though nobody asked it to."""
        why = self.worker.fate()
        if why.code != "run-worker-killed":
            return why
        hint = "if it was memory: fewer --replicas, less --cache, or fewer --slots"
        return RunError(why.code, "its process was killed (signal 9), most often because memory ran out", hint=hint)

    def bury(self) -> None:
        """End the process, if it has not ended, with everything that it started."""
        self.pipe.shut()
        self.worker.kill()
        self.worker.close_output()

    def _note(self, told: Pass) -> Pass:
        self.load, self.loads = told.load, told.loads
        if told.resident is not None:
            self.resident = told.resident
        return told
