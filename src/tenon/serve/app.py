"""The HTTP application: answers, models, health, metrics, and one shape for every error.

This module does not know how answers are made, nor how the server is started and stopped.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tenon.errors import TenonError
from tenon.serve.api_errors import ApiError, as_api_error, error_body, validation_error
from tenon.serve.chat import chat_routes
from tenon.serve.completions import completion_routes
from tenon.serve.desk import Desk
from tenon.serve.middleware import BodyBound, Counted
from tenon.serve.names import Listed
from tenon.serve.protocol import ErrorBody
from tenon.serve.replies import Model, ModelList

_ERRORS = {
    400: "The request is at fault.",
    401: "The server asks for a key, and this one is not known.",
    403: "The key may not ask this.",
    404: "No adapter or base has this name.",
    413: "The body is too large.",
    422: "The adapter's files are refused.",
    429: "Too many requests wait, or the key has used what it may use.",
    503: "The server is being stopped.",
}
# After how many seconds a client may try again.
_RETRY_SECONDS = {429: "1", 503: "5"}


def make_app(desk: Desk, *, version: str, most_body_bytes: int) -> FastAPI:
    """The application over one server."""
    app = FastAPI(
        title="Tenon",
        version=version,
        summary="Many LoRA adapters over one resident base, behind OpenAI's API.",
        docs_url=None,
        redoc_url=None,
        responses={status: {"model": ErrorBody, "description": text} for status, text in _ERRORS.items()},
    )
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(TenonError, _on_tenon_error(desk))
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_middleware(BodyBound, most_bytes=most_body_bytes)
    app.add_middleware(Counted, metrics=desk.gate.metrics)
    app.include_router(chat_routes(desk))
    app.include_router(completion_routes(desk))
    app.include_router(_model_routes(desk))
    app.include_router(_state_routes(desk))
    return app


def _model_routes(desk: Desk) -> APIRouter:
    router = APIRouter(tags=["models"])

    def shown(listed: Listed) -> Model:
        entry = listed.entry
        resident = entry is None or entry.adapter_hash in desk.gate.engine.resident
        return Model(
            id=listed.name,
            created=0 if entry is None else int(entry.created),
            root=listed.label,
            parent=None if entry is None else desk.names.base,
            state="resident" if resident else "on disk",
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


def _state_routes(desk: Desk) -> APIRouter:
    router = APIRouter(tags=["state"])

    @router.get("/health")
    async def health() -> dict[str, str]:
        """The process lives."""
        return {"status": "ok"}

    @router.get("/ready")
    async def ready() -> dict[str, str]:
        """Requests are taken; 503 once the server is being stopped."""
        desk.gate.require_open()
        return {"status": "ready"}

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(desk.gate.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


# ---- errors ------------------------------------------------------------------------------------------------------


def _reply(error: ApiError) -> JSONResponse:
    retry = _RETRY_SECONDS.get(error.status) if error.code != "insufficient_quota" else None
    if error.retry_seconds is not None:
        retry = str(math.ceil(error.retry_seconds))
    headers = {} if retry is None else {"Retry-After": retry}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error), status_code=error.status, headers=headers)


async def _on_api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _reply(error)


def _on_tenon_error(desk: Desk) -> Callable[[Request, Exception], Awaitable[Response]]:
    """Errors of the package, without the places on this machine that they name."""

    async def reply(_request: Request, error: Exception) -> Response:
        assert isinstance(error, TenonError)
        told = as_api_error(error)
        message = told.message.replace(f"{desk.names.root}/", "")
        return _reply(ApiError(told.status, message, code=told.code, param=told.param))

    return reply


async def _on_invalid(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _reply(validation_error(error.errors()))


async def _on_http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _reply(ApiError(error.status_code, str(error.detail)))
