"""docs/promises.md and the suite name the same tests, promise by promise."""

from __future__ import annotations

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PROMISES = 36


def written() -> dict[int, set[tuple[str, str]]]:
    """promise -> (file, test) as the page says."""
    found: dict[int, set[tuple[str, str]]] = {}
    for line in (REPOSITORY / "docs" / "promises.md").read_text(encoding="utf-8").splitlines():
        row = re.match(r"\| \*\*P(\d\d)\*\* [^|]+ \| [^|]+ \| ([^|]+) \|$", line)
        if row is None:
            continue
        for part in row[2].split("<br>"):
            file, *names = re.findall(r"`([^`]+)`", part)
            found.setdefault(int(row[1]), set()).update((file, name) for name in names)
    return found


def in_the_suite() -> dict[int, set[tuple[str, str]]]:
    """promise -> (file, test) as the names of the tests say."""
    found: dict[int, set[tuple[str, str]]] = {}
    for path in sorted((REPOSITORY / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            numbers = isinstance(node, ast.FunctionDef) and re.match(r"test((?:_p\d\d)+)_", node.name)
            if isinstance(node, ast.FunctionDef) and numbers:
                for number in re.findall(r"\d\d", numbers[1]):
                    file = path.relative_to(REPOSITORY).as_posix()
                    found.setdefault(int(number), set()).add((file, node.name))
    return found


def test_every_test_of_a_promise_is_listed_and_every_listed_test_exists() -> None:
    page, suite = written(), in_the_suite()
    missing = [f"P{n:02} {f}::{t}" for n, tests in suite.items() for f, t in sorted(tests - page.get(n, set()))]
    gone = [f"P{n:02} {f}::{t}" for n, tests in page.items() for f, t in sorted(tests - suite.get(n, set()))]
    assert not missing, "docs/promises.md lacks: " + ", ".join(missing)
    assert not gone, "docs/promises.md names tests that do not exist: " + ", ".join(gone)
    assert sum(map(len, suite.values())) >= 170


def test_every_promise_is_either_kept_or_said_not_to_be() -> None:
    text = (REPOSITORY / "docs" / "promises.md").read_text(encoding="utf-8")
    said = re.search(r"Not claimed yet: ([P\d, ]+)\.", text)
    assert said is not None
    not_claimed = {int(number) for number in re.findall(r"\d\d", said[1])}
    assert not not_claimed & set(written())
    assert not_claimed | set(written()) == set(range(1, PROMISES + 1))
