"""Jobs and events as lines between the front and an engine process: one line a job, one line for all of a pass.

    to the engine     {"job": 7, "adapter": [key, label] | null, "request": {…}}   {"cancel": 7}
                      {"unload": key}
    from the engine   {"kind": "pass", "began": [7], "said": [[7, id, logprob, top?]], "ended": [[7, {…}, waits]],
                       "failed": [[7, {code, what, got, hint}]], "load": {…}, "loads": 3, "resident": [keys]?}

A number means a job on one engine: one that is moved to another gets a new number there. What an answer's tokens were
is not told again at its end. This module does not know processes or pipes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import TypeAdapter

from tenon.errors import TenonError, error_of
from tenon.infer.requests import Completion, Request, Token
from tenon.serve.jobs import AdapterRef, Ended, Failed, Load, Waits

_REQUEST = TypeAdapter(Request)
_COMPLETION = TypeAdapter(Completion)
_LOAD = TypeAdapter(Load)
# Of an answer the front knows these already.
_SAID = {"ids", "logprobs"}


@dataclass(frozen=True, slots=True)
class AskedJob:
    """A job as an engine process is asked for it."""

    number: int
    request: Request
    adapter: AdapterRef | None


@dataclass(frozen=True, slots=True)
class AskedCancel:
    """No more of a job is wanted."""

    number: int


@dataclass(frozen=True, slots=True)
class AskedUnload:
    """An adapter is to go once nobody needs it."""

    key: str


@dataclass(slots=True)
class Pass:
    """What one pass, or one idle moment, tells. began: jobs that got their place. resident: None when as before."""

    began: list[int] = field(default_factory=list)
    said: list[tuple[int, Token]] = field(default_factory=list)
    ended: list[tuple[int, Ended]] = field(default_factory=list)
    failed: list[tuple[int, TenonError]] = field(default_factory=list)
    load: Load = field(default_factory=Load)
    loads: int = 0
    resident: frozenset[str] | None = None


def job_line(number: int, request: Request, adapter: AdapterRef | None) -> str:
    """A job, for an engine process."""
    fields = _REQUEST.dump_python(request, mode="json", exclude_defaults=True)
    ref = None if adapter is None else [adapter.key, adapter.label]
    return _line({"job": number, "adapter": ref, "request": fields})


def cancel_line(number: int) -> str:
    """The end of a job, for an engine process."""
    return _line({"cancel": number})


def unload_line(key: str) -> str:
    """An adapter's leave, for an engine process."""
    return _line({"unload": key})


def read_asked(line: str) -> AskedJob | AskedCancel | AskedUnload:
    """What a line asks an engine process for."""
    asked = json.loads(line)
    if "unload" in asked:
        return AskedUnload(asked["unload"])
    if "cancel" in asked:
        return AskedCancel(asked["cancel"])
    ref = asked["adapter"]
    adapter = None if ref is None else AdapterRef(*ref)
    return AskedJob(asked["job"], _REQUEST.validate_python(asked["request"]), adapter)


def pass_fields(told: Pass) -> dict[str, Any]:
    """A pass as the fields of its event; what is empty is left out."""
    fields: dict[str, Any] = {
        "began": told.began,
        "said": [_token_fields(number, token) for number, token in told.said],
        "ended": [[number, *_end_fields(ended)] for number, ended in told.ended],
        "failed": [[number, _error_fields(error)] for number, error in told.failed],
        "load": _LOAD.dump_python(told.load, mode="json", exclude_defaults=True),
        "loads": told.loads,
    }
    if told.resident is not None:
        fields["resident"] = sorted(told.resident)
    return {name: value for name, value in fields.items() if value or name == "resident"}


def read_pass(fields: dict[str, Any]) -> Pass:
    """A pass from the fields of its event."""
    resident = fields.get("resident")
    return Pass(
        began=fields.get("began", []),
        said=[(number, Token(*_tops(rest))) for number, *rest in fields.get("said", ())],
        ended=[(number, Ended(_completion(end), _waits(waits))) for number, end, waits in fields.get("ended", ())],
        failed=[(number, error_of(**error)) for number, error in fields.get("failed", ())],
        load=_LOAD.validate_python(fields.get("load", {})),
        loads=fields.get("loads", 0),
        resident=None if resident is None else frozenset(resident),
    )


def add_event(told: Pass, number: int, event: Token | Ended | Failed) -> None:
    """Let a pass tell one more event of a job."""
    if isinstance(event, Token):
        told.said.append((number, event))
    elif isinstance(event, Ended):
        told.ended.append((number, event))
    else:
        told.failed.append((number, event.error))


def _line(fields: dict[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=True, separators=(",", ":"))


def _token_fields(number: int, token: Token) -> list[Any]:
    return [number, token.id, token.logprob, *([token.top] if token.top else [])]


def _tops(fields: list[Any]) -> list[Any]:
    """The fields of a token with its likeliest ones as the tuples that they were."""
    if len(fields) == 3:
        fields[2] = tuple((token_id, logprob) for token_id, logprob in fields[2])
    return fields


def _end_fields(ended: Ended) -> list[Any]:
    """What an end tells besides its tokens. Scores may be infinite, so the prompt's are written as those of passes."""
    completion, waits = ended.completion, ended.waits
    fields = _COMPLETION.dump_python(completion, mode="json", exclude_defaults=True, exclude=_SAID | {"prompt"})
    if completion.prompt:
        fields["prompt"] = [_token_fields(0, token)[1:] for token in completion.prompt]
    return [fields, None if waits is None else [waits.adapter_seconds, waits.place_seconds]]


def _waits(fields: list[float] | None) -> Waits | None:
    return None if fields is None else Waits(*fields)


def _completion(fields: dict[str, Any]) -> Completion:
    prompt = tuple(Token(*_tops(token)) for token in fields.pop("prompt", ()))
    return replace(_COMPLETION.validate_python({"ids": (), "logprobs": (), **fields}), prompt=prompt)


def _error_fields(error: TenonError) -> dict[str, str]:
    return {"code": error.code, "what": error.what, "got": error.got, "hint": error.hint}
