"""The HTTP application: answers, models, health, metrics.

This module does not know how answers are made, nor how the server is started and stopped.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from fastapi import APIRouter, FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from tenon.serve.api.chat import chat_routes
from tenon.serve.api.completions import completion_routes
from tenon.serve.api.desk import Desk
from tenon.serve.api.embeddings import embedding_routes
from tenon.serve.api.protocol import ErrorBody
from tenon.serve.api.replies import Model, ModelList
from tenon.serve.api.tokens import token_routes
from tenon.serve.front.names import Listed
from tenon.serve.http.api_errors import ApiError
from tenon.serve.http.error_replies import tell_errors
from tenon.serve.http.middleware import REQUEST_ID, BodyBound, Named, Watched
from tenon.serve.jobs import AdapterState, Engines
from tenon.serve.watching.records import Observer

_ERRORS = {
    400: "The request is at fault.",
    401: "The server asks for a key, and this one is not known.",
    403: "The key may not ask this.",
    404: "No adapter or base has this name.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    422: "The adapter's files are refused.",
    429: "Too many requests wait, or the key has used what it may use.",
    500: "The engines were lost with the request, or something went wrong here.",
    503: "The server is being stopped.",
}


@dataclass(frozen=True, slots=True)
class Face:
    """How the application shows itself. body_seconds: in which a body has to come. cors: origins of web pages that may
    ask; `*` is any.
    """

    version: str
    most_body_bytes: int
    body_seconds: float = 60.0
    cors: tuple[str, ...] = ()
    observers: tuple[Observer, ...] = ()
    keep_prompts: bool = False


def make_app(desk: Desk, face: Face) -> FastAPI:
    """The application over one server."""
    app = FastAPI(
        title="Tenon",
        version=face.version,
        summary="Many LoRA adapters over one resident base, behind OpenAI's API.",
        docs_url=None,
        redoc_url=None,
        responses={status: {"model": ErrorBody, "description": text} for status, text in _ERRORS.items()},
    )
    tell_errors(app, desk.names.root)
    app.add_middleware(BodyBound, most_bytes=face.most_body_bytes, seconds=face.body_seconds)
    observers = (desk.gate.metrics, *face.observers)
    app.add_middleware(Watched, observers=observers, keep_prompts=face.keep_prompts)
    if face.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=face.cors,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After", REQUEST_ID],
        )
    app.add_middleware(Named)
    app.include_router(chat_routes(desk))
    app.include_router(completion_routes(desk))
    app.include_router(embedding_routes(desk))
    app.include_router(token_routes(desk))
    app.include_router(_model_routes(desk))
    app.include_router(_state_routes(desk))
    return app


def _model_routes(desk: Desk) -> APIRouter:
    router = APIRouter(tags=["models"])

    def shown(listed: Listed) -> Model:
        entry = listed.entry
        return Model(
            id=listed.name,
            created=0 if entry is None else int(entry.created),
            root=listed.label,
            parent=None if entry is None else desk.names.base,
            state="resident" if entry is None else _state(desk.gate.engine, entry.adapter_hash),
            rank=None if entry is None else entry.rank,
        )

    @router.get("/v1/models", response_model=ModelList)
    async def list_models(request: Request) -> ModelList:
        """The base, and every registered adapter that stands on it, by name, alias and version: those that the caller
        may ask.
        """
        caller = await desk.caller(request.headers.get("authorization"))
        found = await asyncio.to_thread(desk.names.list)
        return ModelList(
            data=[shown(listed) for listed in found if caller is None or caller.may_ask(desk.right(listed))]
        )

    @router.get("/v1/models/{model:path}", response_model=Model)
    async def retrieve_model(model: str, request: Request) -> Model:
        """What a name means now."""
        caller = await desk.caller(request.headers.get("authorization"))
        listed = await asyncio.to_thread(desk.names.describe, model)
        if desk.access is not None:
            desk.access.require_right(caller, desk.right(listed))
        return shown(listed)

    return router


def _state(engine: Engines, key: str) -> AdapterState:
    """Where an adapter is. Engines that know no more say what is resident."""
    return "resident" if key in engine.resident else engine.load.states.get(key, "on disk")


def _state_routes(desk: Desk) -> APIRouter:
    router = APIRouter(tags=["state"])

    @router.get("/health")
    async def health() -> dict[str, str]:
        """The process lives."""
        return {"status": "ok"}

    @router.get("/ready")
    async def ready() -> dict[str, str]:
        """Requests are taken and can be begun; 503 once the server is being stopped, or while no engine is there."""
        desk.gate.require_open()
        if not desk.gate.engine.load.able:
            raise ApiError(503, "no engine is ready; they are being started", code="starting")
        return {"status": "ready"}

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Counters for Prometheus."""
        counted = desk.gate.metrics
        counted.models.keep(await asyncio.to_thread(desk.names.labels))
        if desk.access is not None:
            counted.tenants.keep(await asyncio.to_thread(desk.access.tenants))
        return Response(desk.gate.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router
