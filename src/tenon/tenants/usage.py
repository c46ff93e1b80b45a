"""What each key has used, exact however many requests and processes there are at once.

A request reserves the most that it may come to before it begins, and settles what it came to at its end. Both are one
transaction, so that

    used + reserved <= quota        at every instant, of every month

and a quota is never passed by requests that began together. What a server that was killed had reserved is given back
when it starts again under the same name. One SQLite file, which several processes share.
This module does not know tenants' names, nor what a token is.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

_TABLES = """
CREATE TABLE IF NOT EXISTS used (key TEXT, month TEXT, tokens INTEGER NOT NULL, requests INTEGER NOT NULL,
                                 PRIMARY KEY (key, month));
CREATE TABLE IF NOT EXISTS reserved (number INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL, month TEXT NOT NULL,
                                     tokens INTEGER NOT NULL, owner TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS reserved_by_key ON reserved (key, month);
"""
# A writer waits so long for another one.
_WAIT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Reservation:
    """What a running request may come to. number: of the transaction."""

    number: int
    key: str
    month: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Used:
    """What a key has used in a month, and what its running requests may still come to."""

    tokens: int = 0
    requests: int = 0
    reserved_tokens: int = 0


class UsageBook:
    """The usage in one file. owner: this process's name, the same after a restart."""

    def __init__(self, path: Path, owner: str, *, clock: Callable[[], float] = time.time) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._owner, self._clock = path, owner, clock
        self._local = threading.local()
        connection = self._connection()
        connection.execute("PRAGMA journal_mode=WAL")
        connection.executescript(_TABLES)
        with connection:
            connection.execute("DELETE FROM reserved WHERE owner = ?", (owner,))

    def reserve(self, key: str, tokens: int, quota_tokens: int | None) -> Reservation | None:
        """Room for a request of at most so many tokens; None where the month's quota does not leave it."""
        month, connection = self._month(), self._connection()
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            if quota_tokens is not None:
                found = self._used(connection, key, month)
                if found.tokens + found.reserved_tokens + tokens > quota_tokens:
                    return None
            made = connection.execute(
                "INSERT INTO reserved (key, month, tokens, owner) VALUES (?, ?, ?, ?)",
                (key, month, tokens, self._owner),
            )
        assert made.lastrowid is not None
        return Reservation(made.lastrowid, key, month, tokens)

    def settle(self, reservation: Reservation, tokens: int) -> None:
        """A request has ended with so many tokens, never more than it had reserved; once for each reservation."""
        if not 0 <= tokens <= reservation.tokens:
            raise ValueError(f"{tokens} tokens of {reservation.tokens} reserved")
        connection = self._connection()
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            gone = connection.execute("DELETE FROM reserved WHERE number = ?", (reservation.number,))
            if not gone.rowcount:
                return
            connection.execute(
                "INSERT INTO used (key, month, tokens, requests) VALUES (?, ?, ?, 1) ON CONFLICT (key, month) "
                "DO UPDATE SET tokens = tokens + excluded.tokens, requests = requests + 1",
                (reservation.key, reservation.month, tokens),
            )

    def used(self, key: str) -> Used:
        """What a key has used this month."""
        return self._used(self._connection(), key, self._month())

    def close(self) -> None:
        """This thread asks no more."""
        if hasattr(self._local, "connection"):
            self._local.connection.close()
            del self._local.connection

    def _used(self, connection: sqlite3.Connection, key: str, month: str) -> Used:
        with closing(connection.cursor()) as cursor:
            row = cursor.execute(
                "SELECT tokens, requests FROM used WHERE key = ? AND month = ?", (key, month)
            ).fetchone()
            (reserved,) = cursor.execute(
                "SELECT COALESCE(SUM(tokens), 0) FROM reserved WHERE key = ? AND month = ?", (key, month)
            ).fetchone()
        tokens, requests = row or (0, 0)
        return Used(int(tokens), int(requests), int(reserved))

    def _month(self) -> str:
        return time.strftime("%Y-%m", time.gmtime(self._clock()))

    def _connection(self) -> sqlite3.Connection:
        """One for each thread; a transaction begins where it is told to."""
        if not hasattr(self._local, "connection"):
            self._local.connection = sqlite3.connect(self._path, timeout=_WAIT_SECONDS, isolation_level=None)
            self._local.connection.execute("PRAGMA synchronous=NORMAL")
        return self._local.connection
