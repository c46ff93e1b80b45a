"""The tests named in docs/promises.md, taken from the suite: `python -m tests.docs.promise_page` writes them anew.

Promises and their sentences are written by hand; a promise that has tests and no row yet is an error.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs" / "promises.md"
_ROW = re.compile(r"(\| \*\*P(\d\d)\*\* [^|]+ \| [^|]+ \|) [^|]* \|")


def suite_by_promise() -> dict[int, dict[str, list[str]]]:
    """promise -> file -> its tests, as the names of the tests say (`test_p14_p35_…` keeps two)."""
    found: dict[int, dict[str, list[str]]] = {}
    for path in sorted((REPOSITORY / "tests").rglob("test_*.py")):
        file = path.relative_to(REPOSITORY).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            numbers = re.match(r"test((?:_p\d\d)+)_", node.name) if isinstance(node, ast.FunctionDef) else None
            if isinstance(node, ast.FunctionDef) and numbers is not None:
                for number in re.findall(r"\d\d", numbers[1]):
                    found.setdefault(int(number), {}).setdefault(file, []).append(node.name)
    return found


def kept(text: str) -> list[int]:
    """The promises that have a row, in order."""
    return [int(row[2]) for line in text.splitlines() if (row := _ROW.fullmatch(line))]


def refreshed(text: str) -> str:
    """The page with the tests of the suite in its last column. Raises ValueError for a promise without a row."""
    suite = suite_by_promise()
    absent = sorted(set(suite) - set(kept(text)))
    if absent:
        raise ValueError(f"{PAGE.name} has no row for P{absent[0]:02}, which has tests: say what is promised")
    return "\n".join(_refreshed_line(line, suite) for line in text.split("\n"))


def _refreshed_line(line: str, suite: dict[int, dict[str, list[str]]]) -> str:
    row = _ROW.fullmatch(line)
    if row is None:
        return line
    files = suite.get(int(row[2]), {})
    named = (f"`{file}`: " + ", ".join(f"`{name}`" for name in names) for file, names in files.items())
    return f"{row[1]} {'<br>'.join(named)} |"


if __name__ == "__main__":
    PAGE.write_text(refreshed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
