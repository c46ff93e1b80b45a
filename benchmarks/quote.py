"""Figures in the documents, taken from the result files: `python -m benchmarks.quote` fills them in, a test holds them.

A quoted figure stands between two comments, which no reader sees:

    <!-- figure NAME :: WHAT :: FORMAT -->TEXT<!-- /figure -->

NAME: a result file. WHAT: a row's `what`, or `device`. FORMAT: a Python format of the value, or `percent` (one
decimal), `minutes` (of seconds), `yes`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.report import REPOSITORY, RESULTS

DOCUMENTS = (
    "README.md",
    "README.zh-CN.md",
    "docs/guide.md",
    "docs/guide.zh-CN.md",
    "docs/benchmarks.md",
    "docs/serving.md",
    "docs/vllm.md",
    "docs/decisions/draws.md",
    "docs/decisions/small-work.md",
)
_QUOTE = re.compile(r"<!-- figure (\S+) :: (.+?) :: (\S+) -->(.*?)<!-- /figure -->", re.DOTALL)


def shown(value: float, form: str) -> str:
    """A value as a document shows it."""
    if form == "percent":
        return f"{100 * value:.1f}%"
    if form == "minutes":
        return f"{value / 60:.1f}"
    if form == "yes":
        return "yes" if value == 1 else "no"
    return format(value, form)


def figure(name: str, what: str, form: str) -> str:
    """One figure of a result file. Raises KeyError naming what is not there."""
    tree = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    if what == "device":
        return str(tree["device"])
    for row in tree["rows"]:
        if row["what"] == what:
            return shown(row["value"], form)
    raise KeyError(f"{name}.json has no row {what!r}")


def quoted(path: Path) -> list[tuple[str, str, str, str]]:
    """(NAME, WHAT, FORMAT, TEXT) of every figure that a document quotes."""
    return _QUOTE.findall(path.read_text("utf-8"))


def fill(path: Path) -> int:
    """Write the figures into a document; returns how many it quotes."""

    def current(match: re.Match[str]) -> str:
        name, what, form, _ = match.groups()
        return f"<!-- figure {name} :: {what} :: {form} -->{figure(name, what, form)}<!-- /figure -->"

    text, count = _QUOTE.subn(current, path.read_text("utf-8"))
    path.write_text(text, "utf-8")
    return count


def main() -> None:
    """Fill all documents."""
    for name in DOCUMENTS:
        if (REPOSITORY / name).is_file():
            print(f"{name}: {fill(REPOSITORY / name)} figures")


if __name__ == "__main__":
    main()
