"""Which slots' A lie below the frozen weights, and where: see `models.frozen.DenseLinear`.

A slot takes as many ranks of the shelf as its widest module has, at every stacked weight as often as that has modules.
It is a copy: the bank's own matrices stay what they are. A slot that finds no room is left to the products apart.

Shape legend: D inputs, R ranks of a group. This module does not know what a slot is for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tenon.adapters.bank import Slot
from tenon.bases.facts import STACKS
from tenon.models.decoder import Decoder
from tenon.models.frozen import DenseLinear


@dataclass(frozen=True, slots=True)
class _Room:
    """Ranks [start, stop) of the shelf; version: of the slot's matrices that lie there."""

    start: int
    stop: int
    version: int


class Shelf:
    """The shelf of one decoder."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._rooms: dict[object, _Room] = {}
        self._starts: dict[int, int] = {}

    def holds(self, number: int) -> bool:
        """Whether a slot's A lie there."""
        return number in self._starts

    def shift(self, number: int, stack: str) -> int:
        """Where a slot's low-rank activations begin among those of all slots at a stacked weight."""
        return len(STACKS[stack]) * self._starts.get(number, 0)

    def update(self, slots: Mapping[int, Slot]) -> None:
        """Forget slots that are gone, and take in those that are new or have changed, as far as there is room."""
        identities = {slot.identity for slot in slots.values()}
        for identity in self._rooms.keys() - identities:
            del self._rooms[identity]
        self._starts = {}
        for number, slot in slots.items():
            room = self._rooms.get(slot.identity) or self._find_room(slot)
            if room is None:
                continue
            if room.version != slot.version:
                self._put(slot, room)
                room = _Room(room.start, room.stop, slot.version)
            self._rooms[slot.identity] = room
            self._starts[number] = room.start

    def _find_room(self, slot: Slot) -> _Room | None:
        """The first gap that is wide enough; its version is one that no slot has."""
        size, start = slot.most_rank, 0
        for taken in sorted(self._rooms.values(), key=lambda room: room.start):
            if start + size <= taken.start:
                break
            start = taken.stop
        return _Room(start, start + size, -1) if start + size <= self._decoder.shelf_rank else None

    def _put(self, slot: Slot, room: _Room) -> None:
        for (layer, stack), group in slot.groups.items():
            linear = self._decoder.layers[layer].stacks[stack]
            assert isinstance(linear, DenseLinear)
            first = len(STACKS[stack]) * room.start
            linear.shelf(first, first + group.a_RD.shape[0]).copy_(group.a_RD)
