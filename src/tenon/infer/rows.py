"""One request on its way through the engine: what is fed next, what has been answered, what must be fed again.

This module knows no tensors and not how rows share a pass.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from tenon.errors import TenonError
from tenon.infer.guides import Guide
from tenon.infer.penalties import Seen, seen_by
from tenon.infer.requests import Completion, FinishReason, Request, Token
from tenon.infer.sampling import Draw


@dataclass(slots=True)
class Row:
    """feed: tokens that the cache does not hold yet, from `fed` on. known: so many tokens were fed before, and what
    follows them is scored already: they are fed again because the row had to give its memory back.

    drafting: whether what is fed is still the prompt and its draft.
    open: whether the next scored token may join the answer. It closes where the draft parts from the answer: what
    follows there is scored for the draft alone, and the cache is then cut back to the answer.
    error: why it cannot go on. seen, guide: what the request's penalties count, and how far its grammar has come; both
    stay when the row gives its memory back.
    embedding: the prompt as a vector, when all of it has been read.
    """

    index: int
    request: Request
    feed: list[int]
    limit_tokens: int
    place: int = -1
    fed: int = 0
    known: int = 0
    drafting: bool = True
    open: bool = True
    finish: FinishReason | None = None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    draft_logprobs: list[float] = field(default_factory=list)
    prompt: list[Token] = field(default_factory=list)
    error: TenonError | None = None
    guide: Guide | None = None
    seen: Seen | None = None
    embedding: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Begin to count what the request's penalties count."""
        self.seen = seen_by(self.request, ())

    def draw_at(self, position: int) -> Draw:
        """How the token at a position of the sequence is chosen."""
        request, seen = self.request, self.seen
        after = position - len(request.prompt_ids)
        if seen is not None and after > len(self.ids):  # only a draft is fed ahead of the answer
            seen = seen_by(request, request.draft_ids[:after])
        return Draw(request, position, drawn=after >= 0, seen=seen, guide=self.guide if after >= 0 else None)

    def take(self, token: Token) -> None:
        """The answer has one more token."""
        self.ids.append(token.id)
        self.logprobs.append(token.logprob)
        if self.seen is not None:
            self.seen.add(token.id)
        if self.guide is not None:
            self.guide.push(token.id)

    def fail(self, error: TenonError) -> None:
        """It cannot go on."""
        self.error, self.finish, self.feed = error, "cancelled", []

    @property
    def owner(self) -> Hashable:
        """Whose memory this row's may be: the same adapter's under the same salt."""
        request = self.request
        return (request.salt, request.slot if request.adapter_key is None else request.adapter_key)

    @property
    def reads_prompt(self) -> bool:
        """Whether the next scored position belongs to a token of the prompt."""
        return self.request.prompt_logprobs and len(self.prompt) + 1 < len(self.request.prompt_ids)

    @property
    def answer_tokens(self) -> int:
        """Tokens of prompt and answer that the cache is to hold: all but the last one, which is fed next."""
        return len(self.request.prompt_ids) + len(self.ids) - 1

    @property
    def held(self) -> list[int]:
        """The tokens of prompt and answer that the cache holds, without a draft's that may be cut away."""
        return [*self.request.prompt_ids, *self.ids][: min(self.fed, self.answer_tokens)]

    @property
    def skippable_tokens(self) -> int:
        """So many first tokens need not be fed when the cache holds them: nothing is to be scored there."""
        return min(max(self.known, self._unscored), self.answer_tokens)

    def first_scored(self, position: int) -> int:
        """Of tokens that are fed from `position` on, the first whose successor is to be scored."""
        return max(self._unscored - position, self.known - position, 0)

    @property
    def _unscored(self) -> int:
        """So many first tokens of the prompt have nothing after them that is to be told."""
        reads_all = self.request.prompt_logprobs or self.request.pooling == "mean"
        return 0 if reads_all else len(self.request.prompt_ids) - 1

    def rewind(self) -> None:
        """Have all that was fed fed again, in another place."""
        beginning = [*self.request.prompt_ids, *(self.request.draft_ids if self.drafting else self.ids)]
        self.feed = beginning[: self.fed] + self.feed
        self.known = max(self.known, self.fed)
        self.fed, self.place = 0, -1

    def resume(self) -> None:
        """Begin after what the request says is answered: it is fed, and what follows its tokens is known."""
        for token_id, logprob in self.request.answered:
            self.take(Token(token_id, logprob))
        self.feed = [*self.request.prompt_ids, *self.ids]
        self.known, self.drafting = len(self.feed) - 1, False

    def completion(self, finish: FinishReason) -> Completion:
        """What is answered so far, as the answer."""
        return Completion(
            ids=tuple(self.ids),
            logprobs=tuple(self.logprobs),
            finish=finish,
            draft_logprobs=tuple(self.draft_logprobs),
            prompt=tuple(self.prompt),
            embedding=self.embedding,
        )


@dataclass(frozen=True, slots=True)
class Taken:
    """Tokens that one pass takes from a place: `ids`, which begin at `position` of the sequence."""

    place: int
    slot: int
    ids: list[int]
    position: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """How full the engine is, and what it has saved and lost so far.

    running, waiting: requests with and without a place. blocks_used: held by running requests. blocks_cached: nobody's,
    remembered for prompts that begin alike; the rest of blocks_total is free. prefix_hit_tokens: tokens that were not
    computed because the cache remembered them. preemptions: how often a request had to give its blocks back.
    """

    running: int
    waiting: int
    blocks_total: int
    blocks_used: int
    blocks_cached: int
    prefix_hit_tokens: int
    preemptions: int
