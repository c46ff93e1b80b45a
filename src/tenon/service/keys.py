"""API keys as a server's owner has them: made, listed, rotated, revoked. This module does not know screens nor HTTP."""

from __future__ import annotations

from dataclasses import dataclass

from tenon.errors import AccessError
from tenon.settings import Settings
from tenon.tenants.keys import Key, KeyStore, Limits, Purpose
from tenon.tenants.usage import UsageReader, Used
from tenon.units import parse_seconds


@dataclass(frozen=True, slots=True)
class Listed:
    """A key with what its account has used this month. last_used: unix seconds, to the hour; None is never."""

    key: Key
    used: Used
    last_used: float | None


def create_key(
    tenant: str,
    settings: Settings,
    *,
    rights: tuple[str, ...],
    limits: Limits,
    purpose: Purpose = "public",
    expires: str | None = None,
) -> tuple[str, Key]:
    """(the key as it is typed, shown this once; what is kept of it). expires: `90d`, from now.

    Raises AccessError access-bad-key.
    """
    lasts_seconds = None if expires is None else _duration(expires)
    return KeyStore(settings.keys).create(
        tenant, rights=rights, limits=limits, purpose=purpose, lasts_seconds=lasts_seconds
    )


def list_keys(settings: Settings) -> list[Listed]:
    """Every key, the oldest first. Raises AccessError access-damaged."""
    keys = sorted(KeyStore(settings.keys).keys().values(), key=lambda key: key.created)
    reader = UsageReader(settings.usage)
    used, seen = reader.used([key.account for key in keys]), reader.seen([key.id for key in keys])
    return [Listed(key, used[key.account], seen.get(key.id)) for key in keys]


def rotate_key(number: str, settings: Settings, *, grace: str) -> tuple[str, Key]:
    """A key in the place of another, which stays valid for so long (`24h`).

    Raises AccessError access-unknown-key, access-bad-key.
    """
    return KeyStore(settings.keys).rotate(_id(number), grace_seconds=_duration(grace))


def revoke_key(number: str, settings: Settings) -> Key:
    """Refuse a key from now on. Raises AccessError access-unknown-key."""
    return KeyStore(settings.keys).revoke(_id(number))


def key_usage(number: str, settings: Settings) -> dict[str, Used]:
    """What the account of a key has used in each month. Raises AccessError access-unknown-key."""
    key = KeyStore(settings.keys).get(_id(number))
    return UsageReader(settings.usage).months(key.account)


def _id(number: str) -> str:
    return number.removeprefix("tn-")


def _duration(text: str) -> float:
    try:
        return parse_seconds(text)
    except ValueError as error:
        raise AccessError(
            "access-bad-key", str(error), hint="for example: tenon keys create acme --expires 90d"
        ) from error
