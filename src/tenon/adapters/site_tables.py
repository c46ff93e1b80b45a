"""What kernels read of a bank: addresses, ranks and scales of every slot at every stacked weight, in one tensor.

This module does not know slots beyond their groups of matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from tenon.bases.facts import STACKS, ModelFacts
from tenon.kernels.low_rank import LoraGroup
from tenon.kernels.low_rank_table import site_table


class Grouped(Protocol):
    """What is read of a slot."""

    @property
    def groups(self) -> Mapping[tuple[int, str], LoraGroup]:
        """Its matrices by layer and stacked weight."""
        ...


class SiteTables:
    """The tables of `kernels.low_rank_table.site_table` at every place. moves: how often they went to other memory.

    fills: how often they were filled.
    """

    def __init__(self, facts: ModelFacts, device: torch.device) -> None:
        self._places = [(layer, stack) for layer in range(facts.layers) for stack in STACKS]
        self._device = device
        self._whole: Tensor | None = None
        self._at: dict[tuple[int, str], Tensor] = {}
        self.moves, self.fills = 0, 0

    def fill(
        self, slots: Mapping[int, Grouped], count: int, shift: Callable[[int, str], int] = lambda _slot, _stack: 0
    ) -> None:
        """Bring them up to date by one copy; in place where there are as many slots (count) as before.

        shift: what is added to the places of a slot's ranks at a stacked weight.
        """
        self.fills += 1
        # A tensor that is made in inference mode could not be filled again outside of it.
        with torch.inference_mode(False):
            self._fill(slots, count, shift)

    def _fill(self, slots: Mapping[int, Grouped], count: int, shift: Callable[[int, str], int]) -> None:
        numbers = [(place, n) for place in self._places for n in range(count)]
        groups = [slots[n].groups.get(place) if n in slots else None for place, n in numbers]
        shifts = [shift(n, place[1]) if n in slots else 0 for place, n in numbers]
        fresh = site_table(groups, self._device, shifts).view(len(self._places), count, -1)
        if self._whole is not None and self._whole.shape == fresh.shape:
            self._whole.copy_(fresh)
            return
        self._whole, self.moves = fresh, self.moves + 1
        self._at = dict(zip(self._places, fresh.unbind(), strict=True))

    def at(self, layer: int, stack: str) -> Tensor:
        """int64 (slots, FIELDS)."""
        return self._at[layer, stack]
