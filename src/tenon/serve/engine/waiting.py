"""Sequences that wait to be let in, each adapter's in the order of arrival. This module does not know who is let in."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from tenon.serve.engine.turns import Need
from tenon.serve.jobs import Job


@dataclass(frozen=True, slots=True)
class Waiter:
    """number: of its arrival. since: when that was, in seconds."""

    job: Job
    number: int
    since: float


class WaitingJobs:
    """Queues by adapter; None is the bare base's. next_number: what the next arrival will have."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.next_number = 0
        self._queues: dict[str | None, deque[Waiter]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def add(self, job: Job) -> None:
        """Let a job wait, behind all others."""
        queue = self._queues.setdefault(key_of(job), deque())
        queue.append(Waiter(job, self.next_number, self._clock()))
        self.next_number += 1

    def discard(self, job: Job) -> bool:
        """Forget a job; whether it was there."""
        found = next((waiter for waiter in self._queues.get(key_of(job), ()) if waiter.job is job), None)
        if found is not None:
            self._queues[key_of(job)].remove(found)
            self._tidy(key_of(job))
        return found is not None

    def needs(self) -> list[Need]:
        """The adapters that are waited for, in the order of their oldest sequences."""
        heads = [queue[0] for key, queue in self._queues.items() if key is not None]
        heads.sort(key=lambda waiter: waiter.number)
        return [Need(w.job.adapter, w.number, w.since) for w in heads if w.job.adapter is not None]

    def take(self, admits: Callable[[str | None, int], bool]) -> Waiter | None:
        """The oldest sequence whose adapter and number are admitted; None when there is none."""
        heads = [(queue[0].number, key) for key, queue in self._queues.items() if admits(key, queue[0].number)]
        if not heads:
            return None
        key = min(heads)[1]
        found = self._queues[key].popleft()
        self._tidy(key)
        return found

    def take_all(self, key: str) -> list[Job]:
        """Every job of an adapter."""
        return [waiter.job for waiter in self._queues.pop(key, ())]

    def clear(self) -> list[Job]:
        """Every job there is."""
        found = [waiter.job for queue in self._queues.values() for waiter in queue]
        self._queues.clear()
        return found

    def count_unless(self, admits: Callable[[str | None, int], bool]) -> int:
        """How many wait behind an oldest one that is not admitted."""
        return sum(len(queue) for key, queue in self._queues.items() if not admits(key, queue[0].number))

    def _tidy(self, key: str | None) -> None:
        if not self._queues[key]:
            del self._queues[key]


def key_of(job: Job) -> str | None:
    """The adapter that a job belongs to; None is the bare base."""
    return None if job.adapter is None else job.adapter.key
