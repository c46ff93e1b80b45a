"""A device whose memory runs out where a test says so: under a decoder's pass, as a real allocator would."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from tenon.models.layer import Layer
from tenon.models.walk import LayerWalk
from tenon.models.weights import Place

MESSAGE = "CUDA out of memory. Tried to allocate 448.00 MiB. GPU 0 has a total capacity of 79.10 GiB"


class FakeMemory:
    """Memory of which others hold a part. Raises at the walks over the layers that `fails` names."""

    def __init__(self, *, total_bytes: int, held_bytes: int = 0) -> None:
        self.total_bytes, self.others_bytes, self._held_bytes = total_bytes, 0, held_bytes
        self.released = 0
        self.limited: list[int] = []

    def held_bytes(self) -> int:
        return self._held_bytes

    def free_bytes(self) -> int:
        return self.total_bytes - self.others_bytes - self._held_bytes

    def release(self) -> None:
        self.released += 1

    def limit(self, size_bytes: int) -> None:
        self.limited.append(size_bytes)


class ShortWalk:
    """A walk over the layers on which memory runs out in the middle: where `fails(which walk, way)` says so."""

    def __init__(self, walk: LayerWalk, fails: Callable[[int, str], bool]) -> None:
        self._walk, self._fails = walk, fails
        self.resident = walk.resident
        self.walks = 0

    def up(self) -> Iterator[Layer]:
        """See `LayerWalk.up`."""
        self.walks += 1
        return self._short(self._walk.up(), "up")

    def down(self, lowest: int) -> Iterator[Layer]:
        """See `LayerWalk.down`."""
        return self._short(self._walk.down(lowest), "down")

    def follow(self) -> None:
        """See `LayerWalk.follow`."""
        self._walk.follow()

    def places(self, index: int) -> dict[str, Place]:
        """See `LayerWalk.places`."""
        return self._walk.places(index)

    def _short(self, layers: Iterator[Layer], way: str) -> Iterator[Layer]:
        fails = self._fails(self.walks, way)
        for number, layer in enumerate(layers):
            if fails and number == 1:
                raise torch.OutOfMemoryError(MESSAGE)
            yield layer
