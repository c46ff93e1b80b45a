"""Who asks: keys, what they may ask, and how much. A server that has no keys asks for none.

A request is let in by its key, its rights, its rate of requests, then by the tokens that it may come to: its prompt and
the longest answer that it asks for, as often as it asks for one. What it did not use is given back when it ends.
This module knows no HTTP but for the form of an `Authorization` header.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from tenon.errors import AccessError
from tenon.serve.api_errors import ApiError
from tenon.tenants.keys import Key, KeyStore
from tenon.tenants.rates import Bucket
from tenon.tenants.usage import Reservation, UsageBook

_SCHEME = "bearer "


@dataclass(frozen=True, slots=True)
class Ticket:
    """One request that was let in. End it once, with the tokens that it came to."""

    key: Key | None
    tokens: int
    bucket: Bucket | None
    reservation: Reservation | None
    book: UsageBook | None

    def end(self, tokens: int) -> None:
        """Give back what was not used."""
        tokens = min(tokens, self.tokens)
        if self.bucket is not None:
            self.bucket.put_back(self.tokens - tokens)
        if self.reservation is not None and self.book is not None:
            self.book.settle(self.reservation, tokens)


FREE = Ticket(None, 0, None, None, None)


class Access:
    """The keys of one server, their rates and their usage."""

    def __init__(self, store: KeyStore, book: UsageBook) -> None:
        self._store, self._book = store, book
        self._buckets: dict[tuple[str, str, int], Bucket] = {}
        self._lock = threading.Lock()

    def caller(self, authorization: str | None) -> Key | None:
        """Whose request it is; None where the server has no keys. Raises ApiError 401."""
        try:
            if not self._store.keys():
                return None
            typed = authorization or ""
            scheme, secret = typed[: len(_SCHEME)], typed[len(_SCHEME) :]
            return self._store.find(secret.strip() if scheme.lower() == _SCHEME else "")
        except AccessError as error:
            if error.code == "access-damaged":
                raise ApiError(503, "the server cannot read its keys; tell whoever runs it", code=error.code) from error
            text = "this server asks for a key, and this one is not known; send Authorization: Bearer tn-…"
            raise ApiError(401, text, code="invalid_api_key") from error

    def require_right(self, key: Key | None, name: str) -> None:
        """Raises ApiError 403 where a key may not ask a name."""
        if key is not None and not key.may_ask(name):
            raise ApiError(
                403, f"this key may not ask {name!r}; it may ask {', '.join(key.rights) or 'nothing'}", param="model"
            )

    def begin(self, key: Key | None, tokens: int) -> Ticket:
        """Let a request of at most so many tokens in. Raises ApiError 429 with the seconds to wait. May block."""
        if key is None:
            return FREE
        limits = key.limits
        self._take(key, "requests", limits.requests_per_minute, 1)
        bucket = self._take(key, "tokens", limits.tokens_per_minute, tokens)
        reservation = self._book.reserve(key.id, tokens, limits.tokens_per_month)
        if reservation is None:
            if bucket is not None:
                bucket.put_back(tokens)
            raise ApiError(
                429,
                f"the month's quota of {limits.tokens_per_month:,} tokens leaves no room for {tokens:,} more",
                code="insufficient_quota",
            )
        return Ticket(key, tokens, bucket, reservation, self._book)

    def _take(self, key: Key, what: str, per_minute: int | None, count: int) -> Bucket | None:
        if per_minute is None:
            return None
        with self._lock:
            bucket = self._buckets.setdefault((key.id, what, per_minute), Bucket(per_minute))
        wait = bucket.take(count)
        if wait:
            raise ApiError(
                429,
                f"this key may have {per_minute:,} {what} a minute; try again in {wait:.0f} s",
                code="rate_limit_exceeded",
                retry_seconds=wait,
            )
        return bucket
