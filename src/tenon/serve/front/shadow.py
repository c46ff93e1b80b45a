"""Shadows: a version that is asked what another one has answered, to be compared and never to be heard.

It is asked once the answer has been given, with the same prompt, seed and sampling, and with the answer as a draft:
where the two agree it costs one pass over both. One shadow at a time, and only while a place is free that nobody waits
for; a request that needs the place gets it, and the shadow is dropped. Nothing of it is told, billed or limited.
Belongs to the thread of the HTTP server. This module knows no HTTP.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, replace

from tenon.errors import TenonError
from tenon.infer.requests import Completion, Request
from tenon.serve.front.gate import Answers, Gate, Render
from tenon.serve.front.names import Dealt, Names, Target
from tenon.serve.jobs import Ended, Event, Failed, Job
from tenon.serve.watching.life_metrics import LifeMetrics

# Answers that wait to be compared; what comes beyond is dropped.
MOST_WAITING = 64
_POLL_SECONDS = 0.01


@dataclass(slots=True)
class Tally:
    """What came of one alias's shadow. dropped: there was no place for it. same_first, same_whole: answers that began
    alike, and that were alike to the end. tokens: of the answers, as the shadow scored them; difference: summed over
    them, the shadow's log probability less the other's, in nats.
    """

    answered: int = 0
    failed: int = 0
    dropped: int = 0
    same_first: int = 0
    same_whole: int = 0
    tokens: int = 0
    difference: float = 0.0


@dataclass(frozen=True, slots=True)
class _Given:
    """An answer that was given. version: the shadow."""

    dealt: Dealt
    version: int
    request: Request
    completion: Completion
    render: Render | None

    @property
    def label(self) -> str:
        """`name@5`."""
        return f"{self.dealt.spec.partition('@')[0]}@{self.version}"


class Shadows:
    """Asks shadows, one after the other."""

    def __init__(self, gate: Gate, names: Names, metrics: LifeMetrics) -> None:
        self._gate, self._names, self._metrics = gate, names, metrics
        self.tallies: dict[tuple[str, int], Tally] = {}
        self._waiting: deque[_Given] = deque()
        self._working: asyncio.Task[None] | None = None

    def offer(self, dealt: Dealt, answers: Answers) -> None:
        """Have the first answer of a request compared, if its alias has a shadow."""
        version, completion = dealt.alias.target.shadow, answers.completions.get(0)
        if version is None or completion is None or version == dealt.version:
            return
        if answers.requests[0].pooling is not None:  # a vector of the prompt: there is no answer to compare
            return
        given = _Given(dealt, version, answers.requests[0], completion, answers.render)
        if len(self._waiting) >= MOST_WAITING:
            self._count(given, "dropped")
            return
        self._waiting.append(given)
        if self._working is None or self._working.done():
            self._working = asyncio.get_running_loop().create_task(self._work())

    async def _work(self) -> None:
        while self._waiting and not self._gate.draining:
            load = self._gate.engine.load
            if not self._place_free or load.waiting or load.parked:
                await asyncio.sleep(_POLL_SECONDS)
                continue
            given = self._waiting.popleft()
            try:
                completion = await self._ask(given)
            except TenonError:
                self._count(given, "failed")
                continue
            if completion is None:
                self._count(given, "dropped")
            else:
                self._compare(given, completion)

    @property
    def _place_free(self) -> bool:
        return self._gate.open < self._gate.engine.limits.rows

    async def _ask(self, given: _Given) -> Completion | None:
        """What the shadow says; None where there is no place. Raises TenonError."""
        target = await asyncio.to_thread(self._names.find, given.label)
        prompt = given.request.prompt_ids
        if given.render is not None:
            prompt = (await asyncio.to_thread(given.render, target.renderer))[0]
        said = given.completion.ids
        # One token more shows whether it ends there, too.
        wanted = max(len(said) + (given.completion.finish == "stop"), 1)
        engine = self._gate.engine
        resident = target.adapter is not None and target.adapter.key in engine.resident
        room = len(prompt) + wanted <= engine.limits.context_tokens
        if not room or not (resident or len(engine.resident) < engine.limits.slots):
            return None
        request = replace(
            given.request,
            prompt_ids=prompt,
            draft_ids=said,
            max_new_tokens=wanted,
            stop_ids=target.stop_ids if given.request.stop_ids else frozenset(),
            top_logprobs=0,
            prompt_logprobs=False,
        )
        return await self._made(request, target)

    async def _made(self, request: Request, target: Target) -> Completion | None:
        box = _Box()
        job = Job(request, target.adapter, box)
        self._gate.engine.submit(job)
        dropped = False
        try:
            while True:
                event = await box.next()
                if isinstance(event, Ended):
                    return None if dropped else event.completion
                if isinstance(event, Failed):
                    raise event.error
                if not self._place_free and not dropped:
                    dropped = True
                    self._gate.engine.cancel(job)
        finally:
            self._gate.engine.cancel(job)

    def _compare(self, given: _Given, completion: Completion) -> None:
        tally = self._count(given, "answered")
        theirs, mine = given.completion, completion
        scored = list(zip(mine.draft_logprobs, theirs.logprobs, strict=False))
        tally.tokens += len(scored)
        tally.difference += sum(shadow - version for shadow, version in scored)
        labels = (given.dealt.spec, str(given.version))
        if tally.tokens:
            self._metrics.difference.labels(*labels).set(tally.difference / tally.tokens)
        if mine.ids[:1] == theirs.ids[:1]:
            tally.same_first += 1
            self._metrics.same_first.labels(*labels).inc()
        # An answer that a stop text or a bound cut short is alike when all of it is.
        if mine.ids == theirs.ids and (theirs.finish != "stop" or mine.finish == "stop"):
            tally.same_whole += 1
            self._metrics.same_whole.labels(*labels).inc()

    def _count(self, given: _Given, outcome: str) -> Tally:
        tally = self.tallies.setdefault((given.dealt.spec, given.version), Tally())
        match outcome:
            case "answered":
                tally.answered += 1
            case "failed":
                tally.failed += 1
            case _:
                tally.dropped += 1
        self._metrics.shadows.labels(given.dealt.spec, str(given.version), outcome).inc()
        return tally


class _Box:
    """The mailbox of a shadow. `next` gives up waiting now and then, so that its place can be asked for."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Event] = asyncio.Queue()

    def put(self, event: Event) -> None:
        self._queue.put_nowait(event)

    async def next(self) -> Event | None:
        """The next event; None where none came yet."""
        try:
            return await asyncio.wait_for(self._queue.get(), _POLL_SECONDS)
        except TimeoutError:
            return None
