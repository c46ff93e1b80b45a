"""What the routes share: from the fields of a request to sequences for the engine, and from pieces to whole answers.

This module does not know which route asks.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from tenon.errors import AdapterError
from tenon.infer.requests import Request
from tenon.plan.values import Generation
from tenon.serve.api.forms import Forms
from tenon.serve.api.protocol import ChatRequest, CompletionRequest
from tenon.serve.front.access import Access, Ticket
from tenon.serve.front.gate import Answers, Gate, Render, Wanted
from tenon.serve.front.life import Life
from tenon.serve.front.names import BASE, Asker, Listed, Names, Target
from tenon.serve.http.api_errors import ApiError
from tenon.serve.text.said import Finish, Piece, SaidToken
from tenon.serve.watching.records import current
from tenon.tenants.keys import Key

# What an adapter may bring a value of its own for.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
Asked = ChatRequest | CompletionRequest


@dataclass(frozen=True, slots=True)
class Desk:
    """One server as the routes see it. fingerprint: of the base, in every answer. vocabulary: tokens that it knows.

    hidden: numbers of a hidden state. forms: compiles what answers are held to. access: who may ask; None where nobody
    is asked for a key. life: what becomes of aliases.
    """

    gate: Gate
    names: Names
    fingerprint: str
    vocabulary: int
    hidden: int
    forms: Forms
    access: Access | None = None
    life: Life | None = None

    @property
    def context_tokens(self) -> int:
        """The longest sequence, prompt and answer together."""
        return self.gate.engine.limits.context_tokens

    def require_known(self, ids: Sequence[int], param: str) -> None:
        """Raises ApiError 400 for token ids that the base does not have."""
        if max(ids, default=0) >= self.vocabulary:
            raise ApiError(400, f"the base has {self.vocabulary:,} tokens, and an id is {max(ids)}", param=param)

    async def caller(self, authorization: str | None) -> Key | None:
        """Whose request it is, from its header; None where no key is asked for. Raises ApiError 401."""
        found = None if self.access is None else await asyncio.to_thread(self.access.caller, authorization)
        if found is not None:
            current().tenant, current().key = found.tenant, found.id
        return found

    async def find(self, name: str, caller: Key | None, *, user: str | None = None) -> Target:
        """Who answers. user: whoever the request says it is for.

        Raises AdapterError; ApiError 403, and 503 once the server is being stopped.
        """
        self.gate.require_open()
        if self.access is not None:
            self.access.require_right(caller, BASE if name == self.names.base else name)
        return await asyncio.to_thread(self._find, name, Asker("" if caller is None else caller.tenant, user))

    def _find(self, name: str, asker: Asker) -> Target:
        dealt = self.names.deal(name, asker)
        try:
            return self.names.find(name, dealt)
        except AdapterError as error:
            if dealt is not None and self.life is not None:
                self.life.failed(dealt, error)
            raise

    def right(self, listed: Listed) -> str:
        """What a key must have a right to, to ask a name."""
        return BASE if listed.entry is None else listed.name

    async def admit(self, caller: Key | None, target: Target, requests: Sequence[Request], wanted: Wanted) -> Answers:
        """Let the sequences of one request in, by the most tokens that they may come to.

        Raises ApiError 400, 429, 503.
        """
        ticket: Ticket | None = None
        if self.access is not None and caller is not None:
            most = sum(len(request.prompt_ids) + request.answer_tokens for request in requests)
            ticket = await asyncio.to_thread(self.access.begin, caller, most)
        try:
            return self.gate.admit(target, requests, wanted, ticket)
        except ApiError:
            if ticket is not None:
                ticket.end(0)
            raise


@dataclass(frozen=True, slots=True)
class Form:
    """What an answer is held to. grammar: `Forms` has compiled it. stops: texts that end it besides those that were
    asked for. shown: special tokens that are told as text.
    """

    grammar: str | None = None
    stops: tuple[str, ...] = ()
    shown: frozenset[int] = frozenset()


ANY_FORM = Form()


@dataclass(frozen=True, slots=True)
class Scores:
    """What else is told of tokens: how many of the likeliest, and whether the prompt's too. None: nothing."""

    top: int | None = None
    prompt: bool = False


@dataclass(slots=True)
class Whole:
    """One sequence when all of it has been said."""

    text: str = ""
    tokens: list[SaidToken] = field(default_factory=list)
    finish: Finish = "length"


async def ask(
    desk: Desk,
    caller: Key | None,
    target: Target,
    prompts: Sequence[Sequence[int]],
    asked: ChatRequest | CompletionRequest,
    *,
    most_tokens: int | None,
    scores: Scores,
    render: Render | None = None,
    form: Form = ANY_FORM,
) -> Answers:
    """Have the answers of one request made, `n` to each prompt.

    most_tokens: None is to the end of the context. render: see `Wanted`. form: what they are held to.

    Raises ApiError 400, 429, 503; UsageError usage-empty-prompt.
    """
    asked, bound = _as_trained(asked, target.generation)
    count = asked.n or 1
    desk.require_known([token for token, _ in asked.biases], "logit_bias")
    seed = secrets.randbits(63) if asked.seed is None else asked.seed
    requests = [
        Request(
            prompt_ids=prompt,
            max_new_tokens=_room(desk, prompt, most_tokens) if bound is None else min(_room(desk, prompt, None), bound),
            stop_ids=frozenset() if asked.ignore_eos else target.stop_ids,
            temperature=1.0 if asked.temperature is None else asked.temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            top_k=min(max(asked.top_k or 0, 0), desk.vocabulary),
            min_p=asked.min_p or 0.0,
            presence_penalty=asked.presence_penalty or 0.0,
            frequency_penalty=asked.frequency_penalty or 0.0,
            repetition_penalty=1.0 if asked.repetition_penalty is None else asked.repetition_penalty,
            logit_bias=asked.biases,
            seed=seed + sample,
            grammar=form.grammar,
            top_logprobs=scores.top or 0,
            prompt_logprobs=scores.prompt,
            # How fast a prompt is read would tell one tenant what another one asked.
            salt="" if caller is None else caller.tenant,
        )
        for prompt, sample in itertools.product(prompts, range(count))
    ]
    stops = (*asked.stops, *form.stops)
    wanted = Wanted(stops, detailed=scores.top is not None, render=render, shown=form.shown)
    return await desk.admit(caller, target, requests, wanted)


async def collect(answers: Answers) -> list[Whole]:
    """All sequences, whole. Raises TenonError; cancels what still runs."""
    with answers:
        found: dict[int, Whole] = {}
        async for piece in answers.pieces():
            whole = found.setdefault(piece.index, Whole())
            whole.text += piece.text
            whole.tokens += piece.tokens
            whole.finish = piece.finish or whole.finish
        return [found[index] for index in sorted(found)]


async def begun(answers: Answers) -> AsyncIterator[Piece]:
    """The pieces, once there is one: until then an error is still an answer of its own. Raises TenonError."""
    pieces = answers.pieces()
    return _chained(await anext(pieces), pieces)


async def _chained(first: Piece, rest: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
    yield first
    async for piece in rest:
        yield piece


def new_id(kind: str) -> str:
    """An id of an answer that no other has."""
    return f"{kind}-{secrets.token_hex(12)}"


def now() -> int:
    """Unix seconds."""
    return int(time.time())


def _as_trained(asked: Asked, generation: Generation) -> tuple[Asked, int | None]:
    """A request with what the adapter was registered with where it says nothing itself, and the longest answer if that
    is the adapter's to say.
    """
    known = type(asked).model_fields
    own = {name: value for name, value in generation.said.items() if name in _SAMPLING and name in known}
    filled: dict[str, object] = {name: value for name, value in own.items() if getattr(asked, name) is None}
    if asked.stop is None and generation.stop:
        filled["stop"] = list(generation.stop)
    lengths = known.keys() & {"max_tokens", "max_completion_tokens"} & asked.model_fields_set
    said = any(getattr(asked, name) is not None for name in lengths)
    return asked.model_copy(update=filled), None if said else generation.max_tokens


def _room(desk: Desk, prompt: Sequence[int], most_tokens: int | None) -> int:
    """Tokens that the answer may have."""
    room = desk.context_tokens - len(prompt)
    wanted = max(most_tokens or 0, 1)  # also to read a prompt alone, the engine takes a place for one
    if room < wanted:
        raise ApiError(
            400,
            f"This server's context is {desk.context_tokens:,} tokens, and the request needs {len(prompt) + wanted:,} "
            f"({len(prompt):,} in the prompt, {wanted:,} for the answer); shorten the prompt or lower max_tokens",
            code="context_length_exceeded",
        )
    return room if most_tokens is None else most_tokens
