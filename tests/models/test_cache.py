"""The cache: what is forgotten leaves no trace, and places do not see each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tenon.batch import NO_SLOT
from tenon.data.pack import PackOptions, bare_row, pack_rows
from tenon.models.cache import KvCache, token_bytes
from tenon.models.decoder import Decoder
from tests.tiny import CPU, tiny_decoder, tiny_facts

IDS = [5, 9, 77, 3, 42, 8, 61]


def small_cache(decoder: Decoder, places: int = 3) -> KvCache:
    return KvCache(decoder.facts, places=places, tokens=16, dtype=decoder.dtype, device=CPU)


def feed(decoder: Decoder, cache: KvCache, taken: dict[int, list[int]]) -> list[torch.Tensor]:
    """One pass that appends tokens to places; the hidden states of each."""
    places = tuple(taken)
    attention = cache.extend(places, tuple(len(ids) for ids in taken.values()))
    (batch,) = pack_rows([bare_row(NO_SLOT, [i for ids in taken.values() for i in ids])], PackOptions(999), CPU)
    with torch.no_grad():
        hidden = decoder.forward(replace(batch, positions_T=attention.positions_T), None, attention)
    attention.commit()
    return list(hidden.split([len(ids) for ids in taken.values()]))


def spoil(cache: KvCache, place: int) -> None:
    """Let all that a place holds be NaN."""
    line = torch.from_numpy(cache.slots(place, 0, cache.lengths[place]))
    cache.keys.flatten(1, 2)[:, line] = float("nan")
    cache.values.flatten(1, 2)[:, line] = float("nan")


def alone(decoder: Decoder, ids: list[int]) -> torch.Tensor:
    (batch,) = pack_rows([bare_row(NO_SLOT, ids)], PackOptions(999), CPU)
    with torch.no_grad():
        return decoder.forward(batch)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [0, 3])
def test_p33_tokens_fed_in_pieces_beside_others_are_those_of_the_row_alone(window: int) -> None:
    decoder = tiny_decoder(tiny_facts(window=window))
    cache, whole = small_cache(decoder), alone(decoder, IDS)
    first = feed(decoder, cache, {1: IDS[:4], 0: [1, 2], 2: IDS[:3]})
    close(first[0], whole[:4])
    second = feed(decoder, cache, {2: IDS[3:4], 1: IDS[4:]})
    close(second[0], whole[3:4])
    close(second[1], whole[4:])
    assert cache.lengths == [2, 7, 4]


def test_p33_nothing_of_a_spoilt_sequence_reaches_the_next_one_of_its_place() -> None:
    """A sequence of NaN is forgotten; the short one that follows attends beside a longer neighbour."""
    decoder = tiny_decoder()
    cache = small_cache(decoder)
    feed(decoder, cache, {0: IDS, 1: IDS})
    spoil(cache, 0)
    cache.clear(0)
    close(feed(decoder, cache, {0: IDS[:2], 1: [4, 6]})[0], alone(decoder, IDS[:2]))
    assert cache.lengths == [2, 9, 0]
    spoil(cache, 1)
    cache.clear(1)
    assert cache.lengths == [2, 0, 0] and bool(cache.values.isfinite().all()) and bool(cache.keys.isfinite().all())


def test_a_place_keeps_its_beginning_and_copies_of_it_begin_others() -> None:
    decoder = tiny_decoder()
    cache, whole = small_cache(decoder), alone(decoder, IDS)
    feed(decoder, cache, {0: [*IDS[:3], 90, 91]})
    cache.clear(0, keep_tokens=3)
    prefix = cache.prefix(0)
    feed(decoder, cache, {2: [7] * 6})
    cache.clear(2)
    cache.restore(2, prefix)
    assert cache.lengths == [3, 0, 3]
    for found in feed(decoder, cache, {0: IDS[3:], 2: IDS[3:]}):
        close(found, whole[3:])
    cache.clear(0, keep_tokens=99)
    assert cache.lengths[0] == 7


@pytest.mark.parametrize("window", [0, 3])
def test_p33_scattered_blocks_are_read_as_those_in_one_piece(window: int) -> None:
    """Places whose homes others have taken, beside places at home, in passes of one and of many tokens."""
    decoder = tiny_decoder(tiny_facts(window=window))
    cache = KvCache(
        decoder.facts,
        places=4,
        tokens=32,
        dtype=decoder.dtype,
        device=CPU,
        budget_bytes=16 * 2 * token_bytes(decoder.facts, decoder.dtype),
        block_tokens=2,
    )
    rows = {place: torch.randint(0, 97, (n,)).tolist() for place, n in enumerate((13, 9, 4, 3))}
    found = {place: [] for place in rows}
    for place, count in ((0, 9), (1, 4), (1, 1), (2, 2), (0, 2)):  # place 0 grows into the home of 1
        at = sum(len(part) for part in found[place])
        found[place] += feed(decoder, cache, {place: rows[place][at : at + count]})
    while any(sum(map(len, found[p])) < len(ids) for p, ids in rows.items()):
        at = {p: sum(map(len, found[p])) for p in rows}
        step = {p: ids[at[p] : at[p] + 1] for p, ids in rows.items() if at[p] < len(ids)}
        for place, hidden in zip(step, feed(decoder, cache, step), strict=True):
            found[place].append(hidden)
    assert {cache.first_block(place) is None for place in rows} == {True, False}
    for place, ids in rows.items():
        close(torch.cat(found[place]), alone(decoder, ids))
        assert cache.lengths[place] == len(ids)
    assert cache.pool.used == 7 + 5 + 2 + 2 == cache.pool.total


def test_a_pool_without_blocks_gives_none_and_changes_nothing() -> None:
    cache = small_cache(tiny_decoder(), places=2)
    assert cache.pool.total == 2 and cache.capacity_tokens == 16
    assert cache.begin(0, 17) == 0
    assert cache.begin(1, 1) is None
    assert not cache.grow(0, 33)
    assert cache.pool.used == 2
    cache.clear(0, keep_tokens=16)
    assert cache.begin(1, 1, spare_blocks=1) is None
    assert cache.begin(1, 1) == 0
