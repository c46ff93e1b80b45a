"""One vector of a sequence from its hidden states, gathered over however many passes read it.

Shape legend: T tokens of a piece, D hidden. This module knows no cache, no rows and no text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tenon.infer.requests import Pooling


class Pools:
    """The sums of the sequences that are being read, by their number."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}

    def add(self, index: int, pooling: Pooling, hidden_TD: Tensor) -> None:
        """The next tokens of a sequence; each of them once, in order."""
        if not len(hidden_TD):
            return
        if pooling == "last":
            self._sums[index] = hidden_TD[-1].float()
        else:
            before = self._sums.get(index)
            piece_D = hidden_TD.float().sum(dim=0)
            self._sums[index] = piece_D if before is None else before + piece_D

    def take(self, index: int) -> tuple[float, ...] | None:
        """The vector (D) at length 1, once all has been added; None where it is not finite, or nothing but zeros.

        A mean and a sum point the same way, so nothing is divided by the number of tokens.
        """
        sum_D = self._sums.pop(index).double()
        length = torch.linalg.vector_norm(sum_D)
        if not torch.isfinite(length) or not length > 0:
            return None
        return tuple((sum_D / length).tolist())

    def drop(self, index: int) -> None:
        """Forget a sequence that will not be read to its end."""
        self._sums.pop(index, None)
