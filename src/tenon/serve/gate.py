"""The way in: how many sequences may be open, who is turned away, and the events of those that were let in.

Belongs to the thread of the HTTP server. This module knows no HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from tenon.data.tokenizer import ChatTokenizer
from tenon.errors import StopRequestedError, TenonError
from tenon.infer.requests import Completion, Request, Token
from tenon.serve.access import Ticket
from tenon.serve.api_errors import ApiError
from tenon.serve.jobs import Ended, Engines, Event, Failed, Job
from tenon.serve.metrics import Metrics
from tenon.serve.names import Target
from tenon.serve.said import Piece, Saying, TokenTexts


@dataclass(frozen=True, slots=True)
class Wanted:
    """How the sequences of one request are told. detailed: with their tokens."""

    stops: tuple[str, ...] = ()
    detailed: bool = False


class Gate:
    """Lets requests in, as many as `most` sequences at a time."""

    def __init__(self, engine: Engines, tokenizer: ChatTokenizer, metrics: Metrics, *, most: int) -> None:
        self.engine, self.metrics, self.most = engine, metrics, most
        self.texts = TokenTexts(tokenizer)
        self.draining = False
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
        if len(requests) > self.most:
            raise ApiError(
                400, f"a request may ask for {self.most:,} sequences (prompts times n), not {len(requests):,}"
            )
        if self.open + len(requests) > self.most:
            raise ApiError(429, "too many requests wait already; try again in a moment", code="queue_full")
        answers = Answers(self, target, requests, wanted, ticket)
        self._open[answers] = len(requests)
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
        self._jobs = {i: Job(request, target.adapter, boxes[i]) for i, request in enumerate(requests)}
        self._sayings = [Saying(i, gate.texts, wanted.stops, detailed=wanted.detailed) for i in range(len(requests))]
        self.prompt_tokens = sum(len(request.prompt_ids) for request in requests)
        self.completion_tokens = 0
        self.completions: dict[int, Completion] = {}
        self._began = time.monotonic()
        self._first: float | None = None

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_ignored: object) -> None:
        self.cancel()

    def start(self) -> None:
        """Hand the jobs to the engine."""
        for job in self._jobs.values():
            self._gate.engine.submit(job)

    def cancel(self) -> None:
        """End what still runs, and count what was done."""
        for job in self._jobs.values():
            self._gate.engine.cancel(job)
        self._jobs.clear()
        if self._gate.close(self):
            self._count()
            if self._ticket is not None:
                self._ticket.end(self.prompt_tokens + self.completion_tokens)

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
                raise event.error
            if isinstance(event, Ended):
                self.completions[index] = event.completion
                self._jobs.pop(index)
                yield stopped.pop(index, None) or self._sayings[index].end(event.completion.finish)
            elif index not in stopped:
                piece = self._heard(event, self._sayings[index])
                if piece.finish is None:
                    yield piece
                else:  # a stop string, which the engine knows nothing of: the last piece comes when it has ended
                    self._gate.engine.cancel(self._jobs[index])
                    stopped[index] = piece

    def _heard(self, token: Token, saying: Saying) -> Piece:
        self.completion_tokens += 1
        if self._first is None:
            self._first = time.monotonic()
            self._gate.metrics.first_token.observe(self._first - self._began)
        return saying.take(token)

    def _count(self) -> None:
        metrics, tokens, label = self._gate.metrics, self.completion_tokens, self.target.label
        if self._first is not None and tokens > len(self._sayings):
            metrics.next_token.observe((time.monotonic() - self._first) / (tokens / len(self._sayings)))
        metrics.prompt_tokens.labels(label).inc(self.prompt_tokens)
        metrics.completion_tokens.labels(label).inc(tokens)
