"""The management API: adapters, aliases, keys, usage and the server itself, on a port of its own with keys of its own.

A thin face over the functions that the commands use. It asks for a management key in any case (`tenon keys create NAME
--manage`), which opens nothing else, as no other key opens this. An alias is changed under `If-Match` with its tag, so
that of two who change it at once only one does.
This module does not know who answers requests, nor how the server ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Header, Path
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.responses import Response

from tenon.errors import AccessError
from tenon.infer.requests import Request
from tenon.registry.aliases import ABSENT
from tenon.registry.entry import Entry
from tenon.registry.store import Registry
from tenon.serve.api.desk import Desk, collect
from tenon.serve.api.protocol import ErrorBody
from tenon.serve.front.gate import Wanted
from tenon.serve.http.api_errors import ApiError
from tenon.serve.http.error_replies import tell_errors
from tenon.serve.http.middleware import BodyBound, Named
from tenon.serve.manage.forms import AdapterShown, AliasShown, AliasWanted, ServerShown, VersionShown, show_alias
from tenon.serve.manage.keys import key_routes
from tenon.tenants.keys import KeyStore
from tenon.tenants.usage import UsageReader

_MOST_BODY_BYTES = 1 << 16
_BODY_SECONDS = 10.0
_ERRORS = {
    400: "The request is at fault.",
    401: "The key is not known here.",
    404: "There is nothing of this name.",
    409: "A guard keeps the version out, or there is no way back.",
    412: "It is not what `If-Match` says any more.",
    422: "The adapter's files are refused.",
    429: "Too many requests wait.",
    503: "The server is being stopped.",
}
_BEARER = HTTPBearer(auto_error=False, description="A management key.")
Label = Annotated[str, Path(description="`bot@3`: one version.", max_length=200)]
AliasName = Annotated[str, Path(description="`bot@prod`.", max_length=200)]
IfMatch = Annotated[str | None, Header(description="The alias's tag: only if it is still this.", max_length=100)]
IfNoneMatch = Annotated[str | None, Header(description="`*`: only if there is none.", max_length=100)]


@dataclass(frozen=True, slots=True)
class Manage:
    """What is managed. drain: lets the server finish what runs, then end."""

    desk: Desk
    registry: Registry
    store: KeyStore
    usage: UsageReader
    version: str
    drain: Callable[[], None]


def make_manage_app(manage: Manage) -> FastAPI:
    """The application, to be served apart from the public one."""

    async def require_key(found: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]) -> None:
        try:
            await asyncio.to_thread(manage.store.find, "" if found is None else found.credentials, "management")
        except AccessError as error:
            if error.code == "access-damaged":
                raise ApiError(503, "the server cannot read its keys", code=error.code) from error
            text = "the management API asks for a key of its own: tenon keys create NAME --manage"
            raise ApiError(401, text, code="invalid_api_key") from error

    app = FastAPI(
        title="Tenon, management",
        version=manage.version,
        summary="Adapters, aliases, keys and the server itself.",
        docs_url=None,
        redoc_url=None,
        dependencies=[Depends(require_key)],
        responses={status: {"model": ErrorBody, "description": text} for status, text in _ERRORS.items()},
    )
    tell_errors(app, manage.registry.root, manage.store.path.parent)
    app.add_middleware(BodyBound, most_bytes=_MOST_BODY_BYTES, seconds=_BODY_SECONDS)
    app.add_middleware(Named)
    app.include_router(_adapter_routes(manage))
    app.include_router(_alias_routes(manage))
    app.include_router(key_routes(manage.store, manage.usage))
    app.include_router(_server_routes(manage))
    return app


# ---- adapters ---------------------------------------------------------------------------------------------------


def _adapter_routes(manage: Manage) -> APIRouter:
    router = APIRouter(tags=["adapters"])
    registry, gate = manage.registry, manage.desk.gate

    def version(entry: Entry) -> VersionShown:
        resident = entry.adapter_hash in gate.engine.resident
        return VersionShown(
            label=entry.label,
            version=entry.version,
            state="resident" if resident else "on disk",
            rank=entry.rank,
            created=entry.created,
            size_bytes=entry.size_bytes,
            metrics={metric.name: metric.value for metric in entry.metrics},
        )

    def adapter(name: str, entries: list[Entry]) -> AdapterShown:
        aliases = {alias: found.target.describe() for alias, found in sorted(registry.aliases(name).items())}
        return AdapterShown(name=name, versions=[version(entry) for entry in entries], aliases=aliases)

    def listed() -> list[AdapterShown]:
        found: dict[str, list[Entry]] = {}
        for entry in registry.list(on_damaged=lambda _error: None):
            found.setdefault(entry.name, []).append(entry)
        return [adapter(name, entries) for name, entries in found.items()]

    def one(name: str) -> AdapterShown:
        newest = registry.get(name)
        return adapter(
            newest.name, [registry.get(f"{newest.name}@{number}") for number in registry.versions(newest.name)]
        )

    @router.get("/v1/adapters", response_model=list[AdapterShown])
    async def list_adapters() -> list[AdapterShown]:
        """Every registered adapter with its versions and their state; what cannot be read is left out."""
        return await asyncio.to_thread(listed)

    @router.get("/v1/adapters/{name}", response_model=AdapterShown)
    async def get_adapter(name: Annotated[str, Path(max_length=200)]) -> AdapterShown:
        """One adapter."""
        return await asyncio.to_thread(one, name)

    @router.post("/v1/adapters/{label}/load", response_model=VersionShown)
    async def load_adapter(label: Label) -> VersionShown:
        """Bring a version into memory before somebody asks it, and answer when it is there: it makes one token.

        Should more adapters be asked than there are slots, it makes room like any other.
        """
        target = await asyncio.to_thread(manage.desk.names.find, label)
        entry = await asyncio.to_thread(registry.get, target.label)
        request = Request(prompt_ids=(0,), max_new_tokens=1, salt="management")
        await collect(gate.admit(target, [request], Wanted(), None))
        return version(entry)

    @router.post("/v1/adapters/{label}/unload", response_model=VersionShown, status_code=202)
    async def unload_adapter(label: Label) -> VersionShown:
        """Let a version go from memory as soon as nothing runs on it or waits for it; answers at once.

        It stays registered: whoever asks for it later has it read again.
        """
        target = await asyncio.to_thread(manage.desk.names.find, label)
        entry = await asyncio.to_thread(registry.get, target.label)
        gate.engine.unload(entry.adapter_hash)
        return version(entry)

    return router


# ---- aliases ----------------------------------------------------------------------------------------------------


def _alias_routes(manage: Manage) -> APIRouter:
    router = APIRouter(tags=["aliases"])
    registry = manage.registry

    def told(name: str, response: Response, alias: Any) -> AliasShown:
        response.headers["ETag"] = f'"{alias.tag}"'
        return show_alias(name, alias)

    def every() -> list[AliasShown]:
        return [
            show_alias(f"{name}@{alias}", found)
            for name in registry.names()
            for alias, found in sorted(registry.aliases(name).items())
        ]

    @router.get("/v1/aliases", response_model=list[AliasShown])
    async def list_aliases() -> list[AliasShown]:
        """Every alias of every adapter."""
        return await asyncio.to_thread(every)

    @router.get("/v1/aliases/{alias}", response_model=AliasShown)
    async def get_alias(alias: AliasName, response: Response) -> AliasShown:
        """One alias; its `ETag` is what `If-Match` takes."""
        return told(alias, response, await asyncio.to_thread(registry.alias, alias))

    @router.put("/v1/aliases/{alias}", response_model=AliasShown)
    async def set_alias(
        alias: AliasName,
        wanted: AliasWanted,
        response: Response,
        if_match: IfMatch = None,
        if_none_match: IfNoneMatch = None,
    ) -> AliasShown:
        """Let an alias stand for versions from this instant on; with `If-Match` only if nobody has changed it."""
        move = partial(
            registry.set_alias,
            alias,
            _shares(wanted.shares),
            wanted.shadow,
            sticky=wanted.sticky,
            force=wanted.force,
            tag=_expected(if_match, if_none_match),
        )
        return told(alias, response, await asyncio.to_thread(move))

    @router.post("/v1/aliases/{alias}/rollback", response_model=AliasShown)
    async def roll_back(alias: AliasName, response: Response, if_match: IfMatch = None) -> AliasShown:
        """Let an alias stand for what it stood for before."""
        move = partial(registry.roll_back, alias, tag=_expected(if_match))
        return told(alias, response, await asyncio.to_thread(move))

    @router.delete("/v1/aliases/{alias}", status_code=204)
    async def remove_alias(alias: AliasName, if_match: IfMatch = None) -> None:
        """Forget an alias; the versions stay."""
        await asyncio.to_thread(partial(registry.remove_alias, alias, tag=_expected(if_match)))

    return router


def _shares(shares: dict[str, float]) -> dict[int, float]:
    """Raises ApiError 400 for what is no version's number."""
    if not all(version.isascii() and version.isdigit() and len(version) < 10 for version in shares):
        raise ApiError(400, 'shares are of versions, by number: {"3": 95, "4": 5}', param="shares")
    return {int(version): share for version, share in shares.items()}


def _expected(if_match: str | None, if_none_match: str | None = None) -> str | None:
    """The tag that an alias has to have still; None is any. Raises ApiError 400."""
    if if_none_match is not None:
        if if_none_match.strip() != "*" or if_match is not None:
            raise ApiError(400, "If-None-Match takes *, and no If-Match beside it", param="If-None-Match")
        return ABSENT
    if if_match is None:
        return None
    tag = if_match.strip().removeprefix("W/").strip('"')
    if not tag or tag == "*" or "," in tag:
        raise ApiError(400, "If-Match takes one tag, as ETag gave it", param="If-Match")
    return tag


# ---- the server -------------------------------------------------------------------------------------------------


def _server_routes(manage: Manage) -> APIRouter:
    router = APIRouter(tags=["server"])
    gate = manage.desk.gate

    @router.get("/v1/server", response_model=ServerShown)
    async def get_server() -> ServerShown:
        """What the server does now, and what it may take."""
        load, limits = gate.engine.load, gate.engine.limits
        return ServerShown(
            version=manage.version,
            base=manage.desk.names.base,
            state="draining" if gate.draining else "ready",
            open=gate.open,
            most=gate.most,
            running=load.running,
            waiting=load.waiting,
            parked=load.parked,
            cache_used=load.cache_used,
            rows=limits.rows,
            slots=limits.slots,
            context_tokens=limits.context_tokens,
            resident=len(gate.engine.resident),
        )

    @router.post("/v1/server/drain", status_code=202)
    async def drain() -> dict[str, str]:
        """Take nothing new, let what runs finish, then end: as SIGTERM does."""
        manage.drain()
        return {"state": "draining"}

    return router
