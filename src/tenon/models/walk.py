"""How a pass goes over the layers: up for the forward pass, down for the backward one.

Layers that are all here are simply taken; `models.shards` brings those that are spread over several GPUs. This module
does not know what a layer computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from tenon.bases.facts import ModelFacts
from tenon.models.layer import Layer
from tenon.models.weights import Place, layer_places


class LayerWalk(Protocol):
    """The layers of a decoder in the order of a pass. A layer may be used until the next but one is asked for.

    resident: nothing has to happen on the host for a layer to be there, so that a pass can be recorded and replayed.
    """

    @property
    def resident(self) -> bool: ...

    def up(self) -> Iterator[Layer]:
        """Every layer from the first to the last."""
        ...

    def down(self, lowest: int) -> Iterator[Layer]:
        """Every layer from the last to number `lowest`."""
        ...

    def follow(self) -> None:
        """Take part in what the other ranks still have to do, until none of them has any more."""
        ...

    def places(self, index: int) -> dict[str, Place]:
        """Where the tensors of one layer go, by their names inside the layer."""
        ...


class ResidentLayers:
    """Layers that are all here."""

    resident = True

    def __init__(self, layers: Sequence[Layer], facts: ModelFacts) -> None:
        self._layers, self._facts = layers, facts

    def up(self) -> Iterator[Layer]:
        """See `LayerWalk.up`."""
        return iter(self._layers)

    def down(self, lowest: int) -> Iterator[Layer]:
        """See `LayerWalk.down`."""
        return reversed(self._layers[lowest:])

    def follow(self) -> None:
        """Nobody needs these layers."""

    def places(self, index: int) -> dict[str, Place]:
        """See `LayerWalk.places`."""
        return layer_places(self._layers[index], self._facts)
