"""Several engines behind one front: jobs come in through a queue, go to a process each, and their events come back.

    submit, cancel, stop      any thread      ->  a queue
    run                       one thread      waits for the queue and for all processes at once, and does what they say

A job waits here until an engine has room for it: the wait says whether engines are too few. When an engine is lost, its
jobs go to others, and go on where they were (`flight`). This module knows no text, no HTTP and no tensors.
"""

from __future__ import annotations

import itertools
import math
import os
import queue
import select
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tenon.errors import StopRequestedError, TenonError
from tenon.infer.requests import Completion
from tenon.serve.jobs import (
    Cancel,
    Deliver,
    Ended,
    Event,
    Failed,
    Job,
    Limits,
    Load,
    Mailbox,
    Unload,
    nearest,
    sum_traffic,
)
from tenon.serve.pool.fleet import Fleet
from tenon.serve.pool.flight import Flight, suspects
from tenon.serve.pool.job_lines import Pass, cancel_line, job_line, unload_line
from tenon.serve.pool.replica import Patience, Replica, StartEngine, State
from tenon.serve.pool.routing import choose, home_key
from tenon.serve.pool.scaling import Scaler, ScaleRule

# So often it is looked whether somebody is silent or may go.
_LOOK_SECONDS = 0.1
# Sequences that an engine is given beyond those that it can run: enough to fetch adapters ahead.
_AHEAD = 3


@dataclass(frozen=True, slots=True)
class PoolOptions:
    """limits: of one engine. scale: how many engines. patience: with each."""

    limits: Limits
    scale: ScaleRule
    patience: Patience = field(default_factory=Patience)


@dataclass(frozen=True, slots=True)
class ReplicaFacts:
    """One engine for the metrics. sequences: that it has."""

    number: int
    state: str
    sequences: int
    load: Load


@dataclass(frozen=True, slots=True)
class PoolFacts:
    """The pool for the metrics. delay_seconds: the longest that a sequence waits, or has just waited, for its place.

    retries: sequences that went on elsewhere, and restarts: engines that were lost, since the start.
    """

    replicas: tuple[ReplicaFacts, ...] = ()
    states: tuple[tuple[str, int], ...] = ()
    delay_seconds: float = 0.0
    retries: int = 0
    restarts: int = 0


_Word = Job | Cancel | Unload | Literal["stop", "roll"]


class EnginePool:
    """Engines in processes of their own. All but `start` and `run` may be called from any thread."""

    def __init__(
        self, start: StartEngine, *, options: PoolOptions, deliver: Deliver, say: Callable[[dict[str, Any]], None]
    ) -> None:
        """start: starts an engine's process. say: gets events for the user: warnings, phases of a start."""
        rule, one = options.scale, options.limits
        self.limits = replace(one, rows=one.rows * rule.most)
        self._one, self._scaler, self._patience = one, Scaler(rule), options.patience
        self._fleet = Fleet(start, most=rule.most, count=rule.least, patience=options.patience, say=say)
        self._deliver, self._say = deliver, say
        self._inbox: queue.SimpleQueue[_Word] = queue.SimpleQueue()
        self._waiting: deque[Flight] = deque()
        self._flights: dict[Job, Flight] = {}
        self._aboard: dict[Replica, dict[int, Flight]] = {}
        self._numbers = itertools.count()
        self._letters: list[tuple[Mailbox, Event]] = []
        self._stopped = False
        self._retries, self._delay = 0, 0.0
        self._bell, self._ring = os.pipe()
        for end in (self._bell, self._ring):
            os.set_blocking(end, False)
        self.load = Load(able=False)
        self.facts = PoolFacts()
        self.resident: frozenset[str] = frozenset()
        self.loads = 0

    # ---- what may be asked from any thread ------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Have a sequence made; its mailbox gets the events."""
        self._put(job)

    def cancel(self, job: Job) -> None:
        """End a job as soon as can be. Harmless when it has ended."""
        self._put(Cancel(job))

    def unload(self, key: str) -> None:
        """Have every engine let an adapter go once nobody needs it there."""
        self._put(Unload(key))

    def stop(self) -> None:
        """Let `run` return soon; what runs then is failed."""
        self._put("stop")

    def roll(self) -> None:
        """Replace every engine by a new one, one after the other, without losing a sequence."""
        self._put("roll")

    def _put(self, word: _Word) -> None:
        self._inbox.put(word)
        with suppress(BlockingIOError):  # it rings already
            os.write(self._ring, b"!")

    # ---- from start to end ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the engines, and wait until all are ready. Raises what the first one says that cannot start."""
        try:
            while len(self._fleet.ready) < self._fleet.count:
                now = self._wait()
                for heard in self._fleet.hear(now):
                    if heard.lost is not None:
                        raise heard.lost
                self._fleet.move(now, self._sequences)
        except BaseException:
            self._fleet.close()
            raise

    def run(self) -> None:
        """Work until `stop`. Raises an engine's error when none can be started any more; every job is told of an end
        in any case.
        """
        try:
            while not self._stopped:
                now = self._wait()
                self._obey(now)
                self._listen(now)
                self._fleet.move(now, self._sequences)
                self._send_off_late(now)
                self._board(now)
                self._scale(now)
                self._hand_over()
        finally:
            self._fail_all()
            self._hand_over()
            self._fleet.close()

    def _wait(self) -> float:
        """Wait until somebody says something, or it is time to look; the time then."""
        waiting = select.poll()  # a new one each time: descriptors of processes that went may be those of others now
        waiting.register(self._bell, select.POLLIN)
        for replica in self._fleet.replicas:
            if not replica.pipe.ended:
                waiting.register(replica.pipe.reading, select.POLLIN)
            if replica.pipe.pending:
                waiting.register(replica.pipe.writing, select.POLLOUT)
        found = {fd for fd, _ in waiting.poll(_LOOK_SECONDS * 1000)}
        if self._bell in found:
            os.read(self._bell, 65536)
        for replica in self._fleet.replicas:
            replica.pipe.flush()
        return time.monotonic()

    # ---- what comes in ------------------------------------------------------------------------------------------

    def _obey(self, now: float) -> None:
        while not self._inbox.empty():
            word = self._inbox.get()
            if isinstance(word, Job):
                self._flights[word] = flight = Flight(word, now)
                self._waiting.append(flight)
            elif isinstance(word, Cancel):
                self._cancel(word.job)
            elif isinstance(word, Unload):
                for replica in self._fleet.ready:
                    replica.pipe.send(unload_line(word.key))
            elif word == "roll":
                self._fleet.roll()
            else:
                self._stopped = True

    def _cancel(self, job: Job) -> None:
        flight = self._flights.get(job)
        if flight is None:
            return
        if flight.replica is None:
            self._waiting.remove(flight)
            self._end(flight, Ended(flight.complete(Completion((), (), "cancelled"))))
        else:
            flight.cancelled = True
            flight.replica.pipe.send(cancel_line(flight.number))

    def _board(self, now: float) -> None:
        """Send those who wait to engines that have room."""
        most = self._one.rows * (1 + _AHEAD)
        while self._waiting:
            loads = {replica.number: self._sequences(replica) for replica in self._fleet.ready}
            room = {number: load for number, load in loads.items() if load < most}
            if not room:
                return
            flight = self._waiting.popleft()
            chosen = choose(home_key(flight.job), room)
            replica = next(replica for replica in self._fleet.ready if replica.number == chosen)
            number = next(self._numbers)
            request = flight.board(number, replica, now)
            self._aboard.setdefault(replica, {})[number] = flight
            replica.pipe.send(job_line(number, request, flight.job.adapter))

    def _sequences(self, replica: Replica) -> int:
        return len(self._aboard.get(replica, ()))

    # ---- what is heard ------------------------------------------------------------------------------------------

    def _listen(self, now: float) -> None:
        self._delay = max((now - flight.since for flight in self._flights.values() if not flight.began), default=0.0)
        before = len(self._fleet.ready)
        for heard in self._fleet.hear(now):
            aboard = self._aboard.get(heard.replica, {})
            for told in heard.passes:
                self._take(told, aboard, now)
            if heard.lost is not None:
                why = heard.lost
                got = f" ({why.got})" if why.got else ""
                text = f"engine {heard.replica.number} is lost: {why.what}{got}; {why.hint}"
                self._say({"kind": "warning", "code": why.code, "text": text})
                self._lose(list(self._aboard.pop(heard.replica, {}).values()), why)
            elif heard.replica.state == State.LOST:
                self._aboard.pop(heard.replica, None)
        if len(self._fleet.ready) > before:
            self._level()

    def _take(self, told: Pass, aboard: dict[int, Flight], now: float) -> None:
        """What one pass of an engine came to. Numbers that are not aboard are of jobs that went elsewhere."""
        for number in told.began:
            if number in aboard:
                flight = aboard[number]
                if not flight.began:
                    self._delay = max(self._delay, now - flight.since)
                flight.began = flight.placed = True
        for number, token in told.said:
            flight = aboard.get(number)
            if flight is None:
                continue
            try:
                if flight.hear(token) is not None:
                    self._letters.append((flight.job.mailbox, token))
            except TenonError as error:
                assert flight.replica is not None
                flight.replica.pipe.send(cancel_line(number))
                self._land(aboard, number, Failed(error))
        for number, ended in told.ended:
            if number in aboard:
                self._land(aboard, number, aboard[number].end(ended))
        for number, error in told.failed:
            if number in aboard:
                self._land(aboard, number, Failed(error))

    def _land(self, aboard: dict[int, Flight], number: int, event: Ended | Failed) -> None:
        self._end(aboard.pop(number), event)

    def _end(self, flight: Flight, event: Ended | Failed) -> None:
        del self._flights[flight.job]
        self._letters.append((flight.job.mailbox, event))

    # ---- when engines go ------------------------------------------------------------------------------------------

    def _lose(self, flights: list[Flight], why: TenonError) -> None:
        """The engine of these is lost: they go on elsewhere, before all who wait, unless they are what did it."""
        blamed = suspects(flights)
        again: list[Flight] = []
        for flight in flights:
            fatal = flight.strike(why, suspect=flight in blamed)
            if fatal is not None:
                self._say({"kind": "warning", "code": fatal.code, "text": f"{flight.describe()}: {fatal.what}"})
                self._end(flight, Failed(fatal))
            else:
                again.append(flight)
        self._reboard(again)

    def _reboard(self, flights: list[Flight]) -> None:
        for flight in sorted(flights, key=lambda flight: flight.since, reverse=True):
            over = flight.over()
            if over is None:
                self._retries += flight.placed
                flight.leave()
                self._waiting.appendleft(flight)
            else:
                self._end(flight, Ended(over))

    def _level(self) -> None:
        """An engine is new: what others have not begun of more than their share waits here for it."""
        ready = self._fleet.ready
        mean = math.ceil(sum(map(self._sequences, ready)) / len(ready))
        going: list[Flight] = []
        for replica in ready:
            idle = [flight for flight in self._aboard.get(replica, {}).values() if not flight.placed]
            going += idle[len(idle) - max(min(self._sequences(replica) - mean, len(idle)), 0) :]
        self._take_back(going)

    def _take_back(self, flights: list[Flight]) -> None:
        for flight in flights:
            assert flight.replica is not None
            del self._aboard[flight.replica][flight.number]
            flight.replica.pipe.send(cancel_line(flight.number))
        self._reboard(flights)

    def _send_off_late(self, now: float) -> None:
        """What an engine that is to go has not finished in time goes on elsewhere; what it has not begun, at once."""
        for replica in self._fleet.replicas:
            aboard = self._aboard.get(replica, {})
            if replica.state != State.DRAINING or not aboard:
                continue
            late = now - replica.state_since > self._patience.drain_seconds
            self._take_back([flight for flight in aboard.values() if late or not flight.placed])

    def _scale(self, now: float) -> None:
        ready = self._fleet.ready
        places = self._one.rows * max(len(ready), 1)
        wanted = self._scaler.decide(
            now,
            delay_seconds=self._delay,
            engines=self._fleet.count,
            settled=self._fleet.settled,
            share=len(self._flights) / places,
        )
        if wanted != self._fleet.count:
            more = wanted > self._fleet.count
            text = f"{wanted} engines from now on: " + ("sequences wait too long" if more else "one can go unmissed")
            self._say({"kind": "scale", "engines": wanted, "text": text})
            self._fleet.want(wanted)

    # ---- what goes out --------------------------------------------------------------------------------------------

    def _hand_over(self) -> None:
        replicas, ready = self._fleet.replicas, self._fleet.ready
        loads = [replica.load for replica in replicas]
        running, parked = sum(load.running for load in loads), sum(load.parked for load in loads)
        self.load = Load(
            running=running,
            waiting=max(len(self._flights) - running - parked, 0),
            parked=parked,
            cache_used=sum(replica.load.cache_used for replica in ready) / max(len(ready), 1),
            prefix_hit_tokens=sum(load.prefix_hit_tokens for load in loads),
            preemptions=sum(load.preemptions for load in loads),
            able=bool(ready),
            adapters=sum_traffic([load.adapters for load in loads]),
            states=nearest([load.states for load in loads]),
        )
        self.resident = frozenset().union(*(replica.resident for replica in replicas))
        self.loads = sum(replica.loads for replica in replicas)
        self.facts = PoolFacts(
            replicas=tuple(ReplicaFacts(r.number, r.state.value, self._sequences(r), r.load) for r in replicas),
            states=tuple(self._fleet.states().items()),
            delay_seconds=self._delay,
            retries=self._retries,
            restarts=self._fleet.restarts,
        )
        if self._letters:
            letters, self._letters = self._letters, []
            self._deliver(letters)

    def _fail_all(self) -> None:
        """Tell every job that nothing more will come."""
        error = StopRequestedError("run-stopped", "the server has stopped", hint="ask again in a moment")
        while not self._inbox.empty():
            word = self._inbox.get()
            if isinstance(word, Job):
                self._flights[word] = Flight(word, 0.0)
        self._letters += [(job.mailbox, Failed(error)) for job in self._flights]
        self._flights.clear()
        self._waiting.clear()
        self._aboard.clear()
