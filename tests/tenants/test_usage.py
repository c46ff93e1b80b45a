"""Quotas are exact however many ask at once; what a killed server had reserved comes back."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenon.tenants.rates import Bucket
from tenon.tenants.usage import UsageBook, UsageReader, Used
from tests.conftest import REPOSITORY

ASKS = """
import sys
import threading
from pathlib import Path
from tenon.tenants.usage import UsageBook

book, taken, lock = UsageBook(Path(sys.argv[1])), [0], threading.Lock()


def ask():
    for _ in range(4):
        reservation = book.reserve("k", 10, 500)
        assert book.used("k").tokens + book.used("k").reserved_tokens <= 500
        if reservation is not None:
            book.settle(reservation, 7)
            with lock:
                taken[0] += 7
    book.close()


threads = [threading.Thread(target=ask) for _ in range(int(sys.argv[2]))]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(taken[0])
"""
HOLDS = """
import sys, time
from pathlib import Path
from tenon.tenants.usage import UsageBook

book = UsageBook(Path(sys.argv[1]))
assert book.reserve("k", 60, 100) is not None
print("holds", flush=True)
time.sleep(60)
"""


def test_what_is_reserved_counts_until_it_is_settled(tmp_path: Path) -> None:
    book = UsageBook(tmp_path / "usage.db")
    one = book.reserve("k", 60, 100)
    assert one is not None and book.reserve("k", 41, 100) is None
    assert book.used("k") == Used(0, 0, 60) and book.reserve("other", 100, 100) is not None
    book.settle(one, 20)
    book.settle(one, 20)
    assert book.used("k") == Used(20, 1, 0), "settled once"
    assert book.reserve("k", 80, 100) is not None and book.reserve("k", 1, 100) is None
    with pytest.raises(ValueError, match="61 tokens of 60"):
        book.settle(one, 61)
    assert book.reserve("free", 10**9, None) is not None


def test_a_month_begins_anew_and_a_request_counts_for_the_month_it_began_in(tmp_path: Path) -> None:
    now = [1_796_000_000.0]  # 2026-11-29
    book = UsageBook(tmp_path / "usage.db", clock=lambda: now[0])
    late = book.reserve("k", 100, 100)
    assert late is not None and book.reserve("k", 1, 100) is None
    now[0] += 4 * 86_400
    assert book.reserve("k", 100, 100) is not None
    book.settle(late, 100)
    assert book.used("k") == Used(0, 0, 100)


def test_threads_never_pass_a_quota(tmp_path: Path) -> None:
    book, taken, lock = UsageBook(tmp_path / "usage.db"), [0], threading.Lock()

    def ask() -> None:
        for _ in range(25):
            reservation = book.reserve("k", 10, 1000)
            if reservation is not None:
                book.settle(reservation, 9)
                with lock:
                    taken[0] += 9
        book.close()

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    used = book.used("k")
    assert used.tokens == taken[0] and 1000 - 10 < used.tokens <= 1000 and used.reserved_tokens == 0


def test_processes_of_many_threads_never_pass_a_quota(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    asking = [
        subprocess.Popen(
            [sys.executable, "-c", ASKS, str(path), "50"], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    taken = [int(process.communicate()[0]) for process in asking]
    assert [process.returncode for process in asking] == [0] * 4
    used = UsageBook(path).used("k")
    assert used.tokens == sum(taken) and 490 < used.tokens <= 500 and used.reserved_tokens == 0


def test_what_a_killed_server_had_reserved_is_given_back_when_it_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    other = UsageBook(path)
    held = other.reserve("k", 40, 100)
    assert held is not None
    killed = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(path)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert killed.stdout is not None and killed.stdout.readline() == "holds\n"
    assert other.reserve("k", 1, 100) is None, "a living server's reservation counts"
    killed.kill()
    killed.wait()
    assert other.reserve("k", 60, 100) is not None, "without a restart"
    assert other.reserve("k", 1, 100) is None
    again = UsageBook(path)
    assert again.used("k").reserved_tokens == 100, "those of a living server are still there"
    other.settle(held, 40)
    assert again.used("k").tokens == 40


def test_a_reader_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    assert UsageReader(path).used(["k"]) == {"k": Used()} and not path.exists(), "it makes no file"
    now = [1_796_000_000.0]  # 2026-11-29
    book = UsageBook(path, clock=lambda: now[0])
    first = book.reserve("k", 10, None)
    assert first is not None
    book.settle(first, 7)
    now[0] += 4 * 86_400
    assert book.reserve("k", 60, None) is not None
    book.see("id")
    owners = sorted((tmp_path / "usage.db-owners").iterdir())
    reader = UsageReader(path, clock=lambda: now[0])
    assert reader.used(["k"]) == {"k": Used(0, 0, 60)}
    assert reader.months("k") == {"2026-11": Used(7, 1, 0), "2026-12": Used(0, 0, 60)} and reader.months("x") == {}
    assert reader.seen(["id", "other"]) == {"id": now[0] // 3600 * 3600}
    assert sorted((tmp_path / "usage.db-owners").iterdir()) == owners
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        reader._open().execute("DELETE FROM reserved")  # pyright: ignore[reportPrivateUsage]


def test_when_a_key_was_used_is_told_to_the_hour_and_never_goes_back(tmp_path: Path) -> None:
    now = [7200.0 * 500]
    book = UsageBook(tmp_path / "usage.db", clock=lambda: now[0])
    late = UsageBook(tmp_path / "usage.db", clock=lambda: 3600.0)
    for pause in (0.0, 1800.0, 1799.0):
        now[0] += pause
        book.see("id")
        late.see("id")
        assert UsageReader(tmp_path / "usage.db").seen(["id"]) == {"id": 7200.0 * 500}
    now[0] += 1.0
    book.see("id")
    assert UsageReader(tmp_path / "usage.db").seen(["id"]) == {"id": 7200.0 * 500 + 3600}


@settings(max_examples=200, deadline=None)
@given(
    per_minute=st.integers(1, 600),
    asks=st.lists(st.tuples(st.floats(0.0, 30.0), st.integers(1, 700)), min_size=1, max_size=40),
)
def test_a_bucket_never_gives_more_than_its_rate_and_one_minute(per_minute: int, asks: list[tuple[float, int]]) -> None:
    now = [0.0]
    bucket, given_tokens = Bucket(per_minute, clock=lambda: now[0]), 0
    for pause, count in asks:
        now[0] += pause
        wait = bucket.take(count)
        if wait:
            now[0] += wait * (1 + 1e-9) + 1e-9
            assert bucket.take(count) == 0.0, "after the wait that it said there is enough"
        given_tokens += min(count, per_minute)
        assert given_tokens <= per_minute * (1 + now[0] / 60) * (1 + 1e-6) + 1e-6


def test_what_was_taken_too_much_is_put_back() -> None:
    now = [0.0]
    bucket = Bucket(60, clock=lambda: now[0])
    assert bucket.take(60) == 0.0 and bucket.take(1) == pytest.approx(1.0)
    bucket.put_back(10)
    assert bucket.take(10) == 0.0 and bucket.take(1) > 0.0
    now[0] = 3600.0
    bucket.put_back(10**6)
    assert bucket.take(60) == 0.0 and bucket.take(1) > 0.0, "it holds no more than a minute's worth"
