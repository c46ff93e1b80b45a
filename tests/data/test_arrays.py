"""Cutting JSON arrays into elements, whatever the chunks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenon.data.arrays import ArrayScanner, Element
from tenon.errors import DataError

_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def _cut(data: bytes, size: int) -> list[Element]:
    scanner = ArrayScanner("rows.json")
    found: list[Element] = []
    for start in range(0, len(data), size):
        found += scanner.feed(data[start : start + size])
    return [*found, *scanner.finish()]


@given(
    st.lists(st.dictionaries(st.text(max_size=4), _values, max_size=4), max_size=5), st.integers(1, 40), st.booleans()
)
def test_elements_do_not_depend_on_where_chunks_end(rows: list[dict[str, object]], size: int, pretty: bool) -> None:
    text = json.dumps(rows, indent=2 if pretty else None, ensure_ascii=False)
    found = _cut(text.encode(), size)
    assert [json.loads(element.raw) for element in found] == rows
    lines = text.encode().split(b"\n")
    for element in found:
        assert element.raw.split(b"\n")[0] in lines[element.line - 1]


def test_lines_and_slips_between_elements_are_told() -> None:
    data = b'[\n{"a": "]"},\n 5,\n{"b": [1, {"c": "\\"}"}]}\n] junk'
    for size in (1, 2, 1000):
        assert _cut(data, size) == [
            Element(2, b'{"a": "]"}'),
            Element(3, b"5"),
            Element(4, b'{"b": [1, {"c": "\\"}"}]}'),
            Element(5, b"junk"),
        ]


@pytest.mark.parametrize("data", [b'[{"a": 1}', b'[{"a": "x}]', b'[{"a": 1}, {"b": [1}', b"["])
def test_an_array_that_is_cut_off_is_refused(data: bytes) -> None:
    with pytest.raises(DataError) as caught:
        _cut(data, 3)
    assert caught.value.code == "data-json-broken"


def test_real_files_cut_as_they_parse(shared_data: Path) -> None:
    files = sorted((shared_data / "demos").glob("*.json"))
    assert len(files) == 6
    for file in files:
        data = file.read_bytes()
        assert [json.loads(element.raw) for element in _cut(data, 50_000)] == json.loads(data)
