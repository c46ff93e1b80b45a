"""An engine that computes nothing and needs no torch: the seam on which pools of engines are tried out.

Its answers are a function of prompt, adapter, seed and position, as real ones are, and go on after what is answered
already. What it does besides follows from a prompt's first token: FATAL kills the process, as a driver's crash would;
HANGING makes it silent for good.
"""

from __future__ import annotations

import os
import queue
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tenon.infer.requests import Completion, Request, Token
from tenon.serve.jobs import AdapterRef, Deliver, Ended, Event, Job, Limits, Load, Mailbox

FATAL, HANGING = 666, 667
_VOCABULARY = 251


def fake_token(request: Request, adapter: AdapterRef | None, position: int) -> int:
    """What it answers at a position of the sequence."""
    own = 0 if adapter is None else sum(map(ord, adapter.key))
    return (sum(request.prompt_ids) * 31 + own * 17 + request.seed * 7 + position * position) % _VOCABULARY


def fake_answer(request: Request, adapter: AdapterRef | None = None) -> list[int]:
    """All that it answers."""
    first = len(request.prompt_ids)
    return [fake_token(request, adapter, first + n) for n in range(request.max_new_tokens)]


@dataclass(slots=True)
class _Row:
    job: Job
    said: list[tuple[int, float]] = field(default_factory=list)


class FakeEngine:
    """Makes a token of every row each `pass_seconds`."""

    def __init__(
        self, *, limits: Limits, deliver: Deliver, on_start: Callable[[Job], None], on_turn: Callable[[], None],
        pass_seconds: float,
    ) -> None:  # fmt: skip
        self.limits, self.load, self.loads = limits, Load(), 0
        self.resident: frozenset[str] = frozenset()
        self._deliver, self._on_start, self._on_turn, self._pass_seconds = deliver, on_start, on_turn, pass_seconds
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: list[Job] = []
        self._rows: list[_Row] = []
        self._stopped = False

    def submit(self, job: Job) -> None:
        """Have a sequence made."""
        self._inbox.put(lambda: self._waiting.append(job))

    def cancel(self, job: Job) -> None:
        """End a job."""
        self._inbox.put(lambda: self._cancel(job))

    def unload(self, key: str) -> None:
        """Forget an adapter."""
        self._inbox.put(lambda: self._forget(key))

    def wake(self) -> None:
        """Have a turn made."""
        self._inbox.put(lambda: None)

    def stop(self) -> None:
        """Let `run` return."""
        self._inbox.put(self._stop)

    def run(self) -> None:
        """Work until `stop`."""
        while not self._stopped:
            if not self._rows and not self._waiting:
                self._inbox.get()()
            while not self._stopped and not self._inbox.empty():
                self._inbox.get()()
            self._begin()
            letters = [letter for row in list(self._rows) for letter in self._advance(row)]
            self.load = Load(running=len(self._rows), waiting=len(self._waiting))
            self._deliver(letters)
            self._on_turn()
            if self._rows:
                time.sleep(self._pass_seconds)

    def _stop(self) -> None:
        self._stopped = True

    def _forget(self, key: str) -> None:
        self.resident -= {key}

    def _begin(self) -> None:
        while self._waiting and len(self._rows) < self.limits.rows:
            job = self._waiting.pop(0)
            if job.request.prompt_ids[0] == FATAL:
                os.kill(os.getpid(), signal.SIGKILL)
            if job.request.prompt_ids[0] == HANGING:
                time.sleep(3600)
            if job.adapter is not None and job.adapter.key not in self.resident:
                self.resident, self.loads = self.resident | {job.adapter.key}, self.loads + 1
            self._rows.append(_Row(job, list(job.request.answered)))
            self._on_start(job)

    def _advance(self, row: _Row) -> list[tuple[Mailbox, Event]]:
        request, box = row.job.request, row.job.mailbox
        token = Token(fake_token(request, row.job.adapter, len(request.prompt_ids) + len(row.said)), -0.5)
        row.said.append((token.id, token.logprob))
        letters: list[tuple[Mailbox, Event]] = [(box, token)]
        if len(row.said) >= request.max_new_tokens:
            self._rows.remove(row)
            letters.append((box, Ended(_completion(row, "length"))))
        return letters

    def _cancel(self, job: Job) -> None:
        self._waiting = [waiting for waiting in self._waiting if waiting is not job]
        for row in [row for row in self._rows if row.job is job]:
            self._rows.remove(row)
            self._deliver([(job.mailbox, Ended(_completion(row, "cancelled")))])


def _completion(row: _Row, finish: str) -> Completion:
    ids, logprobs = zip(*row.said, strict=True) if row.said else ((), ())
    return Completion(tuple(ids), tuple(logprobs), "length" if finish == "length" else "cancelled")
