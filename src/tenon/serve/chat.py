"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from tenon.data.render import Renderer
from tenon.data.schemas import schema_grammar
from tenon.serve.desk import Desk, Scores, Whole, ask, begun, collect, new_id, now
from tenon.serve.gate import Answers
from tenon.serve.protocol import ChatRequest
from tenon.serve.replies import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    chat_logprobs,
    usage_of,
)
from tenon.serve.said import Finish, Piece
from tenon.serve.streams import STREAMED, EventStream, unless_gone


def chat_routes(desk: Desk) -> APIRouter:
    """The route over one server."""
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=ChatCompletion, tags=["answers"], responses=STREAMED)
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """The assistant's next turn, from the base or from an adapter; with `stream` as server-sent events."""
        caller = await desk.caller(request.headers.get("authorization"))
        target = await desk.find(body.model, caller, user=body.user or body.safety_identifier)
        messages = [message.plain() for message in body.messages]

        def render(renderer: Renderer) -> list[list[int]]:
            return [renderer.prompt(messages, source="messages")]

        prompts = await asyncio.to_thread(render, target.renderer)
        grammar = await _grammar(desk, body)
        scores = Scores(body.top_logprobs or 0 if body.logprobs else None)
        answers = await ask(
            desk,
            caller,
            target,
            prompts,
            body,
            most_tokens=body.most_tokens,
            scores=scores,
            render=render,
            grammar=grammar,
        )
        reply = _Reply(new_id("chatcmpl"), now(), answers, body, desk.fingerprint)
        if body.stream:
            pieces = await unless_gone(request, answers, begun(answers))
            return EventStream(answers, reply.chunks(pieces))
        whole = reply.whole(await unless_gone(request, answers, collect(answers)))
        return Response(whole.model_dump_json(), media_type="application/json")

    return router


async def _grammar(desk: Desk, body: ChatRequest) -> str | None:
    """What the answer is held to. Raises ApiError 400."""
    schema = body.schema_asked
    return None if schema is None else await desk.forms.grammar(partial(schema_grammar, schema), "response_format")


@dataclass(frozen=True, slots=True)
class _Reply:
    """What every part of one reply has."""

    id: str
    created: int
    answers: Answers
    body: ChatRequest
    fingerprint: str

    def whole(self, answers: list[Whole]) -> ChatCompletion:
        """All of it at once."""
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.answers.target.label,
            choices=[
                ChatChoice(
                    index=index,
                    message=AnswerMessage(content=answer.text),
                    logprobs=chat_logprobs(answer.tokens) if self.body.logprobs else None,
                    finish_reason=answer.finish,
                )
                for index, answer in enumerate(answers)
            ],
            usage=usage_of(self.answers.prompt_tokens, self.answers.completion_tokens),
            system_fingerprint=self.fingerprint,
        )

    async def chunks(self, pieces: AsyncIterator[Piece]) -> AsyncIterator[ChatChunk]:
        """The role of each choice, its text as it comes, why it ended; then the usage where it is wanted."""
        opened: set[int] = set()
        async for piece in pieces:
            if piece.index not in opened:
                opened.add(piece.index)
                yield self._chunk(_choice(piece.index, ChatDelta(role="assistant", content="")))
            if piece.text or piece.tokens:
                logprobs = chat_logprobs(list(piece.tokens)) if self.body.logprobs else None
                yield self._chunk(_choice(piece.index, ChatDelta(content=piece.text), logprobs=logprobs))
            if piece.finish is not None:
                yield self._chunk(_choice(piece.index, ChatDelta(), finish=piece.finish))
        if self.body.include_usage:
            usage = usage_of(self.answers.prompt_tokens, self.answers.completion_tokens)
            yield self._chunk().model_copy(update={"usage": usage})

    def _chunk(self, *choices: ChatChunkChoice) -> ChatChunk:
        chunk = ChatChunk(
            id=self.id,
            object="chat.completion.chunk",
            created=self.created,
            model=self.answers.target.label,
            choices=list(choices),
            system_fingerprint=self.fingerprint,
        )
        # With usage asked for, every chunk has the field, and all but the last have null in it.
        return chunk.model_copy(update={"usage": None}) if self.body.include_usage else chunk


def _choice(
    index: int, delta: ChatDelta, *, logprobs: ChatLogprobs | None = None, finish: Finish | None = None
) -> ChatChunkChoice:
    """A piece with every field that chunks have, null or not."""
    return ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish)
