"""API keys as a server's owner has them: made, listed, revoked. This module does not know screens nor HTTP."""

from __future__ import annotations

import time
from pathlib import Path

from tenon.settings import Settings
from tenon.tenants.keys import Key, KeyStore, Limits, Purpose
from tenon.tenants.usage import UsageBook, Used


def create_key(
    tenant: str, settings: Settings, *, rights: tuple[str, ...], limits: Limits, purpose: Purpose = "public"
) -> tuple[str, Key]:
    """(the key as it is typed, shown this once; what is kept of it). Raises AccessError access-bad-key."""
    return KeyStore(settings.keys).create(tenant, rights=rights, limits=limits, purpose=purpose)


def list_keys(settings: Settings) -> list[tuple[Key, Used]]:
    """Every key with what it has used this month, the oldest first. Raises AccessError access-damaged."""
    keys = sorted(KeyStore(settings.keys).keys().values(), key=lambda key: key.created)
    if not settings.usage.is_file():
        return [(key, Used()) for key in keys]
    book = _open_book(settings.usage)
    return [(key, book.used(key.id)) for key in keys]


def revoke_key(number: str, settings: Settings) -> Key:
    """Refuse a key from now on. Raises AccessError access-unknown-key."""
    return KeyStore(settings.keys).revoke(number.removeprefix("tn-"))


def _open_book(path: Path) -> UsageBook:
    """To read; its owner reserves nothing."""
    return UsageBook(path, f"reader {time.monotonic_ns()}")
