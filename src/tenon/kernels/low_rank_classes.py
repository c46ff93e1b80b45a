"""Slots by classes of rank: those of like rank share a launch.

A program holds blocks as wide as the widest rank of its launch, so that in one launch for all slots of a batch one of
rank 4 would pay for one of rank 64 beside it. Hence a launch for each class of ranks that a batch has, up to 16, to 32,
to 64 and so on, over the tokens of its slots alone. Which classes there are is known on the host: nothing is read back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from tenon.kernels.gpu import power_of_two

if TYPE_CHECKING:
    from tenon.kernels.low_rank import LoraPart, LowRank, Routes

_Size = TypeVar("_Size", int, tuple[int, int])

# The narrowest class: what the matrix units take.
_LEAST = 16


@dataclass(frozen=True, slots=True)
class RankClass:
    """slots: those of one class, None for all. routes: their tokens; the first class has the tokens of no slot too."""

    slots: frozenset[int] | None
    routes: Routes


def classes(low: LowRank, *, stacked: bool) -> tuple[LowRank, ...]:
    """The additions class by class, narrow ones first; all at once where there are no routes, no parts or few tokens.

    stacked: by the ranks of a slot's modules together, as A has them; else by that of its widest module.
    """
    if low.routes is None or not low.parts:
        return (low,)
    sizes = {slot: class_size(rank) for slot, rank in slot_ranks(low, stacked=stacked).items()}
    found = (of_class(low, one) for one in rank_classes(low.routes, sizes))
    return tuple(part for part in found if part is not None)


def class_size(rank: int) -> int:
    """The widest rank of the class that a rank belongs to."""
    return power_of_two(rank, least=_LEAST)


def slot_ranks(low: LowRank, *, stacked: bool) -> dict[int, int]:
    """The rank of each slot; the widest one's, as that of one slot, where they cannot be told apart."""
    if low.routes is None or low.routes.listed is None:
        return {-1: max(_rank(part, stacked=stacked) for part in low.parts)}
    slot_at = {int(start): int(slot) for slot, start, _ in low.routes.listed[1] if slot >= 0}
    return {slot_at[part.start]: _rank(part, stacked=stacked) for part in low.parts}


def _rank(part: LoraPart, *, stacked: bool) -> int:
    group = part.group
    return group.a_RD.shape[0] if stacked else max(m.rank_stop - m.rank_start for m in group.members)


def rank_classes(routes: Routes, sizes: Mapping[int, _Size]) -> tuple[RankClass, ...]:
    """The classes of slots of like size, small ones first."""
    found = sorted(set(sizes.values()))
    if len(found) == 1:
        return (RankClass(None, routes),)
    key = tuple(sorted(sizes.items()))
    if key not in routes.cuts:
        members = [frozenset(slot for slot in sizes if sizes[slot] == size) for size in found]
        cut = _cut(routes, members)
        routes.cuts[key] = tuple(RankClass(*each) for each in zip(members, cut, strict=True))
    return routes.cuts[key]


def of_class(low: LowRank, one: RankClass) -> LowRank | None:
    """The additions of one class's slots; None when these have none here."""
    if one.slots is None:
        return low
    assert low.routes is not None and low.routes.listed is not None
    starts = {int(start) for slot, start, _ in low.routes.listed[1] if int(slot) in one.slots}
    parts = tuple(part for part in low.parts if part.start in starts)
    if not parts:
        return None
    width = max(_rank(part, stacked=True) for part in parts)
    rank = max(_rank(part, stacked=False) for part in parts)
    return replace(low, parts=parts, width=-(-width // 16) * 16, rank=rank, routes=one.routes)


def _cut(routes: Routes, members: list[frozenset[int]]) -> list[Routes]:
    """The routes of each class; one copy to the device."""
    assert routes.listed is not None
    others = sorted(frozenset().union(*members[1:]))
    lists: list[np.ndarray] = []
    for index, slots in enumerate(members):
        # The first class has all tokens that belong to no other.
        wanted = [np.isin(rows[:, 0], sorted(slots) if index else others, invert=not index) for rows in routes.listed]
        tiles, chunks = (rows[mask] for rows, mask in zip(routes.listed, wanted, strict=True))
        lists += [tiles, chunks, _segments(chunks)]
    flat = torch.from_numpy(np.concatenate(lists))
    device = routes.tiles_N3.device
    if device.type == "cuda":
        flat = flat.pin_memory()
    placed = flat.to(device, non_blocking=True).split([len(rows) for rows in lists])
    whole = [bool((rows[:, 2] - rows[:, 1] == 1).all()) for rows in lists[2::3]]
    triples = zip(placed[::3], placed[1::3], placed[2::3], whole, strict=True)
    return [
        replace(routes, tiles_N3=tiles, chunks_C3=chunks, segments_M3=segments, whole=one, listed=None)
        for tiles, chunks, segments, one in triples
    ]


def _segments(chunks: np.ndarray) -> np.ndarray:
    """(slot, first chunk, the one after its last) of each slot."""
    runs: list[list[int]] = []
    for index, slot in enumerate(chunks[:, 0].tolist()):
        if slot < 0:
            continue
        if runs and runs[-1][0] == slot and runs[-1][2] == index:
            runs[-1][2] += 1
        else:
            runs.append([slot, index, index + 1])
    return np.array(runs, dtype=np.int64).reshape(-1, 3)
