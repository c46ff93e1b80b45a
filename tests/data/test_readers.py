"""Every kind of file, packed or not, gives the same rows; broken ones are named with file and line."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tenon.data.rows import row_tree
from tenon.errors import DataError
from tenon.settings import Settings
from tests.data.build import read_rows

TREES = [
    {"text": "plain", "label": "a"},
    {"text": 'with, comma and "quotes"', "label": "b"},
    {"text": "two\nlines, 日本 🎉", "label": "a"},
]


def _jsonl(path: Path) -> None:
    path.write_text("\n\n".join(json.dumps(tree) for tree in TREES), encoding="utf-8")


def _json(path: Path) -> None:
    path.write_text(json.dumps(TREES, indent=1), encoding="utf-8")


def _table(delimiter: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with path.open("w", encoding="utf-8", newline="") as out:
            writer = csv.DictWriter(out, ["text", "label"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(TREES)

    return write


def _parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TREES), path)


KINDS: dict[str, Callable[[Path], None]] = {
    "rows.jsonl": _jsonl,
    "rows.json": _json,
    "rows.csv": _table(","),
    "semicolon.csv": _table(";"),
    "rows.tsv": _table("\t"),
    "rows.parquet": _parquet,
}
LINES = {
    "rows.jsonl": [":1", ":3", ":5"],
    "rows.json": [":2", ":6", ":10"],
    "rows.csv": [":2", ":3", ":4"],
    "semicolon.csv": [":2", ":3", ":4"],
    "rows.tsv": [":2", ":3", ":4"],
    "rows.parquet": ["#1", "#2", "#3"],
}


@pytest.mark.parametrize("name", KINDS)
def test_all_kinds_give_the_same_rows_with_their_places(name: str, tmp_path: Path, settings: Settings) -> None:
    KINDS[name](tmp_path / name)
    rows = read_rows(tmp_path / name, settings)
    assert [row_tree(row)["messages"][0]["content"] for row in rows] == [tree["text"] for tree in TREES]
    assert [row.source for row in rows] == [str(tmp_path / name) + place for place in LINES[name]]


def _zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, codec="zstd", asbytes=True)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": _zstd,
}


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_packed_files_are_read_as_if_they_were_not(name: str, suffix: str, tmp_path: Path, settings: Settings) -> None:
    KINDS[name](tmp_path / name)
    packed = tmp_path / (name + suffix)
    packed.write_bytes(PACKERS[suffix]((tmp_path / name).read_bytes()))
    plain, unpacked = read_rows(tmp_path / name, settings), read_rows(packed, settings)
    assert [row_tree(row) for row in unpacked] == [row_tree(row) for row in plain]
    assert [row.source for row in unpacked] == [f"{packed}{place}" for place in LINES[name]]


def test_text_is_a_row_a_line(tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\n  \ntwo\x0bstill two\n")
    rows = read_rows(tmp_path / "a.txt", settings)
    assert [(row_tree(row)["text"], row.source[-2:]) for row in rows] == [("one", ":1"), ("two\x0bstill two", ":4")]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_a_byte_order_mark_is_accepted(name: str, tmp_path: Path, settings: Settings) -> None:
    KINDS[name](tmp_path / name)
    marked = tmp_path / f"marked-{name}"
    marked.write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    assert [row_tree(row) for row in read_rows(marked, settings)] == [
        row_tree(row) for row in read_rows(tmp_path / name, settings)
    ]


def test_a_suffix_may_mistake_an_array_for_lines_and_the_reverse(tmp_path: Path, settings: Settings) -> None:
    _json(tmp_path / "array.jsonl")
    _jsonl(tmp_path / "lines.json")
    assert len(read_rows(tmp_path / "array.jsonl", settings)) == len(read_rows(tmp_path / "lines.json", settings)) == 3


def test_windows_line_ends_and_long_fields_are_ordinary(tmp_path: Path, settings: Settings) -> None:
    long = "x" * 300_000
    (tmp_path / "a.csv").write_bytes(f'text,label\r\n{long},a\r\n"b\r\nc",d\r\n'.encode())
    rows = read_rows(tmp_path / "a.csv", settings)
    assert [row_tree(row)["messages"][0]["content"] for row in rows] == [long, "b\r\nc"]
    assert [row.source[-2:] for row in rows] == [":2", ":3"]
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\r\n{"text": "b"}\r\n')
    assert [row_tree(row) for row in read_rows(tmp_path / "a.jsonl", settings)] == [{"text": "a"}, {"text": "b"}]


def test_parquet_with_nested_messages_and_nothing_in_some_fields(tmp_path: Path, settings: Settings) -> None:
    trees: list[dict[str, Any]] = [
        {
            "messages": [
                {"role": "user", "content": "a", "name": None},
                {"role": "assistant", "content": "b", "name": "x"},
            ]
        }
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(trees), tmp_path / "a.parquet")
    (row,) = read_rows(tmp_path / "a.parquet", settings)
    assert row_tree(row)["messages"] == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "name": "x"},
    ]


BROKEN: dict[str, tuple[bytes, str, str]] = {
    "empty.jsonl": (b"", "data-file-empty", "empty.jsonl: "),
    "blank.jsonl": (b"\n \n\n", "data-file-empty", "blank.jsonl: "),
    "bom.jsonl": (b"\xef\xbb\xbf", "data-file-empty", "bom.jsonl: "),
    "empty.json": (b"[]", "data-file-empty", "empty.json: "),
    "empty.csv": (b"", "data-file-empty", "empty.csv: "),
    "header.csv": (b"text,label\n", "data-file-empty", "header.csv: "),
    "empty.txt": (b"\n\n", "data-file-empty", "empty.txt: "),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "caf\xe9"}\n', "data-encoding", "latin.jsonl:2: "),
    "latin.json": (b'[{"text": "a"},\n{"text": "caf\xe9"}]\n', "data-encoding", "latin.json:2: "),
    "latin.csv": (b"text,label\na,b\ncaf\xe9,b\n", "data-encoding", "latin.csv:3: "),
    "latin.txt": (b"a\ncaf\xe9\n", "data-encoding", "latin.txt:2: "),
    "utf16.csv": ("text,label\na,b\n".encode("utf-16"), "data-encoding", "utf16.csv:1: "),
    "cut.json": (b'[{"text": "a"},\n{"text": "b"', "data-json-broken", "cut.json:2: "),
    "pretty.jsonl": (b'{\n "text": "a"\n}\n', "data-json-broken", "pretty.jsonl:1: "),
    "values.jsonl": (b"1\n2\n", "data-row-shape", "values.jsonl:1: "),
    "quote.csv": (b'text,label\na,b\n"c,d\n', "data-csv-broken", "quote.csv:3: "),
    "twice.csv": (b"text,text\na,b\n", "data-csv-header", "twice.csv:1: "),
    "nameless.csv": (b"text,\na,b\n", "data-csv-header", "nameless.csv:1: "),
    "ragged.csv": (b"text,label\na\n", "data-csv-ragged", "ragged.csv:2: "),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 99)[:-9], "data-packed-broken", "cut.jsonl.gz: "),
    "not.jsonl.gz": (b"plain", "data-packed-broken", "not.jsonl.gz: "),
    "not.jsonl.bz2": (b"plain", "data-packed-broken", "not.jsonl.bz2: "),
    "not.jsonl.xz": (b"plain", "data-packed-broken", "not.jsonl.xz: "),
    "not.jsonl.zst": (b"plain", "data-packed-broken", "not.jsonl.zst: "),
    "not.parquet": (b"plain", "data-parquet-broken", "not.parquet: "),
    "empty.parquet": (b"", "data-parquet-broken", "empty.parquet: "),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_with_its_line(name: str, tmp_path: Path, settings: Settings) -> None:
    data, code, place = BROKEN[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_rows(tmp_path / name, settings)
    assert caught.value.code == code
    assert caught.value.what.startswith(str(tmp_path / place))
    assert caught.value.hint
    leftovers = [path for path in settings.cache.rglob("*") if ".part" in path.name]
    assert leftovers == []
