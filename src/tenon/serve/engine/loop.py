"""The one thread that owns decoder, bank and engine: jobs come in through a queue, tokens go out after every pass.

    submit, cancel, stop, …   any thread      ->  a queue
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

import torch

from tenon.adapters.bank import AdapterBank
from tenon.errors import AdapterError, StopRequestedError, TenonError
from tenon.infer.engine import Engine
from tenon.infer.guides import Guides
from tenon.infer.pass_graphs import PassGraphs
from tenon.infer.requests import Completion, Token
from tenon.models.cache import KvCache
from tenon.models.decoder import Decoder
from tenon.plan.values import Precision
from tenon.registry.probes import Probes
from tenon.serve.engine.compiling import Compiling
from tenon.serve.engine.parity import Check, Computing, require_vocabulary
from tenon.serve.engine.residency import Bounds, ReadFiles, ReadProbes, Residency
from tenon.serve.engine.waiting import WaitingJobs
from tenon.serve.jobs import (
    AdapterRef,
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
    Waits,
)

# How long to sleep while nothing can be computed and a slot is on its way, which tells nobody that it is there.
_ARRIVAL_SECONDS = 0.001
_PRECISIONS: dict[torch.dtype, Precision] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


_Word = Job | Cancel | Unload | Literal["wake", "stop"]


@dataclass(slots=True)
class _Running:
    """A job that the engine has. since: when it came. place_seconds: how long it waited for its place, after its
    adapter; None while it has none.
    """

    job: Job
    since: float
    adapter_seconds: float
    place_seconds: float | None = None

    @property
    def waits(self) -> Waits | None:
        """What it waited for."""
        return None if self.place_seconds is None else Waits(self.adapter_seconds, self.place_seconds)


@dataclass(slots=True)
class _SlotWaits:
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
        read_probes: ReadProbes | None = None,
        deliver: Deliver,
        guides: Guides[Any] | None = None,
        on_start: Callable[[Job], None] | None = None,
        on_turn: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """read_probes: what adapters are asked before anybody else asks them; without it they are not. guides: for
        requests with a grammar; None where there are none. on_start: told when a job has got its place, and again when
        it had given it back. on_turn: called after every pass, and after every `wake`. Both by the thread that runs.
        """
        self.limits = limits
        self._engine = self._make_engine(decoder, bank, guides)
        self._inbox: queue.SimpleQueue[_Word] = queue.SimpleQueue()
        bounds = Bounds(limits.slots, limits.adapter_bytes, limits.adapter_wait_seconds)
        self._residency = Residency(
            bank,
            bounds=bounds,
            read=read,
            read_probes=None if read_probes is None else _within(decoder.facts.vocab, read_probes),
            on_read=lambda: self._inbox.put("wake"),
            clock=clock,
        )
        self._computing = Computing(decoder.kind, _PRECISIONS[decoder.dtype])
        self._checks: dict[int, Check] = {}
        self._compiling = Compiling(guides, on_done=lambda: self._inbox.put("wake"))
        self._deliver, self._on_turn, self._tell_start, self._clock = deliver, on_turn, on_start, clock
        self._unprepared: list[Job] = []  # their grammars are being compiled
        self._waiting = WaitingJobs(clock)
        self._waits = _SlotWaits()
        self._running: dict[int, _Running] = {}
        self._numbers = itertools.count()
        self._letters: list[tuple[Mailbox, Event]] = []
        self._stopped = False
        # Nothing ran when it was last looked for something to do, and nothing was found.
        self._rests = False
        self.load = Load()

    def _make_engine(self, decoder: Decoder, bank: AdapterBank, guides: Guides[Any] | None) -> Engine:
        limits = self.limits
        cache = KvCache(
            decoder.facts,
            places=limits.rows,
            tokens=limits.context_tokens,
            dtype=decoder.dtype,
            device=decoder.device,
            budget_bytes=limits.cache_bytes,
        )
        return Engine(
            decoder,
            bank,
            cache=cache,
            pass_tokens=limits.pass_tokens,
            on_start=self._on_start,
            on_token=self._on_token,
            on_finish=self._on_finish,
            on_failure=self._on_failure,
            keep_prefixes=True,
            guides=guides,
            graphs=_record(decoder, bank, cache, limits),
        )

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
        self._inbox.put(Cancel(job))

    def unload(self, key: str) -> None:
        """Let an adapter go once nobody needs it."""
        self._inbox.put(Unload(key))

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

    def _take_in(self, word: _Word) -> None:
        if isinstance(word, Job):
            self._unprepared.append(word)
        elif isinstance(word, Cancel):
            self._end(word.job)
        elif isinstance(word, Unload):
            self._residency.unload(word.key)
        elif word == "stop":
            self._stopped = True

    def _end(self, job: Job) -> None:
        unprepared = job in self._unprepared
        if unprepared:
            self._unprepared.remove(job)
        if unprepared or self._waiting.discard(job):
            self._letters.append((job.mailbox, Ended(Completion((), (), "cancelled"))))
        for number in [number for number, running in self._running.items() if running.job is job]:
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
        for found in self._residency.to_check():
            number = next(self._numbers)
            self._ask_probe(Check(found.adapter.key, found.adapter.label, found.slot, found.probes, number))

    def _ask_probe(self, check: Check) -> None:
        """Ask an adapter its next probe, before all who wait for a place; after the last one it is judged."""
        request = check.next_request()
        if request is None:
            self._residency.judge(check.key, check.verdict(self._computing))
            return
        number = next(self._numbers)
        self._checks[number] = check
        self._engine.submit(number, request)

    def _let_in(self) -> None:
        """Let go to the engine, in the order of arrival, as many as it has places for, of those whose adapter has a
        slot for them or who need none.
        """
        while self._engine.running + self._engine.waiting < self.limits.rows:
            waiter = self._waiting.take(self._admits)
            if waiter is None:
                return
            job, slot, owner, waited = waiter.job, waiter.job.request.slot, None, 0.0
            if job.adapter is not None:
                waited = self._residency.waited_seconds(job.adapter.key, waiter.since)
                self._waits.add(waited)
                slot = self._residency.take(job.adapter.key)
                # What is remembered of a prompt belongs to the adapter: its slot may be another one's tomorrow.
                owner = job.adapter.key
            number = next(self._numbers)
            self._running[number] = _Running(job, waiter.since, waited)
            self._engine.submit(number, replace(job.request, slot=slot, adapter_key=owner))

    def _admits(self, key: str | None, number: int) -> bool:
        return key is None or self._residency.admits(key, number)

    # ---- what goes out ------------------------------------------------------------------------------------------

    def _on_start(self, index: int) -> None:
        running = self._running.get(index)
        if running is None:  # a probe
            return
        if running.place_seconds is None:
            running.place_seconds = max(self._clock() - running.since - running.adapter_seconds, 0.0)
        if self._tell_start is not None:
            self._tell_start(running.job)

    def _on_token(self, index: int, token: Token) -> None:
        self._letters.append((self._running[index].job.mailbox, token))

    def _on_finish(self, index: int, completion: Completion) -> None:
        self._engine.completions.pop(index)
        check = self._checks.pop(index, None)
        if check is not None:
            check.hear(completion)
            self._ask_probe(check)
            return
        running = self._finished(index)
        self._letters.append((running.job.mailbox, Ended(completion, running.waits)))

    def _on_failure(self, index: int, error: TenonError) -> None:
        check = self._checks.pop(index, None)
        if check is None:
            self._letters.append((self._finished(index).job.mailbox, Failed(error)))
        else:
            assert isinstance(error, AdapterError), "what computes with a slot blames its adapter"
            self._residency.judge(check.key, error)

    def _finished(self, index: int) -> _Running:
        running = self._running.pop(index)
        if running.job.adapter is not None:
            self._residency.release(running.job.adapter.key)
        return running

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
        left = (*(running.job for running in self._running.values()), *self._waiting.clear(), *self._unprepared)
        self._letters += [(job.mailbox, Failed(error)) for job in left]
        self._running.clear()
        self._unprepared.clear()


def _within(vocabulary: int, read: ReadProbes) -> ReadProbes:
    """Probes with no token that the base does not have. Raises AdapterError adapter-parity."""

    def read_within(adapter: AdapterRef, /) -> Probes | None:
        probes = read(adapter)
        if probes is not None:
            require_vocabulary(probes, vocabulary, adapter.label)
        return probes

    return read_within


def _record(decoder: Decoder, bank: AdapterBank, cache: KvCache, limits: Limits) -> PassGraphs | None:
    """Recorded passes, all of them now: the first requests are not to wait for it. None where there are none."""
    if not PassGraphs.can_record(decoder):
        return None
    bank.keep_room(limits.slots)
    graphs = PassGraphs(decoder, bank, cache, pass_tokens=limits.pass_tokens)
    graphs.record_all()
    return graphs
