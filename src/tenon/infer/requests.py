"""What generation is asked and what it answers: tokens in, tokens out.

This module knows no text, no tensors, and not how requests share a batch.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Literal, Protocol

from tenon.batch import NO_SLOT
from tenon.errors import TenonError, UsageError

FinishReason = Literal["stop", "length", "context", "cancelled"]
Pooling = Literal["last", "mean"]


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to continue.

    slot: the adapter's slot, or NO_SLOT for the bare base. stop_ids: tokens that end the answer (not part of it).
    temperature 0 is greedy: the likeliest token, of equal ones the lowest id; the other limits then do nothing.
    top_k: only the k likeliest (0 = all). top_p: only the likeliest that together reach this probability. min_p: only
    those with at least this share of the likeliest one's probability. All three apply after the temperature.
    presence_penalty, frequency_penalty: taken from the scores of tokens that the answer has, once, and once for each
    time that it has them. repetition_penalty: scores of tokens that prompt or answer have are divided by it where they
    are positive, multiplied where they are negative. logit_bias: (token id, what is added to its score), each id once.
    They apply before the temperature, and to the greedy choice too; log probabilities that are reported stay the
    model's own.
    seed: with the token's position it decides every draw; the company in the batch does not.
    draft_ids: a guess of the answer (the expected one, in evaluation). It changes nothing in the answer, is checked
    in one pass together with the prompt, and its log probabilities are reported.
    grammar: what the answer is held to, as `Guides` reads it; it ends where the grammar does. Not with a draft.
    top_logprobs: report so many of the likeliest tokens at each position. prompt_logprobs: report the prompt's tokens
    too.
    pooling: make no answer, but one vector of the prompt: its last token's hidden state, or the mean of all.
    answered: (id, log probability) of tokens that the answer has already, from another engine: it goes on after them,
    as it would have there, and counts them as its own. Not together with a draft or prompt_logprobs.
    """

    prompt_ids: Sequence[int]
    slot: int = NO_SLOT
    max_new_tokens: int = 256
    stop_ids: frozenset[int] = frozenset()
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Sequence[tuple[int, float]] = ()
    seed: int = 0
    draft_ids: Sequence[int] = ()
    grammar: str | None = None
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    adapter_key: Hashable | None = None
    salt: Hashable = ""
    answered: Sequence[tuple[int, float]] = ()
    pooling: Pooling | None = None

    @property
    def answer_tokens(self) -> int:
        """The most tokens that it may make."""
        return 0 if self.pooling is not None else self.max_new_tokens

    def __post_init__(self) -> None:
        """Raises UsageError usage-empty-prompt, usage-sampling."""
        if not self.prompt_ids:
            raise UsageError("usage-empty-prompt", "the prompt has no token", hint="give at least one character")
        checks = (
            ("temperature", self.temperature, self.temperature >= 0.0, "0 (greedy) or more"),
            ("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "above 0, at most 1"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (all tokens) or more"),
            ("min_p", self.min_p, 0.0 <= self.min_p <= 1.0, "from 0 to 1"),
            ("presence_penalty", self.presence_penalty, isfinite(self.presence_penalty), "any finite number"),
            ("frequency_penalty", self.frequency_penalty, isfinite(self.frequency_penalty), "any finite number"),
            ("repetition_penalty", self.repetition_penalty, 0.0 < self.repetition_penalty < inf, "above 0 (1 is none)"),
            ("logit_bias", len(self.logit_bias), self._good_bias, "finite numbers, each token once"),
            ("grammar", "a draft too", self.grammar is None or not self.draft_ids, "not for answers with a draft"),
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 0, "0 (only read the prompt) or more"),
            ("top_logprobs", self.top_logprobs, self.top_logprobs >= 0, "0 (none) or more"),
        )
        for name, value, good, range_text in checks:
            if not good:
                raise UsageError(
                    "usage-sampling", f"{name} is out of range", got=str(value), hint=f"{name} is {range_text}"
                )

    @property
    def penalises(self) -> bool:
        """Whether it matters which tokens were there before."""
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0

    @property
    def _good_bias(self) -> bool:
        ids = {token for token, _ in self.logit_bias}
        return len(ids) == len(self.logit_bias) and all(t >= 0 and isfinite(value) for t, value in self.logit_bias)


@dataclass(frozen=True, slots=True)
class Token:
    """One token and how likely it was, in nats, under the model itself (temperature 1, no limits).

    top: (id, log probability) of the likeliest tokens at its position, as many as the request asked for, likeliest
    first; the token itself need not be among them.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to one request.

    ids: without the stop token. logprobs: of each id, in nats, under the model itself (temperature 1, no limits).
    finish: stop (a stop token came, or a prompt that is to be a vector has been read), length (max_new_tokens reached),
    context (no room left in the base's context, or in the prompt's case none from the start), cancelled (the caller
    asked).
    draft_logprobs: of each draft token given the ones before it; shorter than the draft where the context ended.
    prompt: the prompt's tokens from the second on, where the request asked for them (the first follows nothing).
    embedding: the prompt as a vector of length 1, where the request asked for that.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: FinishReason
    draft_logprobs: tuple[float, ...] = ()
    prompt: tuple[Token, ...] = ()
    embedding: tuple[float, ...] = ()


class OnToken(Protocol):
    """Called for each token of an answer, as soon as it is known; not for the stop token."""

    def __call__(self, index: int, token: Token) -> bool | None:
        """index: of the request in the list. Return False to cancel this request."""
        ...


class OnFinish(Protocol):
    """Called for each request when its answer is complete, in the order in which they finish."""

    def __call__(self, index: int, completion: Completion) -> None:
        """index: of the request in the list."""
        ...


class OnFailure(Protocol):
    """Called for a request whose scores are not finite; the others go on. Its `OnFinish` is not called."""

    def __call__(self, index: int, error: TenonError) -> None:
        """index: of the request in the list. error: adapter-not-finite, or base-not-finite."""
        ...
