"""The Batch: packed tokens with positions, labels, row boundaries, and for each row its slot.

Shape legend: T tokens, N rows, G rows of one attention group, Q and C query and context tokens of one row of it.
No padding anywhere. Rows of the same slot are neighbours. This module does not know where rows come from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100
NO_SLOT = -1


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of neighbouring tokens [start, stop) that belong to one slot (NO_SLOT: the bare base)."""

    slot: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """Rows that attend in one call, because their lengths are close.

    query_GQ, context_GC: token indices into the packed stream. A row shorter than its group repeats its last token:
    the causal rule hides the repeats from every real query, and their own output is not read. None when the group's
    rows are the token range [start, stop) of equal lengths, which needs no gathering.
    offset: context tokens before the first query (a shared prefix): query i sees contexts 0 … offset + i.
    """

    rows: int
    start: int
    stop: int
    query_GQ: Tensor | None
    context_GC: Tensor | None
    offset: int


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """How the rows of a batch attend. restore_T: for each token its place in the groups' outputs laid end to end.

    None: the groups' outputs are the stream itself, in order.
    """

    groups: tuple[AttentionGroup, ...]
    restore_T: Tensor | None


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass.

    ids_T: int64 token ids. positions_T: int64, from 0 in every row.
    labels_T: int64, the id that should follow the token, or IGNORE. Already shifted and masked: the last token of a
    row has IGNORE.
    cu_seqlens: row boundaries in the stream, N + 1 host integers. slots: the slot of each row.
    rows: the index of each row in its data set (for messages).
    segments: maximal runs of one slot. attention: which tokens see which. row_tokens: tokens that the rows have when
    each is counted in full (more than T when a prefix is shared).
    draw_T: int32 random key of each token for dropout (None without dropout): depends on (seed, step, row, position)
    alone, never on how rows were packed.
    """

    ids_T: Tensor
    positions_T: Tensor
    labels_T: Tensor
    cu_seqlens: tuple[int, ...]
    slots: tuple[int, ...]
    rows: tuple[int, ...]
    segments: tuple[Segment, ...]
    attention: AttentionLayout
    row_tokens: int
    draw_T: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens that are computed (T)."""
        return self.ids_T.shape[0]

    @property
    def supervised(self) -> Tensor:
        """Indices of the tokens that have a label."""
        return torch.nonzero(self.labels_T != IGNORE).squeeze(-1)
