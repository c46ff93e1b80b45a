"""The one thread that owns decoder, bank and engine: jobs come in through a queue, tokens go out after every pass.

    submit, cancel, stop      any thread      ->  a queue
    run                       the owner       obeys the queue, gives jobs their slots, makes a pass, delivers

A job waits here until its adapter has a slot and the engine a place; others pass it by, as far as `turns` lets them.
This module knows no text and no HTTP.
"""

from __future__ import annotations

import itertools
import queue
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from tenon.adapters.bank import AdapterBank
from tenon.errors import StopRequestedError, TenonError
from tenon.infer.engine import Engine
from tenon.infer.guides import Guides
from tenon.infer.pass_graphs import PassGraphs
from tenon.infer.requests import Completion, Token
from tenon.models.cache import KvCache
from tenon.models.decoder import Decoder
from tenon.serve.compiling import Compiling
from tenon.serve.jobs import Deliver, Ended, Event, Failed, Job, Limits, Load, Mailbox
from tenon.serve.residency import Bounds, ReadFiles, Residency
from tenon.serve.waiting import WaitingJobs

# How long to sleep while nothing can be computed and a slot is on its way, which tells nobody that it is there.
_ARRIVAL_SECONDS = 0.001


@dataclass(frozen=True, slots=True)
class _Cancel:
    job: Job


@dataclass(slots=True)
class _Waits:
    """How long sequences waited for a slot, those that had to."""

    count: int = 0
    seconds: float = 0.0
    most_seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """One sequence more."""
        if seconds > 0.0:
            self.count, self.seconds = self.count + 1, self.seconds + seconds
            self.most_seconds = max(self.most_seconds, seconds)


class EngineLoop:
    """An `Engines` of one engine, in this process."""

    def __init__(
        self,
        decoder: Decoder,
        bank: AdapterBank,
        *,
        limits: Limits,
        read: ReadFiles,
        deliver: Deliver,
        guides: Guides[Any] | None = None,
        on_start: Callable[[Job], None] | None = None,
        on_turn: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """guides: for requests with a grammar; None where there are none. on_start: told when a job has got its place,
        and again when it had given it back. on_turn: called after every pass, and after every `wake`. Both by the
        thread that runs.
        """
        self.limits = limits
        cache = KvCache(
            decoder.facts,
            places=limits.rows,
            tokens=limits.context_tokens,
            dtype=decoder.dtype,
            device=decoder.device,
            budget_bytes=limits.cache_bytes,
        )
        self._engine = Engine(
            decoder,
            bank,
            cache=cache,
            pass_tokens=limits.pass_tokens,
            on_start=None if on_start is None else lambda index: on_start(self._running[index]),
            on_token=self._on_token,
            on_finish=self._on_finish,
            on_failure=self._on_failure,
            keep_prefixes=True,
            guides=guides,
            graphs=_record(decoder, bank, cache, limits),
        )
        self._inbox: queue.SimpleQueue[Job | _Cancel | Literal["wake", "stop"]] = queue.SimpleQueue()
        bounds = Bounds(limits.slots, limits.adapter_bytes, limits.adapter_wait_seconds)
        self._residency = Residency(
            bank, bounds=bounds, read=read, on_read=lambda: self._inbox.put("wake"), clock=clock
        )
        self._compiling = Compiling(guides, on_done=lambda: self._inbox.put("wake"))
        self._deliver, self._on_turn = deliver, on_turn
        self._unprepared: list[Job] = []  # their grammars are being compiled
        self._waiting = WaitingJobs(clock)
        self._waits = _Waits()
        self._running: dict[int, Job] = {}
        self._numbers = itertools.count()
        self._letters: list[tuple[Mailbox, Event]] = []
        self._stopped = False
        # Nothing ran when it was last looked for something to do, and nothing was found.
        self._rests = False
        self.load = Load()

    @property
    def resident(self) -> frozenset[str]:
        """Keys of the adapters in the bank."""
        return self._residency.resident

    @property
    def loads(self) -> int:
        """How often an adapter was put into the bank."""
        return self.load.adapters.loads

    def submit(self, job: Job) -> None:
        """Have a sequence made; its mailbox gets the events."""
        self._inbox.put(job)

    def cancel(self, job: Job) -> None:
        """End a job before the next pass: its place in the cache is free then. Harmless when it has ended."""
        self._inbox.put(_Cancel(job))

    def wake(self) -> None:
        """Have a turn made, also when there is nothing to do: whoever hears of it knows that the engine is well."""
        self._inbox.put("wake")

    def stop(self) -> None:
        """Let `run` return before its next pass; what runs then is failed."""
        self._inbox.put("stop")

    def run(self) -> None:
        """Work until `stop`. Raises what the decoder raises; every job is told of an end in any case."""
        try:
            while not self._stopped:
                self._obey()
                idle = not self._engine.busy
                self._prepare()
                self._arrange()
                self._let_in()
                self._rests = idle and not self._engine.busy
                self._engine.step()
                self._hand_over()
        finally:
            self._fail_all()
            self._hand_over()
            self._residency.close()
            self._compiling.close()

    # ---- what comes in ------------------------------------------------------------------------------------------

    def _obey(self) -> None:
        """Take in everything that waits in the queue; wait for something when there is nothing else to do."""
        if self._rests:
            with suppress(queue.Empty):
                self._take_in(self._inbox.get(timeout=_ARRIVAL_SECONDS if self._residency.arriving else None))
        while not self._stopped and not self._inbox.empty():
            self._take_in(self._inbox.get())

    def _take_in(self, word: Job | _Cancel | Literal["wake", "stop"]) -> None:
        if isinstance(word, Job):
            self._unprepared.append(word)
        elif isinstance(word, _Cancel):
            self._end(word.job)
        elif word == "stop":
            self._stopped = True

    def _end(self, job: Job) -> None:
        unprepared = job in self._unprepared
        if unprepared:
            self._unprepared.remove(job)
        if unprepared or self._waiting.discard(job):
            self._letters.append((job.mailbox, Ended(Completion((), (), "cancelled"))))
        for number in [number for number, running in self._running.items() if running is job]:
            self._engine.cancel(number)

    def _prepare(self) -> None:
        """Let those wait for their turn whose grammar has been compiled."""
        still: list[Job] = []
        for job in self._unprepared:
            try:
                ready = self._compiling.ready(job.request.grammar)
            except TenonError as error:
                self._letters.append((job.mailbox, Failed(error)))
                continue
            if ready:
                self._wait_for_turn(job)
            else:
                still.append(job)
        self._unprepared = still
        self._compiling.forget_others({job.request.grammar for job in still})

    def _wait_for_turn(self, job: Job) -> None:
        self._waiting.add(job)
        if job.adapter is not None:
            self._residency.count(job.adapter.key)

    def _arrange(self) -> None:
        """Bring the adapters that are waited for nearer, and tell those whose adapter is refused."""
        for key, error in self._residency.arrange(self._waiting.needs(), self._waiting.next_number).items():
            self._letters += [(job.mailbox, Failed(error)) for job in self._waiting.take_all(key)]

    def _let_in(self) -> None:
        """Let go to the engine, in the order of arrival, as many as it has places for, of those whose adapter has a
        slot for them or who need none.
        """
        while self._engine.running + self._engine.waiting < self.limits.rows:
            waiter = self._waiting.take(self._admits)
            if waiter is None:
                return
            job, slot, owner = waiter.job, waiter.job.request.slot, None
            if job.adapter is not None:
                self._waits.add(self._residency.waited_seconds(job.adapter.key, waiter.since))
                slot = self._residency.take(job.adapter.key)
                # What is remembered of a prompt belongs to the adapter: its slot may be another one's tomorrow.
                owner = job.adapter.key
            number = next(self._numbers)
            self._running[number] = job
            self._engine.submit(number, replace(job.request, slot=slot, adapter_key=owner))

    def _admits(self, key: str | None, number: int) -> bool:
        return key is None or self._residency.admits(key, number)

    # ---- what goes out ------------------------------------------------------------------------------------------

    def _on_token(self, index: int, token: Token) -> None:
        self._letters.append((self._running[index].mailbox, token))

    def _on_finish(self, index: int, completion: Completion) -> None:
        self._engine.completions.pop(index)
        self._letters.append((self._finished(index).mailbox, Ended(completion)))

    def _on_failure(self, index: int, error: TenonError) -> None:
        self._letters.append((self._finished(index).mailbox, Failed(error)))

    def _finished(self, index: int) -> Job:
        job = self._running.pop(index)
        if job.adapter is not None:
            self._residency.release(job.adapter.key)
        return job

    def _hand_over(self) -> None:
        now = self._engine.stats()
        parked = self._waiting.count_unless(self._admits)
        self.load = Load(
            running=now.running,
            waiting=now.waiting + len(self._unprepared) + len(self._waiting) - parked,
            parked=parked,
            cache_used=now.blocks_used / now.blocks_total,
            prefix_hit_tokens=now.prefix_hit_tokens,
            preemptions=now.preemptions,
            adapters=replace(
                self._residency.traffic(),
                waited=self._waits.count,
                wait_seconds=self._waits.seconds,
                most_wait_seconds=self._waits.most_seconds,
            ),
            states=self._residency.states(),
        )
        if self._letters:
            letters, self._letters = self._letters, []
            self._deliver(letters)
        if self._on_turn is not None:
            self._on_turn()

    def _fail_all(self) -> None:
        """Tell every job that nothing more will come."""
        error = StopRequestedError("run-stopped", "the server has stopped", hint="ask again in a moment")
        while not self._inbox.empty():
            word = self._inbox.get()
            if isinstance(word, Job):
                self._unprepared.append(word)
        left = (*self._running.values(), *self._waiting.clear(), *self._unprepared)
        self._letters += [(job.mailbox, Failed(error)) for job in left]
        self._running.clear()
        self._unprepared.clear()


def _record(decoder: Decoder, bank: AdapterBank, cache: KvCache, limits: Limits) -> PassGraphs | None:
    """Recorded passes, all of them now: the first requests are not to wait for it. None where there are none."""
    if not PassGraphs.can_record(decoder):
        return None
    bank.keep_room(limits.slots)
    graphs = PassGraphs(decoder, bank, cache, pass_tokens=limits.pass_tokens)
    graphs.record_all()
    return graphs
