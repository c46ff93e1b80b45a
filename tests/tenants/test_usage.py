"""Quotas are exact however many ask at once; what a killed server had reserved comes back."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenon.tenants.rates import Bucket
from tenon.tenants.usage import UsageBook, Used
from tests.conftest import REPOSITORY

ASKS = """
import sys
from pathlib import Path
from tenon.tenants.usage import UsageBook

book, taken = UsageBook(Path(sys.argv[1]), sys.argv[2]), 0
for _ in range(60):
    reservation = book.reserve("k", 10, 500)
    if reservation is not None:
        book.settle(reservation, 7)
        taken += 7
print(taken)
"""


def test_what_is_reserved_counts_until_it_is_settled(tmp_path: Path) -> None:
    book = UsageBook(tmp_path / "usage.db", "a")
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
    book = UsageBook(tmp_path / "usage.db", "a", clock=lambda: now[0])
    late = book.reserve("k", 100, 100)
    assert late is not None and book.reserve("k", 1, 100) is None
    now[0] += 4 * 86_400
    assert book.reserve("k", 100, 100) is not None
    book.settle(late, 100)
    assert book.used("k") == Used(0, 0, 100)


def test_threads_never_pass_a_quota(tmp_path: Path) -> None:
    book, taken, lock = UsageBook(tmp_path / "usage.db", "a"), [0], threading.Lock()

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


def test_processes_never_pass_a_quota(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    asking = [
        subprocess.Popen(
            [sys.executable, "-c", ASKS, str(path), name], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
        )
        for name in ("a", "b")
    ]
    taken = [int(process.communicate()[0]) for process in asking]
    used = UsageBook(path, "c").used("k").tokens
    assert used == sum(taken) and 490 < used <= 500


def test_what_a_killed_server_had_reserved_comes_back_when_it_starts_again(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    killed, other = UsageBook(path, "a"), UsageBook(path, "b")
    assert killed.reserve("k", 60, 100) is not None and other.reserve("k", 40, 100) is not None
    again = UsageBook(path, "a")
    assert again.used("k").reserved_tokens == 40, "the other server's is still there"
    assert again.reserve("k", 60, 100) is not None


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
