"""Rows: canonical form, hashes, pickling."""

from __future__ import annotations

import pickle
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tenon.data.rows import HASH_BYTES, Chat, Completion, Row, Text, row_from_tree, row_hash, row_tree

_text = st.text(max_size=20)
_message = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": _text})
_rows: st.SearchStrategy[Row] = st.one_of(
    st.builds(Text, _text, st.just("f:1")),
    st.builds(Completion, _text, _text, st.just("f:1")),
    st.builds(
        Chat,
        st.lists(_message, min_size=1, max_size=4).map(tuple),
        st.one_of(st.none(), st.just(({"type": "function", "function": {"name": "f"}},))),
        st.just("f:1"),
        st.one_of(st.none(), _text),
        st.lists(st.integers(0, 3), max_size=2).map(tuple),
    ),
)


@given(_rows)
def test_rows_come_back_from_their_tree_and_pickle(row: Row) -> None:
    assert row_from_tree(row_tree(row), "f:1") == row
    assert pickle.loads(pickle.dumps(row)) == row


@given(_rows, _rows)
def test_equal_hashes_mean_equal_contents(one: Row, two: Row) -> None:
    assert (row_hash(one) == row_hash(two)) == (row_tree(one) == row_tree(two))


def test_the_hash_knows_nothing_of_the_source() -> None:
    row = Text("x", "a:1")
    assert row_hash(row) == row_hash(replace(row, source="b:9"))
    assert len(row_hash(row)) == HASH_BYTES
