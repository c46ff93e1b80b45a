"""docs/promises.md and the suite name the same tests, promise by promise."""

from __future__ import annotations

import re

from tests.docs.promise_page import PAGE, kept, refreshed, suite_by_promise

PROMISES = 36


def test_the_page_names_every_test_of_a_promise_and_no_other() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == refreshed(text), "run: python -m tests.docs.promise_page"
    assert sum(len(names) for files in suite_by_promise().values() for names in files.values()) >= 170


def test_every_promise_is_either_kept_by_a_test_or_said_not_to_be() -> None:
    text = PAGE.read_text(encoding="utf-8")
    said = re.search(r"Not claimed yet: ([P\d, ]+)\.", text)
    assert said is not None
    not_claimed = [int(number) for number in re.findall(r"\d\d", said[1])]
    assert set(kept(text)) == set(suite_by_promise())
    assert kept(text) == sorted(kept(text))
    assert sorted(not_claimed + kept(text)) == list(range(1, PROMISES + 1))
