"""POST /v1/completions: running text, several prompts at once, and scores of prompts (`echo` with `logprobs`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from tenon.serve.api.desk import Desk, Scores, Whole, ask, begun, collect, new_id, now
from tenon.serve.api.prompts import Prompt, read_prompts
from tenon.serve.api.protocol import CompletionRequest
from tenon.serve.api.replies import TextChoice, TextCompletion, TextLogprobs, Usage, text_logprobs, usage_of
from tenon.serve.api.streams import STREAMED, EventStream, unless_gone
from tenon.serve.front.gate import Answers
from tenon.serve.text.said import Piece, SaidToken, TokenTexts


def completion_routes(desk: Desk) -> APIRouter:
    """The route over one server."""
    router = APIRouter()

    @router.post("/v1/completions", response_model=TextCompletion, tags=["answers"], responses=STREAMED)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """What follows a text, from the base or from an adapter; with `stream` as server-sent events."""
        caller = await desk.caller(request.headers.get("authorization"))
        target = await desk.find(body.model, caller, user=body.user)
        prompts = await asyncio.to_thread(read_prompts, desk, target.renderer, body.prompt)
        scores = Scores(body.logprobs, prompt=body.echo and body.logprobs is not None)
        ids = [prompt.ids for prompt in prompts]
        answers = await ask(desk, caller, target, ids, body, most_tokens=body.max_tokens, scores=scores)
        reply = _Reply(new_id("cmpl"), now(), answers, body, prompts, desk.fingerprint, desk.gate.texts)
        if body.stream:
            pieces = await unless_gone(request, answers, begun(answers))
            return EventStream(answers, reply.chunks(pieces))
        whole = reply.whole(await unless_gone(request, answers, collect(answers)))
        return Response(whole.model_dump_json(), media_type="application/json")

    return router


@dataclass(frozen=True, slots=True)
class _Reply:
    """What every part of one reply has."""

    id: str
    created: int
    answers: Answers
    body: CompletionRequest
    prompts: list[Prompt]
    fingerprint: str
    texts: TokenTexts

    def whole(self, answers: list[Whole]) -> TextCompletion:
        """All of it at once."""
        return self._completion(
            *(
                TextChoice(
                    index=index,
                    text=self._prompt(index) + answer.text,
                    logprobs=self._logprobs(index, answer),
                    finish_reason=answer.finish,
                )
                for index, answer in enumerate(answers)
            )
        ).model_copy(update={"usage": self._usage})

    async def chunks(self, pieces: AsyncIterator[Piece]) -> AsyncIterator[TextCompletion]:
        """The text as it comes, after the prompt where it is echoed; then the usage where it is wanted."""
        lengths: dict[int, int] = {}
        async for piece in pieces:
            echoed = "" if piece.index in lengths else self._prompt(piece.index)
            lengths.setdefault(piece.index, 0)
            if not (echoed or piece.text or piece.tokens or piece.finish):
                continue
            logprobs = None
            if self.body.logprobs is not None:
                logprobs = text_logprobs(list(piece.tokens), top=self.body.logprobs > 0, first=0)
            yield self._completion(
                TextChoice(index=piece.index, text=echoed + piece.text, logprobs=logprobs, finish_reason=piece.finish)
            )
        if self.body.include_usage:
            yield self._completion().model_copy(update={"usage": self._usage})

    def _completion(self, *choices: TextChoice) -> TextCompletion:
        whole = TextCompletion(
            id=self.id,
            object="text_completion",
            created=self.created,
            model=self.answers.target.label,
            choices=list(choices),
            system_fingerprint=self.fingerprint,
        )
        # With usage asked for, every chunk has the field, and all but the last have null in it.
        return whole.model_copy(update={"usage": None}) if self.body.include_usage else whole

    def _prompt(self, index: int) -> str:
        """What stands before the answer: the prompt where it is echoed."""
        return self.prompts[index // (self.body.n or 1)].text if self.body.echo else ""

    @property
    def _usage(self) -> Usage:
        return usage_of(self.answers.prompt_tokens, self.answers.completion_tokens)

    def _logprobs(self, index: int, answer: Whole) -> TextLogprobs | None:
        if self.body.logprobs is None:
            return None
        top = self.body.logprobs > 0
        found = text_logprobs(answer.tokens, top=top, first=len(self._prompt(index)))
        if not self.body.echo:
            return found
        prompt = text_logprobs(self._scored_prompt(index), top=top, first=0)
        return TextLogprobs(
            tokens=prompt.tokens + found.tokens,
            token_logprobs=prompt.token_logprobs + found.token_logprobs,
            top_logprobs=None if prompt.top_logprobs is None else prompt.top_logprobs + (found.top_logprobs or []),
            text_offset=prompt.text_offset + found.text_offset,
        )

    def _scored_prompt(self, index: int) -> list[SaidToken]:
        """The prompt's tokens; the first has no probability, for nothing stands before it."""
        first = self.prompts[index // (self.body.n or 1)].ids[0]
        tokens = [SaidToken(self.texts.of(first), None, 0)]
        at = len(tokens[0].text)
        for token in self.answers.completions[index].prompt:
            tokens.append(self.texts.said(token, at))
            at += len(tokens[-1].text)
        return tokens
