"""Small data files and plans for the tests of sources, stores and data sets."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tenon.data.index import RANGE_BYTES, IndexedFile, RowReader, index_file, sample_format
from tenon.data.rows import Row
from tenon.data.sources import find_files
from tenon.data.spool import open_rows
from tenon.plan.values import DataPlan, SourcePlan
from tenon.settings import Settings


def chat(question: str, answer: str) -> dict[str, Any]:
    """A row in OpenAI's form."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def chats(count: int, *, words: str = "what is") -> list[dict[str, Any]]:
    """Different rows of different lengths."""
    return [
        chat(f"{words} {number} " + "and more " * (number % 7), f"it is {number * number}") for number in range(count)
    ]


def write_jsonl(path: Path, trees: Iterable[Any]) -> Path:
    """One JSON value per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(tree, ensure_ascii=False) + "\n" for tree in trees), encoding="utf-8")
    return path


def data_plan(*train: Path | str | SourcePlan, **changes: Any) -> DataPlan:
    """A plan over these sources with strict policies."""
    tree: dict[str, Any] = {
        "train": tuple(each if isinstance(each, SourcePlan) else SourcePlan(path=str(each)) for each in train),
        "max_tokens": 256,
        "on_long": "stop",
        "on_bad": "stop",
        "on_duplicate": "keep",
        "supervise": "assistant",
    }
    return DataPlan(**{**tree, **changes})


def index(
    path: Path | str,
    settings: Settings,
    *,
    asked: str = "auto",
    columns: dict[str, str] | None = None,
    prompt: str = "{text}",
    workers: int = 1,
    range_bytes: int = RANGE_BYTES,
) -> IndexedFile:
    """Index one file as a data set would."""
    rows = open_rows(find_files(str(path), settings)[0], settings)
    form = sample_format(rows, asked=asked, columns=columns or {}, prompt=prompt)
    return index_file(rows, form, settings, workers=workers, range_bytes=range_bytes)


def read_rows(path: Path | str, settings: Settings, **how: Any) -> list[Row]:
    """All rows of one file."""
    reader = RowReader(index(path, settings, **how))
    try:
        return [reader.row(number) for number in range(len(reader))]
    finally:
        reader.close()
