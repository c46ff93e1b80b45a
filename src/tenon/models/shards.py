"""A frozen base spread over the GPUs of a run: each keeps an equal part of every layer, and whole layers come and go.

A layer's tensors lie one after another in a flat buffer of bytes, whatever format they are in; rank r keeps the r-th
part of it. Two rooms hold whole layers: one is computed with while the next one is gathered into the other, and a layer
that is still in its room is not gathered again. Weights never change, so nothing has to go back: this is ZeRO-3
(Rajbhandari et al., 2020) for frozen parameters.

Gathering takes every rank. Before each way over the layers the ranks agree on one, and a rank that has nothing to do of
its own takes part all the same (`follow`): ranks may have different numbers of batches, one may judge alone.

Shape legend: N bytes, L layers. This module does not know what a layer computes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from tenon.bases.facts import ModelFacts
from tenon.kernels.nf4 import Nf4Weight
from tenon.models.frozen import as_tensor
from tenon.models.layer import Layer
from tenon.models.weights import Place, layer_places
from tenon.ranks.group import Arrival, Ranks

# What each tensor and each part begin at a multiple of: as the allocator gives them.
ALIGN_BYTES = 256
_NOTHING, _UP = 0.0, 1.0


class Stop(Protocol):
    """A request to stop that all ranks obey at the same place (see `train.interrupt`)."""

    @property
    def pending(self) -> bool:
        """Whether this rank was asked to stop, and may."""
        ...

    def now(self) -> None:
        """Raise what ends the work."""
        ...


@dataclass(frozen=True, slots=True)
class Sharing:
    """With whom a decoder shares its layers, and who may stop it in between."""

    ranks: Ranks
    stop: Stop


@dataclass(slots=True)
class _Room:
    """Room for one whole layer: its bytes, the layer whose tensors lie there, which one it is, and its arrival."""

    whole_N: Tensor
    layer: Layer
    index: int = -1
    arrival: Arrival | None = None


class ShardedLayers:
    """Layers of which this rank keeps a part each (see `models.walk.LayerWalk`)."""

    resident = False

    def __init__(
        self,
        make: Callable[[], Layer],
        facts: ModelFacts,
        sharing: Sharing,
        *,
        device: torch.device,
        quantised: bool,
    ) -> None:
        """make: an empty layer on the device. quantised: its matrices do not lie in it as they come."""
        self._make, self._facts, self._device, self._quantised = make, facts, device, quantised
        self._ranks, self._stop = sharing.ranks, sharing.stop
        self._layout: list[tuple[torch.Size, torch.dtype]] = []
        self._rooms: list[_Room] = []
        self._own_LN = torch.empty((facts.layers, 0), dtype=torch.uint8, device=device)
        # Quantised layers on their way in: each with the names that it still lacks.
        self._coming: dict[int, tuple[Layer, set[str]]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._open: Iterator[Layer] = iter(())

    @property
    def size_bytes(self) -> int:
        """What this rank keeps, rooms included."""
        return self._own_LN.numel() + sum(room.whole_N.numel() for room in self._rooms)

    # ---- passes -------------------------------------------------------------------------------------------------

    def up(self) -> Iterator[Layer]:
        """See `LayerWalk.up`."""
        self._agree(_UP)
        self._open = self._sweep(range(self._facts.layers))
        return self._open

    def down(self, lowest: int) -> Iterator[Layer]:
        """See `LayerWalk.down`. Others may go further down; what this rank does not use of it comes by all the same."""
        depth = self._facts.layers - lowest
        self._open = self._sweep(self._downward(self._agree(_UP + depth)))
        return itertools.islice(self._open, depth)

    def follow(self) -> None:
        """See `LayerWalk.follow`."""
        self._agree(_NOTHING)

    def _agree(self, wanted: float) -> float:
        """Take part in the ways of others until the agreed one is the wanted one, perhaps deeper; returns it.

        What this rank left unfinished (an error half way) is gone through first: the others are under way.
        """
        while True:
            for _ in self._open:
                pass
            stop, agreed = self._ranks.largest(float(self._stop.pending), wanted)
            if stop:
                self._stop.now()
            if agreed == wanted or (agreed > _UP and wanted > _UP):
                return agreed
            self._open = self._sweep(range(self._facts.layers) if agreed == _UP else self._downward(agreed))

    def _downward(self, agreed: float) -> Sequence[int]:
        last = self._facts.layers - 1
        return range(last, last - round(agreed - _UP), -1)

    def _sweep(self, order: Sequence[int]) -> Iterator[Layer]:
        for place, index in enumerate(order):
            room = self._fetch(index, beside=None)
            if place + 1 < len(order):
                self._fetch(order[place + 1], beside=index)
            if room.arrival is not None:
                room.arrival.wait()
                room.arrival = None
            yield room.layer

    def _fetch(self, index: int, *, beside: int | None) -> _Room:
        """The room that has, or will have, a layer. beside: the layer that must stay."""
        found = next((room for room in self._rooms if room.index == index), None)
        if found is not None:
            return found
        room = next(room for room in self._rooms if room.index != beside)
        # Everything that was computed with the layer in the room is queued before this, so it comes first.
        room.arrival = self._ranks.gather(room.whole_N, self._own_LN[index])
        room.index = index
        return room

    # ---- weights in ---------------------------------------------------------------------------------------------

    def places(self, index: int) -> dict[str, Place]:
        """See `LayerWalk.places`. Of a tensor that is kept as it comes only this rank's part is copied; a quantised
        layer is made whole first, and let go of.
        """
        if self._quantised:
            return self._whole_places(index)
        if not self._rooms:
            self._make_rooms(self._make())
        room = self._rooms[0]
        return {
            name: Place(place.shape, self._part_of(index, place.get()), _not_read)
            for name, place in layer_places(room.layer, self._facts).items()
        }

    def _part_of(self, index: int, there: Tensor) -> Callable[[Tensor | Nf4Weight], object]:
        """What copies this rank's part of a tensor. there: where the whole of it lies in a room."""
        own_E = self._own_LN[index].view(there.dtype)
        begin = (there.data_ptr() - self._rooms[0].whole_N.data_ptr()) // there.element_size()
        begin -= self._ranks.number * len(own_E)
        first, last = max(begin, 0), min(begin + there.numel(), len(own_E))

        def put(given: Tensor | Nf4Weight) -> None:
            if first < last:
                tensor = as_tensor(given, self._device) if isinstance(given, Nf4Weight) else given
                own_E[first:last].copy_(tensor.reshape(-1)[first - begin : last - begin])

        return put

    def _whole_places(self, index: int) -> dict[str, Place]:
        if not self._shapes:
            self._shapes = {name: place.shape for name, place in layer_places(self._make(), self._facts).items()}

        def putter(name: str) -> Callable[[Tensor | Nf4Weight], object]:
            return lambda weight: self._put_whole(index, name, weight)

        return {name: Place(shape, putter(name), _not_read) for name, shape in self._shapes.items()}

    def _put_whole(self, index: int, name: str, weight: Tensor | Nf4Weight) -> None:
        if index not in self._coming:
            self._coming[index] = (self._make(), set(self._shapes))
        layer, left = self._coming[index]
        layer_places(layer, self._facts)[name].put(weight)
        left.remove(name)
        if not left:
            self._store(index, layer)
            del self._coming[index]

    def _store(self, index: int, layer: Layer) -> None:
        """Keep this rank's part of a whole layer."""
        if not self._rooms:
            self._make_rooms(layer)
        room = self._rooms[0]
        flat = _Flat(room.whole_N, copies=True)
        _moved(layer, flat.take)
        if flat.layout != self._layout:
            raise ValueError("the layers of a sharded base must all be quantised alike")
        own_bytes = self._own_LN.shape[1]
        self._own_LN[index].copy_(room.whole_N[self._ranks.number * own_bytes :][:own_bytes])

    def _make_rooms(self, template: Layer) -> None:
        """Two rooms for layers like this one, and this rank's part of all layers."""
        measure = _Flat(None)
        _moved(template, measure.take)
        own_bytes = _aligned(-(-measure.used // self._ranks.count))
        self._layout = measure.layout
        self._own_LN = torch.empty((self._facts.layers, own_bytes), dtype=torch.uint8, device=self._device)
        for _ in range(2):
            whole_N = torch.empty(own_bytes * self._ranks.count, dtype=torch.uint8, device=self._device)
            self._rooms.append(_Room(whole_N, _moved(template, _Flat(whole_N).take)))


class _Flat:
    """Lays tensors one after another in a flat buffer. whole_N None: only counts; copies: takes their contents over."""

    def __init__(self, whole_N: Tensor | None, *, copies: bool = False) -> None:
        self._whole_N, self._copies = whole_N, copies
        self.used = 0
        self.layout: list[tuple[torch.Size, torch.dtype]] = []

    def take(self, tensor: Tensor) -> Tensor:
        """The tensor's place in the buffer, as a tensor."""
        start, size_bytes = self.used, tensor.numel() * tensor.element_size()
        self.used = _aligned(start + size_bytes)
        self.layout.append((tensor.shape, tensor.dtype))
        if self._whole_N is None or self.used > len(self._whole_N):
            return tensor
        there_N = self._whole_N[start : start + size_bytes]
        if self._copies:
            there_N.copy_(tensor.reshape(-1).view(torch.uint8))
        return there_N.view(tensor.dtype).view(tensor.shape)


def _moved(layer: Layer, take: Callable[[Tensor], Tensor]) -> Layer:
    """A layer whose tensors are what `take` gives for those of this one."""
    q_norm_E, k_norm_E = (None if n is None else take(n) for n in (layer.heads.q_norm_E, layer.heads.k_norm_E))
    return Layer(
        input_norm_D=take(layer.input_norm_D),
        post_norm_D=take(layer.post_norm_D),
        stacks={name: linear.moved(take) for name, linear in layer.stacks.items()},
        heads=replace(layer.heads, q_norm_E=q_norm_E, k_norm_E=k_norm_E),
    )


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGN_BYTES) * ALIGN_BYTES


def _not_read() -> Tensor:
    raise RuntimeError("a sharded layer is read in passes alone")
