"""The way in: how many sequences may be open, who is turned away, and the events of those that were let in.

Belongs to the thread of the HTTP server. This module knows no HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from tenon.data.render import Renderer
from tenon.data.tokenizer import ChatTokenizer
from tenon.errors import StopRequestedError, TenonError
from tenon.infer.requests import Completion, Request, Token
from tenon.serve.front.access import Ticket
from tenon.serve.front.names import Target
from tenon.serve.http.api_errors import ApiError
from tenon.serve.jobs import Ended, Engines, Event, Failed, Job, Waits
from tenon.serve.text.said import Finish, Piece, Saying, TokenTexts
from tenon.serve.watching.metrics import Metrics
from tenon.serve.watching.records import current_for_answers

# A request may have thousands of sequences; how the first ones ended is told.
_MOST_FINISHES = 16

Render = Callable[[Renderer], Sequence[Sequence[int]]]


@dataclass(frozen=True, slots=True)
class Wanted:
    """How the sequences of one request are told. detailed: with their tokens.

    at_once: most of them that are made at a time; the others follow one by one. None: all. render: the prompts as
    another adapter is asked them; None where they read alike for all. shown: special tokens that are told as text.
    """

    stops: tuple[str, ...] = ()
    detailed: bool = False
    at_once: int | None = None
    render: Render | None = None
    shown: frozenset[int] = frozenset()


class Gate:
    """Lets requests in, as many as `most` sequences at a time."""

    def __init__(self, engine: Engines, tokenizer: ChatTokenizer, metrics: Metrics, *, most: int) -> None:
        self.engine, self.metrics, self.most = engine, metrics, most
        self.texts = TokenTexts(tokenizer)
        self.draining = False
        self.on_end: Callable[[Answers], None] | None = None
        self._open: dict[Answers, int] = {}

    @property
    def open(self) -> int:
        """Sequences that were let in and have not ended."""
        return sum(self._open.values())

    def require_open(self) -> None:
        """Raises ApiError 503 once the server is being stopped."""
        if self.draining:
            raise ApiError(503, "the server is being stopped; ask another one, or again in a moment", code="draining")

    def admit(self, target: Target, requests: Sequence[Request], wanted: Wanted, ticket: Ticket | None) -> Answers:
        """Have the sequences of one request made; the ticket ends with them. Raises ApiError 400, 429, 503."""
        self.require_open()
        count = min(len(requests), wanted.at_once or len(requests))
        if count > self.most:
            raise ApiError(400, f"a request may ask for {self.most:,} sequences (prompts times n), not {count:,}")
        if self.open + count > self.most:
            raise ApiError(429, "too many requests wait already; try again in a moment", code="queue_full")
        answers = Answers(self, target, requests, wanted, ticket)
        self._open[answers] = count
        answers.start()
        return answers

    def close(self, answers: Answers) -> bool:
        """The sequences of a request have ended, or nobody waits for them any more. Whether it was open till now."""
        return self._open.pop(answers, None) is not None

    def abort(self) -> None:
        """End every open request with an error."""
        for answers in list(self._open):
            answers.abort(StopRequestedError("run-stopped", "the server has stopped", hint="ask again in a moment"))


@dataclass(frozen=True, slots=True)
class _Box:
    """The mailbox of one sequence: a place in the queue of its request."""

    index: int
    queue: asyncio.Queue[tuple[int, Event]]

    def put(self, event: Event) -> None:
        self.queue.put_nowait((self.index, event))


class Answers:
    """The sequences of one request on their way. Use as a context manager: leaving cancels what still runs."""

    def __init__(
        self, gate: Gate, target: Target, requests: Sequence[Request], wanted: Wanted, ticket: Ticket | None
    ) -> None:
        self._gate, self.target, self._ticket = gate, target, ticket
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        boxes = [_Box(index, self._queue) for index in range(len(requests))]
        self._unsent = deque(Job(request, target.adapter, box) for request, box in zip(requests, boxes, strict=True))
        self._at_once = wanted.at_once or len(requests)
        self._jobs: dict[int, Job] = {}
        self._sayings = [
            Saying(i, gate.texts, wanted.stops, detailed=wanted.detailed, shown=wanted.shown)
            for i in range(len(requests))
        ]
        self.requests, self.render = tuple(requests), wanted.render
        self.error: TenonError | None = None
        self.prompt_tokens = sum(len(request.prompt_ids) for request in requests)
        self.completion_tokens = 0
        self._sent_tokens = 0
        self.completions: dict[int, Completion] = {}
        self._record = current_for_answers()
        if self._record.keep_prompts:
            self._record.prompts = tuple(request.prompt_ids for request in requests)

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_ignored: object) -> None:
        self.cancel()

    def start(self) -> None:
        """Hand the jobs to the engine."""
        if self._record.submitted is None:
            self._record.submitted, self._record.sequences = time.monotonic(), len(self._sayings)
        while self._unsent and len(self._jobs) < self._at_once:
            job = self._unsent.popleft()
            self._jobs[len(self._sayings) - len(self._unsent) - 1] = job
            self._sent_tokens += len(job.request.prompt_ids)
            self._gate.engine.submit(job)

    def cancel(self) -> None:
        """End what still runs, and count what was done."""
        self._record.cut_off |= bool(self._jobs)
        for job in self._jobs.values():
            self._gate.engine.cancel(job)
        self._jobs.clear()
        self._unsent.clear()
        if self._gate.close(self):
            self._count()
            if self._ticket is not None:
                self._ticket.end(self._read_tokens + self.completion_tokens)
            if self._gate.on_end is not None:
                self._gate.on_end(self)

    @property
    def whole(self) -> bool:
        """Whether every sequence came to its end."""
        return len(self.completions) == len(self.requests)

    @property
    def _read_tokens(self) -> int:
        """Tokens of prompts that are counted: none where an error came before the first token of an answer."""
        return 0 if self.error is not None and not self.completion_tokens else self._sent_tokens

    def abort(self, error: TenonError) -> None:
        """End with an error that whoever reads `pieces` gets."""
        for index in self._jobs:
            self._queue.put_nowait((index, Failed(error)))

    async def pieces(self) -> AsyncIterator[Piece]:
        """What the sequences say, as it comes; each ends with a piece that has a `finish`. Raises TenonError.

        Once a sequence has ended, `completions` has what the engine made, its prompt's scores among it.
        """
        stopped: dict[int, Piece] = {}
        while self._jobs:
            index, event = await self._queue.get()
            if isinstance(event, Failed):
                self.error = event.error
                raise event.error
            if isinstance(event, Ended):
                self.completions[index] = event.completion
                self._jobs.pop(index)
                self.start()
                last = stopped.pop(index, None) or self._sayings[index].end(event.completion.finish)
                self._note_end(event.waits, last.finish or "length")
                yield last
            elif index not in stopped:
                piece = self._heard(event, self._sayings[index])
                if piece.finish is None:
                    yield piece
                else:  # a stop string, which the engine knows nothing of: the last piece comes when it has ended
                    self._gate.engine.cancel(self._jobs[index])
                    stopped[index] = piece

    def _heard(self, token: Token, saying: Saying) -> Piece:
        self.completion_tokens += 1
        if self._record.first is None:
            self._record.first = time.monotonic()
        return saying.take(token)

    def _note_end(self, waits: Waits | None, finish: Finish) -> None:
        """A sequence has ended."""
        record = self._record
        if len(record.finish) < _MOST_FINISHES:
            record.finish = (*record.finish, finish)
        if waits is not None:
            old = record.waits or waits
            record.waits = Waits(
                max(old.adapter_seconds, waits.adapter_seconds), max(old.place_seconds, waits.place_seconds)
            )

    def _count(self) -> None:
        record = self._record
        record.model, record.last = self.target.label, time.monotonic()
        record.prompt_tokens, record.completion_tokens = self._read_tokens, self.completion_tokens
