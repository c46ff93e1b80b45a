"""vLLM as whoever makes the sequences: jobs become streamed completions of a vLLM process, tokens come back.

    submit, cancel, stop      any thread      ->  the event loop
    run                       the owner       the event loop: a task for each job, one that watches the process

When the process dies it is started again, at first at once and then at growing intervals. Jobs that had given out
nothing are made anew, others fail and say why. This module knows no text, and not how adapters come and go.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import httpx
import orjson

from tenon.errors import RunError, StopRequestedError, TenonError
from tenon.serve.jobs import Deliver, Ended, Event, Failed, Job, Limits, Load, Mailbox
from tenon.serve.vllm.adapters import VllmAdapters
from tenon.serve.vllm.process import VllmProcess, exit_text
from tenon.serve.vllm.requests import Reading, completion_body, refusal

_TRIES = 3
_RETRY_SECONDS = 0.1
_END_SECONDS = 5.0
_POLL_SECONDS = 0.1
_SCRAPE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0
# A process that has run for so long did not die of its start.
_SETTLED_SECONDS = 60.0
_DATA = b"data: "
_METRIC = re.compile(r"^vllm:(\w+)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)
_TIMEOUT = httpx.Timeout(None, connect=10.0)
# Shorter than the server keeps them, so that none is used that the server is about to close.
_CONNECTIONS = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0)

_T = TypeVar("_T")
Start = Callable[[Callable[[], None]], VllmProcess]
"""Starts vLLM and waits until it is ready. Given a function to call while it waits, which may raise."""


@dataclass(frozen=True, slots=True)
class _Up:
    """A process that answers, and the connections to it."""

    process: VllmProcess
    client: httpx.AsyncClient


class VllmEngines:
    """Runs jobs until it is stopped. All but `run` may be called from any thread."""

    def __init__(
        self,
        start: Start,
        process: VllmProcess,
        *,
        limits: Limits,
        adapters: VllmAdapters,
        deliver: Deliver,
        tell: Callable[[str], object],
        without: Collection[str] = (),
    ) -> None:
        """start: used when the process dies. tell: what the operator should know, in one sentence. without: fields of
        requests that this vLLM must not be asked for.
        """
        self.limits, self.load = limits, Load()
        self._start, self._process, self._adapters = start, process, adapters
        self._deliver, self._tell, self._without = deliver, tell, without
        self._secret = secrets.token_hex(16)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._early: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._tasks: dict[Job, asyncio.Task[None]] = {}
        self._letters: list[tuple[Mailbox, Event]] = []
        self._leaving: set[asyncio.Task[None]] = set()
        self._parked = self._begun = 0

    @property
    def resident(self) -> frozenset[str]:
        """Keys of the adapters that vLLM has."""
        return self._adapters.resident

    @property
    def loads(self) -> int:
        """How often an adapter was given to vLLM."""
        return self._adapters.loads

    def submit(self, job: Job) -> None:
        """Have a sequence made; its mailbox gets the events."""
        self._call(self._begin, job)

    def cancel(self, job: Job) -> None:
        """End a job: its connection is closed, and vLLM makes no more of it. Harmless when it has ended."""
        self._call(self._end, job)

    def unload(self, key: str) -> None:
        """Have vLLM let an adapter go once nobody needs it."""
        self._call(self._let_go, key)

    def stop(self) -> None:
        """Let `run` return soon; what runs then is failed."""
        self._stopped.set()

    def run(self) -> None:
        """Work until `stop`, then end the process. Every job is told of an end in any case."""
        try:
            asyncio.run(self._main())
            self._process.forget_log()
        finally:
            self._process.end(patience_seconds=_END_SECONDS)
            self._adapters.clear()

    # ---- the event loop -----------------------------------------------------------------------------------------

    def _call(self, work: Callable[[_T], None], subject: _T) -> None:
        """Have the event loop do something; before it runs, once it does."""
        with self._lock:
            if self._loop is None:
                self._early.append(partial(work, subject))
                return
        with suppress(RuntimeError):  # the loop is closed: every job has been told of its end
            self._loop.call_soon_threadsafe(work, subject)

    async def _main(self) -> None:
        self._changed = asyncio.Condition()
        self._up: _Up | None = None
        self._down: TenonError | None = None
        with self._lock:
            self._loop = asyncio.get_running_loop()
            early, self._early = self._early, []
        for work in early:
            work()
        watching = asyncio.ensure_future(self._watch())
        scraping = asyncio.ensure_future(self._scrape())
        try:
            while not self._stopped.is_set() and not watching.done():
                await asyncio.sleep(_POLL_SECONDS)
        finally:
            # Not told of as cancelled: it is the server that stops.
            self._stopped.set()
            everything = [watching, scraping, *self._tasks.values(), *self._leaving]
            for task in everything:
                task.cancel()
            await asyncio.gather(*everything, return_exceptions=True)
            self._flush()
        if watching.done() and not watching.cancelled():
            watching.result()

    def _begin(self, job: Job) -> None:
        task = asyncio.ensure_future(self._make(job))
        self._tasks[job] = task

        def done(task: asyncio.Task[None]) -> None:
            self._tasks.pop(job)
            if task.cancelled():  # before its first step
                self._post(job, self._ended_early(Reading(job.request)))

        task.add_done_callback(done)

    def _end(self, job: Job) -> None:
        if job in self._tasks:
            self._tasks[job].cancel()

    def _let_go(self, key: str) -> None:
        async def unload() -> None:
            if self._up is not None:
                with suppress(httpx.TransportError):  # gone, and its adapters with it
                    await self._adapters.unload(key, self._up.client)

        task = asyncio.ensure_future(unload())
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    # ---- one job ------------------------------------------------------------------------------------------------

    async def _make(self, job: Job) -> None:
        """One sequence, from its job to its end, whatever that is."""
        reading = Reading(job.request)
        try:
            await self._try(job, reading)
            event: Event = Ended(reading.completion(reading.finish or "length"))
        except asyncio.CancelledError:
            event = self._ended_early(reading)
        except TenonError as error:
            event = Failed(error)
        finally:
            self._begun -= reading.begun
        self._post(job, event)

    def _ended_early(self, reading: Reading) -> Event:
        """The end of a job that was cancelled, by who asked for it or because the server stops."""
        if self._stopped.is_set():
            return Failed(StopRequestedError("run-stopped", "the server has stopped", hint="ask again in a moment"))
        return Ended(reading.completion("cancelled"))

    async def _try(self, job: Job, reading: Reading) -> None:
        """Have it made, anew where vLLM went away before it said anything."""
        for turn in range(1, _TRIES + 1):
            up = await self._wait_until_up()
            try:
                async with AsyncExitStack() as kept:
                    name = await self._name(up, job, kept)
                    await self._stream(up, job, reading, name)
                    return
            except httpx.TransportError as error:
                if reading.begun or turn == _TRIES:
                    raise RunError(
                        "run-engine-died",
                        "vLLM went away while it made this answer",
                        got=f"{type(error).__name__}: {error}"[:200],
                        hint="ask again in a moment: it is started again",
                    ) from error
                await asyncio.sleep(_RETRY_SECONDS * turn)

    async def _name(self, up: _Up, job: Job, kept: AsyncExitStack) -> str:
        """What vLLM calls who is to answer; an adapter is there from now on, until `kept` is closed."""
        self._parked += 1
        try:
            return await kept.enter_async_context(self._adapters.using(job.adapter, up.client))
        finally:
            self._parked -= 1

    async def _stream(self, up: _Up, job: Job, reading: Reading, name: str) -> None:
        body = completion_body(job.request, name, secret=self._secret, without=self._without)
        async with up.client.stream("POST", "/v1/completions", content=orjson.dumps(body)) as answer:
            if answer.status_code != 200:
                raise refusal(answer.status_code, _as_tree(await answer.aread()))
            async for data in _events(answer):
                began = reading.begun
                for token in reading.take(orjson.loads(data)):
                    self._post(job, token)
                self._begun += reading.begun - began
        if reading.finish is None:
            raise httpx.RemoteProtocolError("the stream ended before the answer did")

    def _post(self, job: Job, event: Event) -> None:
        """Tell an event, together with all others of this turn of the loop."""
        if not self._letters:
            asyncio.get_running_loop().call_soon(self._flush)
        self._letters.append((job.mailbox, event))

    def _flush(self) -> None:
        self._count()
        if self._letters:
            letters, self._letters = self._letters, []
            self._deliver(letters)

    # ---- the process --------------------------------------------------------------------------------------------

    async def _wait_until_up(self) -> _Up:
        """The process that answers. Raises what its last start raised, when that failed."""
        async with self._changed:
            while self._up is None:
                if self._down is not None:
                    raise self._down
                await self._changed.wait()
            return self._up

    async def _set(self, up: _Up | None, down: TenonError | None = None) -> None:
        async with self._changed:
            self._up, self._down = up, down
            self._changed.notify_all()

    async def _watch(self) -> None:
        """Keep a process up. One that has run for a while is started again at once, others after growing pauses."""
        pause_seconds = 0.0
        while True:
            began = time.monotonic()
            async with httpx.AsyncClient(
                base_url=self._process.url,
                headers={**self._process.headers, "Content-Type": "application/json"},
                timeout=_TIMEOUT,
                limits=_CONNECTIONS,
                trust_env=False,
            ) as client:
                await self._set(_Up(self._process, client))
                while self._process.status is None:
                    await asyncio.sleep(_POLL_SECONDS)
                await self._set(None)
                self._adapters.forget()
                if time.monotonic() - began > _SETTLED_SECONDS:
                    pause_seconds = 0.0
                how = exit_text(self._process.status)
                self._tell(f"vLLM ended ({how}); it is started again in {pause_seconds:.0f} s")
                # The old connections are closed after this: whoever still holds them finds nobody there.
                pause_seconds = await self._revive(pause_seconds)

    async def _revive(self, pause_seconds: float) -> float:
        """Start it again, as often as it takes. Returns how long to wait when it dies soon after."""
        while True:
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(max(2 * pause_seconds, 1.0), _LONGEST_PAUSE_SECONDS)
            await asyncio.to_thread(self._process.end, patience_seconds=0.0)
            try:
                self._process = await asyncio.to_thread(self._start, self._require_running)
            except StopRequestedError:
                return pause_seconds
            except TenonError as error:
                await self._set(None, error)
                self._tell(f"{error.what} ({error.got}); it is tried again in {pause_seconds:.0f} s")
            else:
                self._tell("vLLM runs again")
                return pause_seconds

    def _require_running(self) -> None:
        """Raises StopRequestedError once the server is being stopped."""
        if self._stopped.is_set():
            raise StopRequestedError("run-stopped", "the server has stopped", hint="start it again")

    async def _scrape(self) -> None:
        """Read how full vLLM's cache is, while there is something to do."""
        while True:
            await asyncio.sleep(_SCRAPE_SECONDS)
            up = self._up
            if up is None or not self._tasks:
                continue
            with suppress(httpx.TransportError):
                answer = await up.client.get("/metrics")
                self._count(read_metrics(answer.text))

    def _count(self, told: dict[str, float] | None = None) -> None:
        """Bring `load` up to date. told: vLLM's own counters, if they have just been read."""
        now = self.load
        self.load = Load(
            running=self._begun,
            waiting=len(self._tasks) - self._begun - self._parked,
            parked=self._parked,
            cache_used=now.cache_used if told is None else told.get("kv_cache_usage_perc", 0.0),
            prefix_hit_tokens=now.prefix_hit_tokens if told is None else int(told.get("prefix_cache_hits_total", 0)),
            preemptions=now.preemptions if told is None else int(told.get("num_preemptions_total", 0)),
        )


def read_metrics(text: str) -> dict[str, float]:
    """vLLM's counters by name, without their labels, from Prometheus' form."""
    return {name: float(value) for name, value in _METRIC.findall(text)}


async def _events(answer: httpx.Response) -> AsyncIterator[bytes]:
    """The data of server-sent events, up to the one that says that no more comes."""
    rest = b""
    async for piece in answer.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(_DATA):
                data = line[len(_DATA) :].strip()
                if data == b"[DONE]":
                    return
                yield data


def _as_tree(content: bytes) -> dict[str, Any]:
    """The JSON object of an answer, or its text as one."""
    try:
        tree = orjson.loads(content)
    except orjson.JSONDecodeError:
        tree = None
    return tree if isinstance(tree, dict) else {"message": content.decode("utf-8", "replace")}
