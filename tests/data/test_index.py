"""The index: offsets, hashes, labels and bad rows; the same in one process and in several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tenon.data.convert import make_converter
from tenon.data.formats import Format
from tenon.data.index import ARRAYS, RowReader, load_table
from tenon.data.rows import row_hash
from tenon.data.scan import ScanTask
from tenon.errors import DataError
from tenon.settings import Settings
from tests.data.build import chat, chats, index, write_jsonl

TEXT = Format("text", "", {"text": "text"})


def test_rows_lines_hashes_and_labels(tmp_path: Path, settings: Settings) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x", "label": "b"}\n\n{"text": "y", "label": "a"}\n{"label": "b", "text": "x"}')
    indexed = index(path, settings)
    table = load_table(indexed)
    assert table.lines.tolist() == [1, 3, 4]
    assert table.labels == ("b", "a")
    assert table.label_ids.tolist() == [0, 1, 0]
    assert table.hashes[0] == table.hashes[2] != table.hashes[1]
    reader = RowReader(indexed)
    assert [int.from_bytes(row_hash(reader.row(n)), "little") for n in range(3)] == table.hashes.tolist()
    reader.close()


def test_bad_rows_are_counted_by_code_with_their_places(tmp_path: Path, settings: Settings) -> None:
    path = tmp_path / "a.jsonl"
    good = json.dumps(chat("a", "b"))
    alone = json.dumps({"messages": [{"role": "user", "content": "a"}]})
    path.write_text("\n".join([good, "{broken", alone, good, "[1]", alone]) + "\n")
    table = load_table(index(path, settings))
    assert table.lines.tolist() == [1, 4]
    assert [(bad.line, bad.code) for bad in table.bad] == [
        (2, "data-json-broken"),
        (3, "data-no-assistant"),
        (5, "data-row-shape"),
        (6, "data-no-assistant"),
    ]
    assert table.bad_counts == {"data-json-broken": 1, "data-no-assistant": 2, "data-row-shape": 1}


@hypothesis_settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.lists(
        st.sampled_from([b'{"text": "a"}', b'{"text": "bcdef"}', b"", b"  ", b"{bad", b'{"text": ""}']), max_size=12
    ),
    st.integers(1, 60),
    st.booleans(),
    st.booleans(),
)
def test_ranges_join_to_one_scan(tmp_path: Path, lines: list[bytes], size: int, ended: bool, marked: bool) -> None:
    first = 3 if marked else 0
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" * marked + b"\n".join(lines) + b"\n" * ended)
    end = path.stat().st_size
    whole = ScanTask(path, first, end, first, TEXT).run({})
    parts = [ScanTask(path, at, min(at + size, end), first, TEXT).run({}) for at in range(first, end, size)]
    assert np.concatenate([np.zeros(0, np.int64), *(p.offsets for p in parts)]).tolist() == whole.offsets.tolist()
    bases = np.cumsum([0, *(part.line_count for part in parts)])
    numbers = [line + base for part, base in zip(parts, bases, strict=False) for line in part.lines.tolist()]
    assert numbers == whole.lines.tolist()
    bad = [(each.line + base, each.code) for part, base in zip(parts, bases, strict=False) for each in part.bad]
    assert bad == [(each.line, each.code) for each in whole.bad]
    data = path.read_bytes()
    for offset, length in zip(whole.offsets, whole.sizes, strict=True):
        assert make_converter(TEXT)(json.loads(data[offset : offset + length]), "")


def test_several_processes_find_what_one_finds(tmp_path: Path, settings: Settings) -> None:
    trees: list[Any] = [{"text": f"row {number}", "label": f"l{number % 7}"} for number in range(3000)]
    trees[1234] = {"text": ""}
    path = write_jsonl(tmp_path / "rows.jsonl", trees)
    alone = index(path, settings)
    other = Settings(home=tmp_path / "h2", cache=tmp_path / "c2", offline=True, threads=1, debug=False)
    together = index(path, other, workers=2, range_bytes=20_000)
    assert together.key == alone.key
    one, two = load_table(alone), load_table(together)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    assert (one.labels, one.bad, one.bad_counts) == (two.labels, two.bad, two.bad_counts)


def test_the_index_is_made_once_for_the_same_content(tmp_path: Path, settings: Settings) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", chats(5))
    first = index(path, settings)
    stamp = (first.folder / "offsets.npy").stat().st_mtime_ns
    copy = write_jsonl(tmp_path / "deep" / "b.jsonl", chats(5))
    again = index(copy, settings)
    assert again.folder == first.folder
    assert (again.folder / "offsets.npy").stat().st_mtime_ns == stamp
    assert RowReader(again).row(4).source == f"{copy}:5"
    assert index(write_jsonl(path, chats(6)), settings).folder != first.folder


def test_how_rows_are_read_is_part_of_the_key(tmp_path: Path, settings: Settings) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "label": "y", "other": "z"}])
    keys = {
        index(path, settings).key,
        index(path, settings, asked="text").key,
        index(path, settings, prompt="say {text}").key,
        index(path, settings, columns={"text": "other"}).key,
    }
    assert len(keys) == 4
    assert index(path, settings, asked="text", prompt="say {text}").key == index(path, settings, asked="text").key


def test_a_file_that_changes_during_use_is_noticed(tmp_path: Path, settings: Settings) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", chats(5))
    reader = RowReader(index(path, settings))
    assert reader.row(3)
    with path.open("r+b") as out:
        out.seek(int(reader.table.offsets[3]) + 45)
        out.write(b"?")
    with pytest.raises(DataError) as caught:
        reader.row(3)
    assert caught.value.code == "data-file-changed"
    assert caught.value.what.startswith(f"{path}:4: ")
    reader.close()
