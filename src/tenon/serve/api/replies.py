"""The bodies of OpenAI's API that this server writes: whole answers, chunks of a stream, models.

This module does not know how answers come about.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from tenon.serve.jobs import AdapterState
from tenon.serve.text.said import SaidToken

# What stands for a probability of zero: JSON has no infinity.
_LOWEST_LOGPROB = -9999.0


ChatFinish = Literal["stop", "length", "tool_calls"]


class Usage(BaseModel):
    """Tokens of the prompts, and of all answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(BaseModel):
    """A likely token at one place. bytes: of its UTF-8 text; null where it is a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token of the answer, and the likeliest ones at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """The tokens of a chat's answer."""

    content: list[TokenLogprob]
    refusal: None = None


class TextLogprobs(BaseModel):
    """The tokens of a completion, in columns; the first of a prompt has no probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CalledFunction(BaseModel):
    """arguments: JSON as the model wrote it."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A function that is to be called."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AnswerMessage(BaseModel):
    """What the assistant said. content: null where it only calls functions."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    tool_calls: list[ToolCall] | None = None
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinish


class ChatCompletion(BaseModel):
    """The answer to /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str


class TextChoice(BaseModel):
    """One completion, or a piece of it."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class TextCompletion(BaseModel):
    """The answer to /v1/completions, and each chunk of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None
    system_fingerprint: str


class FunctionDelta(BaseModel):
    """A call's name, or more of its arguments."""

    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(BaseModel):
    """What is new of one call; its first has everything but the arguments."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class ChatDelta(BaseModel):
    """What is new in a chunk."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(BaseModel):
    """A piece of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinish | None = None


class ChatChunk(BaseModel):
    """One chunk of a stream of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str


class Model(BaseModel):
    """A name that can be asked for. root: what it means now; parent: the base that an adapter stands on.

    state: where the weights are nearest to hand: in a slot, on their way to one, in host memory, or on disk alone.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["tenon"] = "tenon"
    root: str
    parent: str | None = None
    state: AdapterState
    rank: int | None = None


class ModelList(BaseModel):
    """GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


def usage_of(prompt_tokens: int, completion_tokens: int) -> Usage:
    """The usage of one request."""
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
    )


def chat_logprobs(tokens: list[SaidToken]) -> ChatLogprobs:
    """Tokens as chats report them."""
    return ChatLogprobs(
        content=[
            TokenLogprob(
                **_likely(token.text, token.logprob or 0.0).model_dump(),
                top_logprobs=[_likely(text, logprob) for text, logprob in token.top],
            )
            for token in tokens
        ]
    )


def text_logprobs(tokens: list[SaidToken], *, top: bool, first: int) -> TextLogprobs:
    """Tokens as completions report them. top: whether likeliest tokens were asked for. first: the text's length before
    the sequence began (an echoed prompt).
    """
    return TextLogprobs(
        tokens=[token.text for token in tokens],
        token_logprobs=[None if token.logprob is None else _bounded(token.logprob) for token in tokens],
        top_logprobs=[_by_text(token) for token in tokens] if top else None,
        text_offset=[first + token.start for token in tokens],
    )


def _by_text(token: SaidToken) -> dict[str, float] | None:
    """The likeliest tokens and the token itself by their text; of equal texts the likeliest."""
    if token.logprob is None:
        return None
    found: dict[str, float] = {}
    for text, logprob in (*token.top, (token.text, token.logprob)):
        found.setdefault(text, _bounded(logprob))
    return found


def _likely(text: str, logprob: float) -> TopLogprob:
    whole = "\ufffd" not in text
    return TopLogprob(token=text, logprob=_bounded(logprob), bytes=list(text.encode()) if whole else None)


def _bounded(logprob: float) -> float:
    return max(logprob, _LOWEST_LOGPROB)
