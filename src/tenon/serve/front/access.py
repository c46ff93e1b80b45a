"""Who asks: keys, what they may ask, and how much. A server that has no public keys asks for none.

A request is let in by its key, its rights, the requests that its account has running, its rate of requests, then by the
tokens that it may come to: its prompt and the longest answer that it asks for, as often as it asks for one. What it did
not use is given back when it ends.
This module knows no HTTP but for the form of an `Authorization` header.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from tenon.errors import AccessError
from tenon.serve.http.api_errors import ApiError
from tenon.tenants.keys import Key, KeyStore
from tenon.tenants.rates import Bucket
from tenon.tenants.usage import Reservation, UsageBook

_SCHEME = "bearer "
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ticket:
    """One request that was let in. End it once, with the tokens that it came to."""

    tokens: int
    bucket: Bucket | None
    reservation: Reservation
    access: Access

    def end(self, tokens: int) -> None:
        """Give back what was not used. Does not block: the book is written by a thread of its own, in order."""
        tokens = min(tokens, self.tokens)
        if self.bucket is not None:
            self.bucket.put_back(self.tokens - tokens)
        self.access.settle(self.reservation, tokens)


class Access:
    """The keys of one server, their rates and their usage."""

    def __init__(self, store: KeyStore, book: UsageBook) -> None:
        self._store, self._book = store, book
        self._buckets: dict[tuple[str, str, int], Bucket] = {}
        self._running: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="usage")

    def caller(self, authorization: str | None) -> Key | None:
        """Whose request it is; None where the server has no keys. Raises ApiError 401."""
        try:
            if all(key.purpose != "public" for key in self._store.keys().values()):
                return None
            typed = authorization or ""
            scheme, secret = typed[: len(_SCHEME)], typed[len(_SCHEME) :]
            key = self._store.find(secret.strip() if scheme.lower() == _SCHEME else "")
            with suppress(sqlite3.Error):  # who may ask does not depend on it
                self._book.see(key.id)
            return key
        except AccessError as error:
            if error.code == "access-damaged":
                raise ApiError(503, "the server cannot read its keys; tell whoever runs it", code=error.code) from error
            text = "this server asks for a key, and this one is not known; send Authorization: Bearer tn-…"
            raise ApiError(401, text, code="invalid_api_key") from error

    def tenants(self) -> frozenset[str]:
        """Everybody who has a key that opens something, or nobody while the keys cannot be read."""
        with suppress(AccessError):
            now = time.time()
            return frozenset(key.tenant for key in self._store.keys().values() if key.valid_at(now))
        return frozenset()

    def require_right(self, key: Key | None, name: str) -> None:
        """Raises ApiError 403 where a key may not ask a name."""
        if key is not None and not key.may_ask(name):
            raise ApiError(
                403, f"this key may not ask {name!r}; it may ask {', '.join(key.rights) or 'nothing'}", param="model"
            )

    def begin(self, key: Key, tokens: int) -> Ticket:
        """Let a request of at most so many tokens in. Raises ApiError 429 with the seconds to wait. May block."""
        limits = key.limits
        self._enter(key.account, limits.concurrent_requests)
        with ExitStack() as undo:
            undo.callback(self._leave, key.account)
            self._take(key, "requests", limits.requests_per_minute, 1)
            bucket = self._take(key, "tokens", limits.tokens_per_minute, tokens)
            if bucket is not None:
                undo.callback(bucket.put_back, tokens)
            ticket = Ticket(tokens, bucket, self._reserve(key, tokens), self)
            undo.pop_all()
        return ticket

    def settle(self, reservation: Reservation, tokens: int) -> None:
        """A request has ended; it is written down soon."""
        self._leave(reservation.account)
        self._writer.submit(self._write_down, reservation, tokens)

    def close(self) -> None:
        """Write down what has ended. No request comes any more."""
        self._writer.shutdown()

    def _reserve(self, key: Key, tokens: int) -> Reservation:
        quota = key.limits.tokens_per_month
        try:
            reservation = self._book.reserve(key.account, tokens, quota)
            if reservation is None:
                # What has ended here and is not written down yet still counts as reserved: that comes first.
                self._writer.submit(lambda: None).result()
                reservation = self._book.reserve(key.account, tokens, quota)
        except sqlite3.Error as error:
            raise ApiError(
                503, "the server cannot write what keys use; tell whoever runs it", code="usage_not_written"
            ) from error
        if reservation is None:
            raise ApiError(
                429,
                f"the month's quota of {quota:,} tokens leaves no room for {tokens:,} more",
                code="insufficient_quota",
            )
        return reservation

    def _write_down(self, reservation: Reservation, tokens: int) -> None:
        """In the writer's thread. What cannot be written stays reserved for as long as this process lives."""
        try:
            self._book.settle(reservation, tokens)
        except sqlite3.Error as error:
            _LOG.error("what a request of %s used is not written down: %s", reservation.account, error)

    def _enter(self, account: str, most: int | None) -> None:
        with self._lock:
            if most is not None and self._running[account] >= most:
                raise ApiError(
                    429, f"this key may have {most:,} requests at a time; wait for one to end", code="too_many_at_once"
                )
            self._running[account] += 1

    def _leave(self, account: str) -> None:
        with self._lock:
            self._running[account] -= 1
            if not self._running[account]:
                del self._running[account]

    def _take(self, key: Key, what: str, per_minute: int | None, count: int) -> Bucket | None:
        if per_minute is None:
            return None
        with self._lock:
            bucket = self._buckets.setdefault((key.account, what, per_minute), Bucket(per_minute))
        wait = bucket.take(count)
        if wait:
            raise ApiError(
                429,
                f"this key may have {per_minute:,} {what} a minute; try again in {wait:.0f} s",
                code="rate_limit_exceeded",
                retry_seconds=wait,
            )
        return bucket
