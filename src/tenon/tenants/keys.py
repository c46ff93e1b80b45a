"""API keys: shown once, kept as hashes, with the adapters that they may ask and how much.

    tn-1f0c9a2b-<43 characters>        its id, which may be seen, and its secret, which nobody keeps

A secret has 256 random bits: nobody guesses it, no two are equal and no table holds it, so one SHA-256 without a salt
keeps it as safe as a slow hash would, and a request costs no time. Comparisons take the same time whatever is wrong.
One small file, replaced by one rename: a server that runs sees new and revoked keys with the next request.

A key is rotated by making another of the same account; both are valid until the old one expires, and what they use is
counted together, so that a quota stays one quota. This module does not know requests, nor what a name stands for.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from tenon.errors import AccessError
from tenon.runs.atomic import write_file_atomic
from tenon.values import Value

Purpose = Literal["public", "management"]

_SECRET_BYTES = 32
_MOST_SECONDS = 100 * 366 * 86_400.0
_KEY = re.compile(r"tn-([0-9a-f]{8})-([A-Za-z0-9_-]{43})")
_TENANT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_RIGHT = re.compile(r"[A-Za-z0-9_.*-]{1,100}(@[A-Za-z0-9_*-]{1,64})?")
# What is compared where there is no such key, so that its absence takes the same time.
_NOBODY = hashlib.sha256(b"nobody").hexdigest()


class Limits(Value):
    """None is no limit. Quotas are of a calendar month, UTC."""

    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_month: int | None = Field(default=None, ge=1)
    concurrent_requests: int | None = Field(default=None, ge=1)


class Key(Value):
    """One key. digest: SHA-256 of its secret. rights: names of adapters, `*` standing for any part of one; `base` for
    the base itself. account: whose rates and usage it shares, the id of the first key of its line. created, expires:
    unix seconds; expires None is never.
    """

    id: str
    account: str
    tenant: str
    digest: str
    rights: tuple[str, ...] = ("*",)
    limits: Limits = Limits()
    purpose: Purpose = "public"
    created: float
    expires: float | None = None
    revoked: bool = False

    def valid_at(self, now: float) -> bool:
        """Whether it opens anything. now: unix seconds."""
        return not self.revoked and (self.expires is None or now < self.expires)

    def may_ask(self, name: str) -> bool:
        """Whether it may ask `base`, `NAME`, `NAME@VERSION` or `NAME@ALIAS`; a right to a name is one to all of it."""
        return any(fnmatchcase(name, right) or fnmatchcase(name.partition("@")[0], right) for right in self.rights)


class _File(Value):
    keys: tuple[Key, ...] = ()


class KeyStore:
    """The keys in one file."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.path, self._clock = path, clock
        self._seen: tuple[int, int, int] | None = None
        self._keys: dict[str, Key] = {}

    def create(
        self,
        tenant: str,
        *,
        rights: tuple[str, ...] = ("*",),
        limits: Limits | None = None,
        purpose: Purpose = "public",
        lasts_seconds: float | None = None,
    ) -> tuple[str, Key]:
        """(the key as it is typed, shown this once; what is kept of it). lasts_seconds None: until it is revoked.

        Raises AccessError access-bad-key.
        """
        if _TENANT.fullmatch(tenant) is None:
            raise _bad("a tenant's name has letters, digits, . _ - and begins with a letter, a digit or _", tenant)
        for right in rights:
            if _RIGHT.fullmatch(right) is None:
                raise _bad("a right is the name of an adapter, with * for any part of it", right)
        if lasts_seconds is not None and not 0.0 < lasts_seconds < _MOST_SECONDS:
            raise _bad("a key is valid for a time, as long as a century", f"{lasts_seconds:g} s")
        with self._locked():
            keys = self._read()
            number, secret, now = _new_number(keys), secrets.token_urlsafe(_SECRET_BYTES), self._clock()
            key = Key(
                id=number,
                account=number,
                tenant=tenant,
                digest=_digest(secret),
                rights=rights,
                limits=limits or Limits(),
                purpose=purpose,
                created=now,
                expires=None if lasts_seconds is None else now + lasts_seconds,
            )
            self._write({**keys, number: key})
        return f"tn-{number}-{secret}", key

    def rotate(self, number: str, *, grace_seconds: float) -> tuple[str, Key]:
        """A key in the place of another, with its tenant, rights, limits and account; the old one is valid for so long.

        The new one lasts as long as the old one was made for. Raises AccessError access-unknown-key, and access-bad-key
        for a key that opens nothing any more.
        """
        with self._locked():
            keys, now = self._read(), self._clock()
            old = _known(keys, number)
            if not old.valid_at(now):
                raise _bad("a key that is revoked or has expired is not rotated; make another", number)
            lasts = None if old.expires is None else old.expires - old.created
            ends = min(now + max(grace_seconds, 0.0), float("inf") if old.expires is None else old.expires)
            fresh, secret = _new_number(keys), secrets.token_urlsafe(_SECRET_BYTES)
            key = old.model_copy(
                update={
                    "id": fresh,
                    "digest": _digest(secret),
                    "created": now,
                    "expires": None if lasts is None else now + lasts,
                }
            )
            self._write({**keys, number: old.model_copy(update={"expires": ends}), fresh: key})
        return f"tn-{fresh}-{secret}", key

    def find(self, typed: str, purpose: Purpose = "public") -> Key:
        """The key that someone typed. Raises AccessError access-denied, which does not say what was wrong."""
        found = _KEY.fullmatch(typed)
        key = self.keys().get(found[1]) if found else None
        digest = _digest(found[2] if found else "")
        same = hmac.compare_digest(digest, _NOBODY if key is None else key.digest)
        if key is None or not same or not key.valid_at(self._clock()) or key.purpose != purpose:
            raise AccessError(
                "access-denied", "this key is not known", hint="check it, or make another: tenon keys create TENANT"
            )
        return key

    def get(self, number: str) -> Key:
        """The key with this id. Raises AccessError access-unknown-key."""
        return _known(self.keys(), number)

    def revoke(self, number: str) -> Key:
        """Refuse a key from now on. Raises AccessError access-unknown-key."""
        with self._locked():
            keys = self._read()
            keys[number] = _known(keys, number).model_copy(update={"revoked": True})
            self._write(keys)
        return keys[number]

    def keys(self) -> dict[str, Key]:
        """All keys by id, as they are now; the file is read again only when it has changed."""
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            self._seen, self._keys = None, {}
            return {}
        seen = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
        if seen != self._seen:
            self._keys, self._seen = self._read(), seen
        return dict(self._keys)

    def _read(self) -> dict[str, Key]:
        try:
            return {key.id: key for key in _File.from_json(self.path.read_bytes()).keys}
        except FileNotFoundError:
            return {}
        except ValidationError as error:
            raise AccessError(
                "access-damaged",
                f"{self.path} does not hold keys",
                got=str(error.errors()[0]["msg"]),
                hint="put back a copy of it, or remove it and make new keys: tenon keys create TENANT",
            ) from error

    def _write(self, keys: dict[str, Key]) -> None:
        write_file_atomic(self.path, _File(keys=tuple(keys.values())).to_json().encode())
        self.path.chmod(0o600)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path.with_suffix(".lock"), os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def _known(keys: Mapping[str, Key], number: str) -> Key:
    if number not in keys:
        raise AccessError("access-unknown-key", f"there is no key {number[:40]!r}", hint="see them: tenon keys list")
    return keys[number]


def _new_number(keys: Mapping[str, Key]) -> str:
    return next(number for number in iter(lambda: secrets.token_hex(4), "") if number not in keys)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _bad(what: str, got: str) -> AccessError:
    return AccessError(
        "access-bad-key", what, got=repr(got[:120]), hint="for example: tenon keys create acme --adapter support-*"
    )
