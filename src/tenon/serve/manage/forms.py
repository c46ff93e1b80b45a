"""The bodies of the management API, read and written. This module does not know what they ask for."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tenon.registry.aliases import Alias
from tenon.serve.api.protocol import ApiModel, Text
from tenon.tenants.keys import Key, Limits, Purpose
from tenon.tenants.usage import Used

Shares = Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1, max_length=32)]
Name = Annotated[Text, Field(max_length=200)]


class VersionShown(ApiModel):
    """One version of an adapter. state: where it is nearest to hand."""

    label: str
    version: int
    state: str
    rank: int
    created: float
    size_bytes: int
    metrics: dict[str, float]


class AdapterShown(ApiModel):
    """An adapter with its versions, the oldest first, and what its aliases stand for."""

    name: str
    versions: list[VersionShown]
    aliases: dict[str, str]


class TargetShown(ApiModel):
    """What an alias stands for, or stood for. shares: version -> part of the requests."""

    shares: dict[str, float]
    shadow: int | None
    sticky: bool
    since: float


class AliasShown(ApiModel):
    """An alias. tag: what `If-Match` takes. rolled_back: why, where a server did it by itself or somebody asked."""

    name: str
    target: TargetShown
    before: list[TargetShown]
    rolled_back: str | None
    tag: str


class AliasWanted(ApiModel):
    """What an alias is to stand for: versions with their parts of the requests, `{"3": 95, "4": 5}`."""

    shares: Shares
    shadow: Annotated[int, Field(ge=1)] | None = None
    sticky: bool = False
    force: bool = False


class KeyShown(ApiModel):
    """What is kept of a key, with what its account has used this month. last_used: unix seconds, to the hour."""

    id: str
    tenant: str
    account: str
    purpose: Purpose
    rights: list[str]
    limits: Limits
    created: float
    expires: float | None
    revoked: bool
    last_used: float | None
    tokens: int
    requests: int
    reserved_tokens: int


class KeyMade(KeyShown):
    """key: as it is typed; it is shown this once."""

    key: str


class KeyWanted(ApiModel):
    """A key to make, for the public API. lasts_seconds null: until it is revoked."""

    tenant: Name
    rights: Annotated[list[Name], Field(min_length=1, max_length=100, default_factory=lambda: ["*"])]
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    tokens_per_minute: Annotated[int, Field(ge=1)] | None = None
    tokens_per_month: Annotated[int, Field(ge=1)] | None = None
    concurrent_requests: Annotated[int, Field(ge=1)] | None = None
    lasts_seconds: Annotated[float, Field(gt=0)] | None = None


class RotationWanted(ApiModel):
    """grace_seconds: how long the old key stays valid."""

    grace_seconds: Annotated[float, Field(ge=0)] = 86_400.0


class MonthShown(ApiModel):
    """What an account used in a month, UTC."""

    month: str
    tokens: int
    requests: int
    reserved_tokens: int


class ServerShown(ApiModel):
    """A server now. open: sequences that were let in and have not ended, of `most`."""

    version: str
    base: str
    state: Literal["ready", "draining"]
    open: int
    most: int
    running: int
    waiting: int
    parked: int
    cache_used: float
    rows: int
    slots: int
    context_tokens: int
    resident: int


def show_alias(name: str, alias: Alias) -> AliasShown:
    """An alias as it is told. name: `NAME@ALIAS`."""
    targets = [
        TargetShown(
            shares={str(version): target.part(version) for version in sorted(target.shares)},
            shadow=target.shadow,
            sticky=target.sticky,
            since=target.since,
        )
        for target in (alias.target, *alias.before)
    ]
    reason = None if alias.rolled_back is None else alias.rolled_back.reason
    return AliasShown(name=name, target=targets[0], before=targets[1:], rolled_back=reason, tag=alias.tag)


def show_key(key: Key, used: Used, last_used: float | None) -> KeyShown:
    """A key as it is told: all but its hash."""
    return KeyShown(
        id=key.id,
        tenant=key.tenant,
        account=key.account,
        purpose=key.purpose,
        rights=list(key.rights),
        limits=key.limits,
        created=key.created,
        expires=key.expires,
        revoked=key.revoked,
        last_used=last_used,
        tokens=used.tokens,
        requests=used.requests,
        reserved_tokens=used.reserved_tokens,
    )
