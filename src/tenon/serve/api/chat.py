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
from tenon.serve.api.desk import Desk, Form, Scores, Whole, ask, begun, collect, new_id, now
from tenon.serve.api.protocol import ChatRequest
from tenon.serve.api.replies import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatFinish,
    ChatLogprobs,
    chat_logprobs,
    usage_of,
)
from tenon.serve.api.speech import Speech
from tenon.serve.api.streams import STREAMED, EventStream, unless_gone
from tenon.serve.api.tools import ToolUse, tool_use
from tenon.serve.front.gate import Answers
from tenon.serve.text.said import Piece


def chat_routes(desk: Desk) -> APIRouter:
    """The route over one server."""
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=ChatCompletion, tags=["answers"], responses=STREAMED)
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """The assistant's next turn, from the base or from an adapter; with `stream` as server-sent events."""
        caller = await desk.caller(request.headers.get("authorization"))
        target = await desk.find(body.model, caller, user=body.user or body.safety_identifier)
        messages = [message.plain() for message in body.messages]
        use = await asyncio.to_thread(tool_use, body, target.renderer)

        def render(renderer: Renderer) -> list[list[int]]:
            return [renderer.prompt(messages, use.told, source="messages", literal=True)]

        prompts = await asyncio.to_thread(render, target.renderer)
        answers = await ask(
            desk,
            caller,
            target,
            prompts,
            body,
            most_tokens=body.most_tokens,
            scores=Scores(body.top_logprobs or 0 if body.logprobs else None),
            render=render,
            form=Form(await _grammar(desk, body, use), use.stops, use.shown),
        )
        reply = _Reply(new_id("chatcmpl"), now(), answers, body, use, desk.fingerprint)
        if body.stream:
            pieces = await unless_gone(request, answers, begun(answers))
            return EventStream(answers, reply.chunks(pieces))
        whole = reply.whole(await unless_gone(request, answers, collect(answers)))
        return Response(whole.model_dump_json(), media_type="application/json")

    return router


async def _grammar(desk: Desk, body: ChatRequest, use: ToolUse) -> str | None:
    """What the answer is held to. Raises ApiError 400."""
    if use.grammar is not None:
        return await desk.forms.grammar(use.grammar, "tools")
    schema = body.schema_asked
    return None if schema is None else await desk.forms.grammar(partial(schema_grammar, schema), "response_format")


@dataclass(frozen=True, slots=True)
class _Reply:
    """What every part of one reply has."""

    id: str
    created: int
    answers: Answers
    body: ChatRequest
    use: ToolUse
    fingerprint: str

    def whole(self, answers: list[Whole]) -> ChatCompletion:
        """All of it at once."""
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.answers.target.label,
            choices=[self._choice(index, answer) for index, answer in enumerate(answers)],
            usage=usage_of(self.answers.prompt_tokens, self.answers.completion_tokens),
            system_fingerprint=self.fingerprint,
        )

    def _choice(self, index: int, answer: Whole) -> ChatChoice:
        speech = Speech(self.use.scanner())
        speech.push(answer.text)
        speech.finish()
        return ChatChoice(
            index=index,
            message=speech.message,
            logprobs=chat_logprobs(answer.tokens) if self.body.logprobs else None,
            finish_reason=speech.reason(answer.finish),
        )

    async def chunks(self, pieces: AsyncIterator[Piece]) -> AsyncIterator[ChatChunk]:
        """The role of each choice, what it says and calls as it comes, why it ended; then the usage if it is wanted."""
        speeches: dict[int, Speech] = {}
        async for piece in pieces:
            if piece.index not in speeches:
                speeches[piece.index] = Speech(self.use.scanner())
                yield self._chunk(_choice(piece.index, ChatDelta(role="assistant", content="")))
            speech = speeches[piece.index]
            deltas = speech.push(piece.text) + (speech.finish() if piece.finish is not None else [])
            logprobs = chat_logprobs(list(piece.tokens)) if self.body.logprobs and piece.tokens else None
            if logprobs is not None and not deltas:
                deltas = [ChatDelta(content="")]
            for number, delta in enumerate(deltas):
                yield self._chunk(_choice(piece.index, delta, logprobs=logprobs if number == 0 else None))
            if piece.finish is not None:
                yield self._chunk(_choice(piece.index, ChatDelta(), finish=speech.reason(piece.finish)))
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
    index: int, delta: ChatDelta, *, logprobs: ChatLogprobs | None = None, finish: ChatFinish | None = None
) -> ChatChunkChoice:
    """A piece with every field that chunks have, null or not."""
    return ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish)
