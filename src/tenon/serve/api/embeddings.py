"""POST /v1/embeddings: texts as vectors, from the last hidden states of the base or of an adapter.

A vector is the mean of its tokens' hidden states after the final norm, or the last token's, at length 1. Inputs are
read in the same passes as everybody's answers, a few at a time. This module does not know how they are read.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from tenon.infer.requests import Pooling, Request
from tenon.serve.api.desk import Desk
from tenon.serve.api.prompts import read_prompts
from tenon.serve.api.protocol import ApiModel, Several, Text, TokenId
from tenon.serve.api.streams import unless_gone
from tenon.serve.front.gate import Answers, Wanted
from tenon.serve.http.api_errors import ApiError

# As OpenAI's.
_MOST_INPUTS = 2048


class EmbeddingRequest(ApiModel):
    """POST /v1/embeddings. input: a text or token ids, or several. pooling: which hidden states make the vector."""

    model: Text
    input: Text | Several[Text] | Several[TokenId] | Several[Several[TokenId]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    pooling: Pooling = "mean"
    # Without effect here.
    user: Text | None = None


class Embedding(BaseModel):
    """One vector; as text it is base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    """The answer to /v1/embeddings, in the order of the inputs."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


def embedding_routes(desk: Desk) -> APIRouter:
    """The route over one server."""
    router = APIRouter()

    @router.post("/v1/embeddings", response_model=EmbeddingList, tags=["answers"])
    async def create_embeddings(body: EmbeddingRequest, request: HttpRequest) -> Response:
        """Texts as vectors of length 1, from the base or from an adapter."""
        caller = await desk.caller(request.headers.get("authorization"))
        target = await desk.find(body.model, caller)
        _require_whole_vectors(body.dimensions, desk.hidden)
        prompts = await asyncio.to_thread(read_prompts, desk, target.renderer, body.input, param="input")
        _require_fits(desk, [prompt.ids for prompt in prompts])
        salt = "" if caller is None else caller.tenant
        requests = [Request(prompt.ids, pooling=body.pooling, salt=salt) for prompt in prompts]
        # Half of the places stay for those who wait for their next token.
        wanted = Wanted(at_once=max(1, desk.gate.engine.limits.rows // 2))
        answers = await desk.admit(caller, target, requests, wanted)
        vectors = await unless_gone(request, answers, _collect(answers))
        reply = await asyncio.to_thread(_reply, answers, vectors, body.encoding_format)
        return Response(reply, media_type="application/json")

    return router


def _require_whole_vectors(dimensions: int | None, hidden: int) -> None:
    """Raises ApiError 400: the first numbers of a hidden state are no smaller form of it."""
    if dimensions not in (None, hidden):
        text = f"this base was not trained to have shorter vectors: leave dimensions out, or ask for {hidden:,}"
        raise ApiError(400, text, param="dimensions")


def _require_fits(desk: Desk, prompts: Sequence[Sequence[int]]) -> None:
    """Raises ApiError 400."""
    if len(prompts) > _MOST_INPUTS:
        raise ApiError(400, f"a request may have {_MOST_INPUTS:,} inputs, not {len(prompts):,}", param="input")
    for number, ids in enumerate(prompts):
        if len(ids) > desk.context_tokens:
            raise ApiError(
                400,
                f"This server's context is {desk.context_tokens:,} tokens, and input {number} has {len(ids):,}; "
                "shorten it, or cut it in pieces",
                code="context_length_exceeded",
                param="input",
            )


async def _collect(answers: Answers) -> list[np.ndarray]:
    """The vectors (hidden), float32, in the order of the inputs. Raises TenonError; cancels what still runs."""
    with answers:
        found: dict[int, np.ndarray] = {}
        async for piece in answers.pieces():
            # Kept in its short form: of thousands of inputs the numbers are many.
            found[piece.index] = np.array(answers.completions.pop(piece.index).embedding, dtype=np.float32)
        return [found[index] for index in sorted(found)]


def _reply(answers: Answers, vectors: Sequence[np.ndarray], form: str) -> bytes:
    """An `EmbeddingList` as JSON; each number in the fewest digits that are the same float32."""
    data = [
        {"object": "embedding", "index": index, "embedding": vector if form == "float" else _base64(vector)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": answers.prompt_tokens, "total_tokens": answers.prompt_tokens}
    reply: dict[str, Any] = {"object": "list", "data": data, "model": answers.target.label, "usage": usage}
    return orjson.dumps(reply, option=orjson.OPT_SERIALIZE_NUMPY)


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
