"""The one thread that owns decoder, bank and engine: jobs come in through a queue, tokens go out after every pass.

    submit, cancel, stop      any thread      ->  a queue
    run                       the owner       obeys the queue, gives jobs their slots, makes a pass, delivers

A job whose adapter is not in the bank is parked until it is; others pass it by. This module knows no text and no HTTP.
"""

from __future__ import annotations

import itertools
import queue
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from tenon.adapters.bank import AdapterBank
from tenon.errors import AdapterError, StopRequestedError, TenonError
from tenon.infer.decode_graphs import DecodeGraphs
from tenon.infer.engine import Engine
from tenon.infer.guides import Guides
from tenon.infer.requests import Completion, Token
from tenon.models.cache import KvCache
from tenon.models.decoder import Decoder
from tenon.serve.compiling import Compiling
from tenon.serve.jobs import Deliver, Ended, Event, Failed, Job, Limits, Load, Mailbox
from tenon.serve.residency import ReadFiles, Residency


@dataclass(frozen=True, slots=True)
class _Cancel:
    job: Job


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
            graphs=_record(decoder, bank, cache, slots=limits.slots),
        )
        self._inbox: queue.SimpleQueue[Job | _Cancel | Literal["wake", "stop"]] = queue.SimpleQueue()
        self._residency = Residency(bank, slots=limits.slots, read=read, on_read=lambda: self._inbox.put("wake"))
        self._compiling = Compiling(guides, on_done=lambda: self._inbox.put("wake"))
        self._deliver, self._on_turn = deliver, on_turn
        self._parked: list[Job] = []
        self._running: dict[int, Job] = {}
        self._numbers = itertools.count()
        self._letters: list[tuple[Mailbox, Event]] = []
        self._stopped = False
        self.load = Load()

    @property
    def resident(self) -> frozenset[str]:
        """Keys of the adapters in the bank."""
        return self._residency.resident

    @property
    def loads(self) -> int:
        """How often an adapter was put into the bank."""
        return self._residency.loads

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
                self._give_slots()
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
        if not self._engine.busy:
            self._take_in(self._inbox.get())
        while not self._stopped and not self._inbox.empty():
            self._take_in(self._inbox.get())

    def _take_in(self, word: Job | _Cancel | Literal["wake", "stop"]) -> None:
        if isinstance(word, Job):
            self._parked.append(word)
        elif isinstance(word, _Cancel):
            self._end(word.job)
        elif word == "stop":
            self._stopped = True

    def _end(self, job: Job) -> None:
        if job in self._parked:
            self._parked.remove(job)
            self._letters.append((job.mailbox, Ended(Completion((), (), "cancelled"))))
        for number in [number for number, running in self._running.items() if running is job]:
            self._engine.cancel(number)

    def _give_slots(self) -> None:
        """Let go to the engine whatever needs no adapter or whose adapter has a slot; in the order of arrival."""
        still: list[Job] = []
        refused: dict[str, AdapterError] = {}
        for job in self._parked:
            try:
                ready = self._compiling.ready(job.request.grammar)
            except TenonError as error:
                self._letters.append((job.mailbox, Failed(error)))
                continue
            if not ready:
                still.append(job)
                continue
            slot = job.request.slot if job.adapter is None else None
            if job.adapter is not None and job.adapter.key not in refused:
                try:
                    slot = self._residency.acquire(job.adapter)
                except AdapterError as error:
                    refused[job.adapter.key] = error
            if job.adapter is not None and job.adapter.key in refused:
                self._letters.append((job.mailbox, Failed(refused[job.adapter.key])))
            elif slot is None:
                still.append(job)
            else:
                number = next(self._numbers)
                self._running[number] = job
                # What is remembered of a prompt belongs to the adapter: its slot may be another one's tomorrow.
                owner = None if job.adapter is None else job.adapter.key
                self._engine.submit(number, replace(job.request, slot=slot, adapter_key=owner))
        self._parked = still
        self._compiling.forget_others({job.request.grammar for job in still})
        self._residency.forget_others({job.adapter.key for job in still if job.adapter is not None})

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
            self._residency.release(job.adapter)
        return job

    def _hand_over(self) -> None:
        now = self._engine.stats()
        self.load = Load(
            running=now.running,
            waiting=now.waiting,
            parked=len(self._parked),
            cache_used=now.blocks_used / now.blocks_total,
            prefix_hit_tokens=now.prefix_hit_tokens,
            preemptions=now.preemptions,
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
                self._parked.append(word)
        self._letters += [(job.mailbox, Failed(error)) for job in (*self._running.values(), *self._parked)]
        self._running.clear()
        self._parked.clear()


def _record(decoder: Decoder, bank: AdapterBank, cache: KvCache, *, slots: int) -> DecodeGraphs | None:
    """Recorded passes, all of them now: the first requests are not to wait for it. None where there are none."""
    if not DecodeGraphs.can_record(decoder):
        return None
    bank.keep_room(slots)
    graphs = DecodeGraphs(decoder, bank, cache)
    graphs.record_all()
    return graphs
