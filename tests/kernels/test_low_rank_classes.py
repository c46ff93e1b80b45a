"""Classes of rank: every token is in exactly one, each slot's chunks stay together, and nothing is made twice."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from tenon.batch import NO_SLOT, Segment
from tenon.data.pack import list_routes, slot_routes
from tenon.kernels.low_rank import LoraGroup, LoraMember, LoraPart, LowRank, Routes
from tenon.kernels.low_rank_classes import classes, rank_classes
from tests.tiny import CPU

RANKS = {0: 8, 1: 64, 2: 24, 3: 16, 4: 40}


def routes_of(segments: list[Segment]) -> Routes:
    listed = list_routes(tuple(segments), 64)
    found = slot_routes([torch.from_numpy(array) for array in listed], listed)
    return Routes(found.tiles_N3, found.chunks_C3, found.segments_M3, found.whole, None, found.listed)


def group_of(rank: int) -> LoraGroup:
    members = [
        LoraMember(torch.zeros(4, rank), None, 4 * i, 4 * i + 4, i * rank, (i + 1) * rank, 1.0, i) for i in (0, 1)
    ]
    return LoraGroup(torch.zeros(2 * rank, 4), None, tuple(members))


def some_segments(lengths: dict[int, int]) -> list[Segment]:
    segments, at = [], 0
    for slot, length in lengths.items():
        segments.append(Segment(slot, at, at + length))
        at += length
    return segments


def low_of(segments: list[Segment], routes: Routes | None) -> LowRank:
    parts = tuple(LoraPart(group_of(RANKS[s.slot]), s.start, s.stop) for s in segments if s.slot >= 0)
    rank = max(RANKS[s.slot] for s in segments if s.slot >= 0)
    return LowRank(parts, (0, 4, 8), 2 * rank, rank, routes, torch.zeros(5, 21, dtype=torch.int64))


@given(lengths=st.dictionaries(st.sampled_from([NO_SLOT, *RANKS]), st.integers(1, 3000), min_size=1))
def test_every_token_is_in_one_class_with_the_slots_of_its_rank(lengths: dict[int, int]) -> None:
    if set(lengths) == {NO_SLOT}:
        return
    segments = some_segments(lengths)
    whole = low_of(segments, routes_of(segments))
    found = classes(whole, stacked=False)
    sizes = [16 if part.rank <= 16 else 32 if part.rank <= 32 else 64 for part in found]
    assert sizes == sorted(set(sizes)) and sum(len(part.parts) for part in found) == len(whole.parts)
    seen = torch.zeros(sum(lengths.values()), dtype=torch.int64)
    for index, part in enumerate(found):
        routes = part.routes
        assert routes is not None
        own = {int(slot) for slot in routes.tiles_N3[:, 0]} - {NO_SLOT}
        assert own == {s.slot for s in segments for p in part.parts if p.start == s.start}
        assert part.rank == max(RANKS[slot] for slot in own) and part.width == 2 * part.rank
        assert index == 0 or NO_SLOT not in routes.tiles_N3[:, 0].tolist()
        for _, start, stop in routes.tiles_N3.tolist():
            seen[start:stop] += 1
        for slot, first, last in routes.segments_M3.tolist():
            assert {row[0] for row in routes.chunks_C3[first:last].tolist()} == {slot}
            (mine,) = (s for s in segments if s.slot == slot)
            assert routes.chunks_C3[first, 1] == mine.start and routes.chunks_C3[last - 1, 2] == mine.stop
        assert routes.whole == all(last - first == 1 for _, first, last in routes.segments_M3.tolist())
    assert bool((seen == 1).all())


def test_classes_are_made_once_for_all_layers() -> None:
    segments = some_segments({2: 100, 0: 70, NO_SLOT: 5})
    routes = routes_of(segments)
    first, second = (classes(low_of(segments, routes), stacked=False) for _ in range(2))
    assert len(first) == 2 and all(a.routes is b.routes for a, b in zip(first, second, strict=True))
    assert len(rank_classes(routes, {0: (16, 16), 2: (16, 16)})) == 1
    assert len(rank_classes(routes, {0: (16, 16), 2: (16, 32)})) == 2


def test_all_at_once_where_tokens_are_few_or_ranks_alike() -> None:
    segments = some_segments({2: 100, 0: 70})
    routes = routes_of(segments)
    few = low_of(segments, replace(routes, listed=None))
    assert classes(few, stacked=True) == (few,)
    plain = low_of(segments, None)
    assert classes(plain, stacked=True) == (plain,)
    alike = low_of(some_segments({0: 9, 3: 9}), routes_of(some_segments({0: 9, 3: 9})))
    assert classes(alike, stacked=False) == (alike,) and len(classes(alike, stacked=True)) == 2


def test_the_device_is_not_asked() -> None:
    """Classes are cut of what the host has."""
    segments = some_segments({1: 200, 0: 70})
    routes = routes_of(segments)
    there = replace(routes, tiles_N3=torch.empty(0, device=CPU), chunks_C3=torch.empty(0), segments_M3=torch.empty(0))
    assert [len(part.parts) for part in classes(low_of(segments, there), stacked=False)] == [1, 1]
