"""The management API's routes for keys and usage.

Management keys are made and revoked on the machine alone, with `tenon keys`: who holds one cannot make another. This
module does not know who asks.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Path

from tenon.serve.http.api_errors import ApiError
from tenon.serve.manage.forms import KeyMade, KeyShown, KeyWanted, MonthShown, RotationWanted, show_key
from tenon.tenants.keys import Key, KeyStore, Limits
from tenon.tenants.usage import UsageReader

KeyId = Annotated[str, Path(description="As it is listed: `1f0c9a2b`.", max_length=40)]


@dataclass(frozen=True, slots=True)
class _Keys:
    """What the routes do, in a thread that may block."""

    store: KeyStore
    usage: UsageReader

    def all(self) -> list[KeyShown]:
        return self._shown(*sorted(self.store.keys().values(), key=lambda key: key.created))

    def create(self, wanted: KeyWanted) -> KeyMade:
        limits = Limits(
            requests_per_minute=wanted.requests_per_minute,
            tokens_per_minute=wanted.tokens_per_minute,
            tokens_per_month=wanted.tokens_per_month,
            concurrent_requests=wanted.concurrent_requests,
        )
        rights = tuple(wanted.rights)
        typed, key = self.store.create(wanted.tenant, rights=rights, limits=limits, lasts_seconds=wanted.lasts_seconds)
        return self._made(typed, key)

    def rotate(self, number: str, grace_seconds: float) -> KeyMade:
        return self._made(*self.store.rotate(self._public(number).id, grace_seconds=grace_seconds))

    def revoke(self, number: str) -> KeyShown:
        return self._shown(self.store.revoke(self._public(number).id))[0]

    def months(self, number: str) -> list[MonthShown]:
        found = self.usage.months(self.store.get(number).account)
        return [
            MonthShown(month=month, tokens=used.tokens, requests=used.requests, reserved_tokens=used.reserved_tokens)
            for month, used in found.items()
        ]

    def _shown(self, *keys: Key) -> list[KeyShown]:
        used = self.usage.used([key.account for key in keys])
        seen = self.usage.seen([key.id for key in keys])
        return [show_key(key, used[key.account], seen.get(key.id)) for key in keys]

    def _made(self, typed: str, key: Key) -> KeyMade:
        return KeyMade(key=typed, **dict(self._shown(key)[0]))

    def _public(self, number: str) -> Key:
        key = self.store.get(number)
        if key.purpose != "public":
            raise ApiError(403, "management keys are changed on the machine alone: tenon keys", param="key")
        return key


def key_routes(store: KeyStore, usage: UsageReader) -> APIRouter:
    """The routes over one file of keys."""
    router, keys = APIRouter(tags=["keys"]), _Keys(store, usage)

    @router.get("/v1/keys", response_model=list[KeyShown])
    async def list_keys() -> list[KeyShown]:
        """Every key, the oldest first, with what its account has used this month."""
        return await asyncio.to_thread(keys.all)

    @router.post("/v1/keys", response_model=KeyMade, status_code=201)
    async def create_key(wanted: KeyWanted) -> KeyMade:
        """Make a key of the public API; it is shown this once."""
        return await asyncio.to_thread(keys.create, wanted)

    @router.post("/v1/keys/{number}/rotate", response_model=KeyMade, status_code=201)
    async def rotate_key(number: KeyId, wanted: RotationWanted) -> KeyMade:
        """Make a key in the place of another, which stays valid for a while."""
        return await asyncio.to_thread(keys.rotate, number, wanted.grace_seconds)

    @router.delete("/v1/keys/{number}", response_model=KeyShown)
    async def revoke_key(number: KeyId) -> KeyShown:
        """Refuse a key from now on."""
        return await asyncio.to_thread(keys.revoke, number)

    @router.get("/v1/keys/{number}/usage", response_model=list[MonthShown])
    async def get_usage(number: KeyId) -> list[MonthShown]:
        """What a key's account has used in each month, the oldest first."""
        return await asyncio.to_thread(keys.months, number)

    return router
