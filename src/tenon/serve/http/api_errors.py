"""Errors as OpenAI's clients expect them: a status, and `{"error": {message, type, param, code}}`.

This module does not know who raises them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tenon.errors import StopRequestedError, TenonError

# The longest message: what clients write is told back to them, but not megabytes of it.
_MOST_CHARACTERS = 2000
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    422: "invalid_adapter_error",
    429: "rate_limit_error",
}
# Errors of the package whose status is not that of their kind.
_STATUS_OF_CODE = {
    "adapter-unknown": 404,
    "adapter-bad-name": 404,
    "adapter-alias-moved": 412,
    "adapter-alias-unknown": 404,
    "adapter-bad-alias": 400,
    "adapter-guard": 409,
    "adapter-no-way-back": 409,
    "access-bad-key": 400,
    "access-unknown-key": 404,
    "adapter-other-base": 400,
    "adapter-template": 400,
    "adapter-stop-token": 422,
    "base-tokenizer-kind": 400,
    "usage-empty-prompt": 400,
    "usage-engine": 400,
    "usage-grammar": 400,
    "usage-sampling": 400,
    "run-request-fatal": 500,
    "run-engine-differs": 500,
}


class ApiError(Exception):
    """A request that is refused. message: what is wrong and what to do; param: the field that is to blame.

    retry_seconds: when it may be asked again, where that is known better than by its status.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_seconds: float | None = None,
    ) -> None:
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_seconds = retry_seconds
        super().__init__(message)


def as_api_error(error: TenonError) -> ApiError:
    """An error of the package as the client is told it."""
    status = _STATUS_OF_CODE.get(error.code)
    if status is None:
        kind = error.code.partition("-")[0]
        stopped = isinstance(error, StopRequestedError)
        status = 503 if stopped else {"adapter": 422, "data": 400}.get(kind, 503)
    got = f" (got {error.got})" if error.got else ""
    no_model = error.code in ("adapter-unknown", "adapter-bad-name")
    code = "model_not_found" if no_model else error.code
    return ApiError(status, f"{error.what}{got}; {error.hint}", code=code, param="model" if no_model else None)


def error_body(error: ApiError) -> dict[str, Any]:
    """The body that OpenAI's clients read."""
    default = "invalid_request_error" if error.status < 500 else "server_error"
    return {
        "error": {
            "message": _short(clean(error.message)),
            "type": _TYPES.get(error.status, default),
            "param": None if error.param is None else _short(clean(error.param)),
            "code": error.code,
        }
    }


def validation_error(problems: Sequence[Any]) -> ApiError:
    """What pydantic says of a body, as one error: the first field with a problem, and the innermost one there.

    A field that may be of several kinds has a problem with each of them; the innermost is that of the kind it is.
    """
    field = problems[0]["loc"][:2]
    problem = max((each for each in problems if each["loc"][:2] == field), key=lambda each: len(each["loc"]))
    where = [str(part) for part in problem["loc"] if part != "body"]
    # The kinds that a field may have are no part of its name.
    param = ".".join(part for part in where if part.isdigit() or (part.isidentifier() and part not in ("str", "int")))
    if problem["type"] == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument supplied: {where[-1]}", param=where[-1])
    if problem["type"] == "unsupported_parameter":
        return ApiError(400, problem["msg"], code="unsupported_parameter", param=problem["ctx"]["param"])
    message = f"{param}: {problem['msg']}" if param else problem["msg"]
    return ApiError(400, message, param=param or None)


def _short(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"


def clean(text: str) -> str:
    """The text with what cannot be written as UTF-8 replaced: clients send halves of characters."""
    return text.encode("utf-8", "replace").decode()
