"""Every error of an application in the one shape that OpenAI's clients read.

This module does not know the routes, nor who raises.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tenon.errors import TenonError
from tenon.serve.http.api_errors import ApiError, as_api_error, error_body, validation_error
from tenon.serve.watching.records import current

# After how many seconds a client may try again.
_RETRY_SECONDS = {429: "1", 503: "5"}


def tell_errors(app: FastAPI, *private: Path) -> None:
    """Have the application tell its errors. private: folders of this machine, whose names no client is told."""
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(TenonError, _on_tenon_error(tuple(f"{place}/" for place in private)))
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_bug)


def _reply(error: ApiError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    current().error = error.code
    retry = _RETRY_SECONDS.get(error.status) if error.code != "insufficient_quota" else None
    if error.retry_seconds is not None:
        retry = str(math.ceil(error.retry_seconds))
    told = dict(headers or {}) | ({} if retry is None else {"Retry-After": retry})
    if error.status == 401:
        told["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error), status_code=error.status, headers=told)


async def _on_api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _reply(error)


def _on_tenon_error(private: tuple[str, ...]) -> Callable[[Request, Exception], Awaitable[Response]]:
    """Errors of the package, without the places on this machine that they name."""

    async def reply(_request: Request, error: Exception) -> Response:
        assert isinstance(error, TenonError)
        told = as_api_error(error)
        message = told.message
        for place in private:
            message = message.replace(place, "")
        return _reply(ApiError(told.status, message, code=told.code, param=told.param))

    return reply


async def _on_invalid(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _reply(validation_error(error.errors()))


async def _on_http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _reply(ApiError(error.status_code, str(error.detail)), error.headers)


async def _on_bug(_request: Request, _error: Exception) -> Response:
    """What went wrong is in the server's log, and is nobody else's business."""
    return _reply(ApiError(500, "something went wrong here; the server's log says what", code="internal_error"))
