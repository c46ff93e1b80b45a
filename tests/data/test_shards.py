"""Shards: what is written comes back; what is damaged is noticed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tenon.data.shards import (
    NOTHING,
    Fault,
    ShardDamagedError,
    Tokenised,
    make_words,
    open_shard,
    word_flags,
    word_ids,
    write_shard,
)

_tokens = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), max_size=20)
_fault = Tokenised(NOTHING, 0, 0, Fault("data-template-failed", "raised “x”", "roles user", "change it"))


def _words(tokens: list[tuple[int, bool]], limit: int) -> Tokenised:
    return make_words([token for token, _ in tokens], [flag for _, flag in tokens], limit)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.one_of(_tokens, st.none()), max_size=8), st.integers(1, 25))
def test_rows_come_back(tmp_path: Path, rows: list[list[tuple[int, bool]] | None], limit: int) -> None:
    made = [_fault if tokens is None else _words(tokens, limit) for tokens in rows]
    write_shard(tmp_path / "0.tokens", made)
    shard = open_shard(tmp_path / "0.tokens")
    for index, tokens in enumerate(rows):
        row = shard.row(index)
        if tokens is None:
            assert row.fault == _fault.fault
            continue
        cut = tokens[:limit]
        assert word_ids(row.words).tolist() == [token for token, _ in cut]
        assert word_flags(row.words).tolist() == [flag for _, flag in cut]
        assert (row.full_tokens, row.supervised_tokens) == (len(tokens), sum(flag for _, flag in cut))
        assert (word_ids(row.words).dtype, word_flags(row.words).dtype) == (np.int32, np.bool_)
    assert [path.name for path in tmp_path.iterdir()] == ["0.tokens"]


def test_any_damaged_byte_and_any_cut_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "0.tokens"
    write_shard(path, [_words([(5, True), (6, False)], 9), _fault])
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :])
        with pytest.raises(ShardDamagedError):
            open_shard(path)
        path.write_bytes(whole[:place])
        with pytest.raises(ShardDamagedError):
            open_shard(path)
    path.write_bytes(whole)
    assert open_shard(path).row(0).full_tokens == 2
