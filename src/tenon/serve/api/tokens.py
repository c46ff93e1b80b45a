"""/tokenize, /detokenize and /tokenizer_info, in vLLM's form: what a prompt or a conversation is to the base.

lm-eval counts with them where it has no tokenizer of its own. They cost no tokens.
This module does not know how prompts are answered.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, model_validator
from pydantic_core import PydanticCustomError
from starlette.requests import Request

from tenon.data.render import Renderer
from tenon.data.rows import Completion
from tenon.serve.api.desk import Desk
from tenon.serve.api.protocol import ApiModel, ChatMessage, Each, Several, Text, TokenId
from tenon.serve.front.names import BASE


class TokenizeRequest(ApiModel):
    """POST /tokenize. prompt or messages: a text, or a conversation. model: the base unless it is said.

    add_special_tokens: put what the tokenizer puts before a text (templates bring their own). add_generation_prompt:
    open the assistant's turn. return_token_strs: each token's text too.
    """

    model: Text | None = None
    prompt: Text | None = None
    messages: Several[ChatMessage] | None = None
    tools: Each[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _refuse_what_makes_no_sense(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("prompt", "give prompt or messages, one of them")
        if self.messages is not None and self.add_special_tokens:
            raise PydanticCustomError("add_special_tokens", "add_special_tokens: the chat template brings them")
        if self.prompt is not None and self.tools is not None:
            raise PydanticCustomError("tools", "tools need messages")
        return self


class Tokenized(BaseModel):
    """The answer to /tokenize. max_model_len: the longest sequence that this server makes, prompt and answer."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(ApiModel):
    """POST /detokenize."""

    model: Text | None = None
    tokens: Each[TokenId]


class Detokenized(BaseModel):
    """The answer to /detokenize; tokens with a meaning of their own (`<|im_end|>`) stay in the text."""

    prompt: str


class TokenizerInfo(BaseModel):
    """GET /tokenizer_info: texts of the named special tokens, and the template of chats."""

    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None


def token_routes(desk: Desk) -> APIRouter:
    """The routes over one server, with and without `/v1` before them."""
    router = APIRouter(tags=["tokens"])

    @router.post("/v1/tokenize", response_model=Tokenized)
    @router.post("/tokenize", response_model=Tokenized)
    async def tokenize(body: TokenizeRequest, request: Request) -> Tokenized:
        """The tokens of a text, or of a conversation as the base or an adapter is asked it."""
        renderer = await _renderer(desk, body.model, request)
        ids = await asyncio.to_thread(_ids, renderer, body)
        strings = [renderer.tokenizer.backend.id_to_token(token) or "" for token in ids]
        return Tokenized(
            count=len(ids),
            max_model_len=desk.context_tokens,
            tokens=ids,
            token_strs=strings if body.return_token_strs else None,
        )

    @router.post("/v1/detokenize", response_model=Detokenized)
    @router.post("/detokenize", response_model=Detokenized)
    async def detokenize(body: DetokenizeRequest, request: Request) -> Detokenized:
        """The text of tokens."""
        renderer = await _renderer(desk, body.model, request)
        desk.require_known(body.tokens, "tokens")
        text = await asyncio.to_thread(renderer.tokenizer.decode, body.tokens, keep_special=True)
        return Detokenized(prompt=text)

    @router.get("/v1/tokenizer_info", response_model=TokenizerInfo)
    @router.get("/tokenizer_info", response_model=TokenizerInfo)
    async def tokenizer_info(request: Request) -> TokenizerInfo:
        """The special tokens of the base, and its chat template."""
        tokenizer = (await _renderer(desk, None, request)).tokenizer
        named = tokenizer.named_tokens
        eos = None if tokenizer.eos_id is None else tokenizer.backend.id_to_token(tokenizer.eos_id)
        return TokenizerInfo(
            bos_token=named.get("bos_token"),
            eos_token=eos,
            pad_token=named.get("pad_token"),
            unk_token=named.get("unk_token"),
            chat_template=tokenizer.chat_template,
        )

    return router


async def _renderer(desk: Desk, model: str | None, request: Request) -> Renderer:
    """How whoever is named is asked. Raises ApiError 401, 403, 404."""
    caller = await desk.caller(request.headers.get("authorization"))
    return (await desk.find(BASE if model is None else model, caller)).renderer


def _ids(renderer: Renderer, body: TokenizeRequest) -> list[int]:
    if body.messages is not None:
        messages = [message.plain() for message in body.messages]
        read = partial(renderer.prompt, literal=True) if body.add_generation_prompt else renderer.whole
        return read(messages, body.tools, source="messages")
    assert body.prompt is not None
    if body.add_special_tokens is False:
        return renderer.tokenizer.encode(body.prompt)
    return renderer.prompt_of(Completion(body.prompt, "", "prompt"))
