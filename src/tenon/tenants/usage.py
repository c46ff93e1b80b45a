"""What each account has used, exact however many requests and processes there are at once.

A request reserves the most that it may come to before it begins, and settles what it came to at its end. Both are one
transaction, so that

    used + reserved <= quota        at every instant, of every month

and a quota is never passed by requests that began together. One SQLite file, which several processes of one machine
share. A process holds a lock on a small file for as long as it lives, and what it reserves bears the file's name: when
it was killed the lock is free, and whoever next opens the book, or would refuse a request, gives its reservations back.
This module does not know tenants' names, nor what a token is.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

_TABLES = """
CREATE TABLE IF NOT EXISTS used (account TEXT, month TEXT, tokens INTEGER NOT NULL, requests INTEGER NOT NULL,
                                 PRIMARY KEY (account, month));
CREATE TABLE IF NOT EXISTS reserved (number INTEGER PRIMARY KEY AUTOINCREMENT, account TEXT NOT NULL,
                                     month TEXT NOT NULL, tokens INTEGER NOT NULL, owner TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS reserved_by_account ON reserved (account, month);
CREATE TABLE IF NOT EXISTS seen (key TEXT PRIMARY KEY, hour INTEGER NOT NULL);
"""
# A writer waits so long for another one.
_WAIT_SECONDS = 10.0
_HOUR_SECONDS = 3600


@dataclass(frozen=True, slots=True)
class Reservation:
    """What a running request may come to. number: of the transaction."""

    number: int
    account: str
    month: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Used:
    """What an account has used in a month, and what its running requests may still come to."""

    tokens: int = 0
    requests: int = 0
    reserved_tokens: int = 0


class UsageBook:
    """The usage in one file, to be written by one process."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._clock = path, clock
        self._local = threading.local()
        self._seen: dict[str, int] = {}
        self._lease = _Lease(path.with_name(f"{path.name}-owners"))
        connection = self._connection()
        connection.execute("PRAGMA journal_mode=WAL")
        connection.executescript(_TABLES)
        self._give_back_of_the_dead()

    def reserve(self, account: str, tokens: int, quota_tokens: int | None) -> Reservation | None:
        """Room for a request of at most so many tokens; None where the month's quota does not leave it."""
        made = self._try(account, tokens, quota_tokens)
        if made is None and self._give_back_of_the_dead():
            made = self._try(account, tokens, quota_tokens)
        return made

    def settle(self, reservation: Reservation, tokens: int) -> None:
        """A request has ended with so many tokens, never more than it had reserved; once for each reservation.

        One that was let in and came to nothing is not counted.
        """
        if not 0 <= tokens <= reservation.tokens:
            raise ValueError(f"{tokens} tokens of {reservation.tokens} reserved")
        connection = self._connection()
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            gone = connection.execute("DELETE FROM reserved WHERE number = ?", (reservation.number,))
            if not gone.rowcount or not tokens:
                return
            connection.execute(
                "INSERT INTO used (account, month, tokens, requests) VALUES (?, ?, ?, 1) ON CONFLICT (account, month) "
                "DO UPDATE SET tokens = tokens + excluded.tokens, requests = requests + 1",
                (reservation.account, reservation.month, tokens),
            )

    def used(self, account: str) -> Used:
        """What an account has used this month."""
        return _used(self._connection(), account, self._month())

    def see(self, key: str) -> None:
        """A key was used now; told to the hour, so that it is written once an hour and says little of who does what."""
        hour = int(self._clock()) // _HOUR_SECONDS
        if self._seen.get(key) == hour:
            return
        self._seen[key] = hour
        connection = self._connection()
        with connection:
            connection.execute(
                "INSERT INTO seen (key, hour) VALUES (?, ?) ON CONFLICT (key) "
                "DO UPDATE SET hour = MAX(hour, excluded.hour)",
                (key, hour),
            )

    def close(self) -> None:
        """This thread asks no more."""
        if hasattr(self._local, "connection"):
            self._local.connection.close()
            del self._local.connection

    def _try(self, account: str, tokens: int, quota_tokens: int | None) -> Reservation | None:
        month, connection = self._month(), self._connection()
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            if quota_tokens is not None:
                found = _used(connection, account, month)
                if found.tokens + found.reserved_tokens + tokens > quota_tokens:
                    return None
            made = connection.execute(
                "INSERT INTO reserved (account, month, tokens, owner) VALUES (?, ?, ?, ?)",
                (account, month, tokens, self._lease.name),
            )
        assert made.lastrowid is not None
        return Reservation(made.lastrowid, account, month, tokens)

    def _give_back_of_the_dead(self) -> int:
        """Drop what processes had reserved that live no more; how many requests that were."""
        connection = self._connection()
        owners = [name for (name,) in connection.execute("SELECT DISTINCT owner FROM reserved")]
        given_back = 0
        for owner in owners:
            if self._lease.is_dead(owner):
                given_back += connection.execute("DELETE FROM reserved WHERE owner = ?", (owner,)).rowcount
        self._lease.sweep()
        return given_back

    def _month(self) -> str:
        return month_of(self._clock())

    def _connection(self) -> sqlite3.Connection:
        """One for each thread; a transaction begins where it is told to."""
        if not hasattr(self._local, "connection"):
            self._local.connection = sqlite3.connect(self._path, timeout=_WAIT_SECONDS, isolation_level=None)
            self._local.connection.execute("PRAGMA synchronous=NORMAL")
        return self._local.connection


class UsageReader:
    """The usage in one file, to be read: nothing in it is touched. Of a file that is not there yet, nothing is used."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock = path, clock

    def used(self, accounts: Sequence[str], month: str | None = None) -> dict[str, Used]:
        """What accounts have used in a month (`2026-11`; None is this one)."""
        month = month or month_of(self._clock())
        with closing(self._open()) as connection:
            return {account: _used(connection, account, month) for account in accounts}

    def months(self, account: str) -> dict[str, Used]:
        """What an account has used in each month, the oldest first."""
        with closing(self._open()) as connection:
            rows = connection.execute(
                "SELECT month FROM used WHERE account = ? UNION "
                "SELECT month FROM reserved WHERE account = ? ORDER BY month",
                (account, account),
            ).fetchall()
            return {month: _used(connection, account, month) for (month,) in rows}

    def seen(self, keys: Sequence[str]) -> dict[str, float]:
        """When keys were last used, in unix seconds, to the hour; keys that never were are left out."""
        with closing(self._open()) as connection:
            found = dict(connection.execute("SELECT key, hour FROM seen").fetchall())
        return {key: float(found[key] * _HOUR_SECONDS) for key in keys if key in found}

    def _open(self) -> sqlite3.Connection:
        if self._path.is_file():
            return sqlite3.connect(f"{self._path.absolute().as_uri()}?mode=ro", uri=True, timeout=_WAIT_SECONDS)
        connection = sqlite3.connect(":memory:")
        connection.executescript(_TABLES)
        return connection


def month_of(seconds: float) -> str:
    """`2026-11` of unix seconds, UTC."""
    return time.strftime("%Y-%m", time.gmtime(seconds))


def _used(connection: sqlite3.Connection, account: str, month: str) -> Used:
    with closing(connection.cursor()) as cursor:
        row = cursor.execute(
            "SELECT tokens, requests FROM used WHERE account = ? AND month = ?", (account, month)
        ).fetchone()
        (reserved,) = cursor.execute(
            "SELECT COALESCE(SUM(tokens), 0) FROM reserved WHERE account = ? AND month = ?", (account, month)
        ).fetchone()
    tokens, requests = row or (0, 0)
    return Used(int(tokens), int(requests), int(reserved))


class _Lease:
    """A file that this process holds a lock on until it ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.name, self._handle = self._take()

    def _take(self) -> tuple[str, int]:
        """(its name, the handle that is kept open: the kernel lets the lock go with the process)."""
        while True:
            name = secrets.token_hex(8)
            handle = os.open(self._folder / name, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(handle, fcntl.LOCK_EX)
            # A sweeper may have come between creation and lock: then the name is gone, and another one is taken.
            with suppress(FileNotFoundError):
                if (self._folder / name).stat().st_ino == os.fstat(handle).st_ino:
                    return name, handle
            os.close(handle)

    def is_dead(self, name: str) -> bool:
        """Whether no process holds the file of that name."""
        if name == self.name:
            return False
        try:
            handle = os.open(self._folder / name, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who look do not take each other for it
        except BlockingIOError:
            return False
        finally:
            os.close(handle)
        return True

    def sweep(self) -> None:
        """Remove the files of those that live no more."""
        for place in self._folder.iterdir():
            if self.is_dead(place.name):
                with suppress(FileNotFoundError):
                    place.unlink()
