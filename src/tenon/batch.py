"""The Batch: packed tokens with positions, labels, row boundaries, and for each row its slot.

Shape legend: T tokens, N rows, G rows of one attention group, Q and C query and context tokens of one row of it.
No padding anywhere. Rows of the same slot are neighbours. This module does not know where rows come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # whoever asks for tokens, and computes none, does without torch
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
class PackedRows:
    """Rows that lie end to end and see only themselves: what variable-length attention takes.

    cu_seqlens_N: int32 row boundaries on the device, N + 1 of them; rows may be empty. longest: no row has more tokens.
    equal: whether all rows are of that length.
    """

    cu_seqlens_N: Tensor
    longest: int
    equal: bool


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """How the rows of a batch attend. restore_T: for each token its place in the groups' outputs laid end to end.

    restore_T None: the groups' outputs are the stream itself, in order. packed: the same rows for variable-length
    attention; None where a prefix is shared, or where the device has no such kernel. Groups may be empty then.
    """

    groups: tuple[AttentionGroup, ...]
    restore_T: Tensor | None
    packed: PackedRows | None = None


@dataclass(frozen=True, slots=True)
class SlotRoutes:
    """Which slot the tokens belong to, as fused kernels read it: int64 on the device.

    tiles_N3: (slot or NO_SLOT, start, stop) of tiles of tokens. chunks_C3: the same of longer runs. segments_M3: (slot,
    first chunk, the one after its last) of each run that has a slot. whole: each of these has one chunk. listed: tiles
    and chunks once more, on the host. few: the tensors of `kernels.low_rank.FewTokens`.
    """

    tiles_N3: Tensor
    chunks_C3: Tensor
    segments_M3: Tensor
    whole: bool
    listed: tuple[np.ndarray, np.ndarray]
    few: tuple[Tensor, Tensor, Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass.

    ids_T: int64 token ids. positions_T: int64, from 0 in every row.
    labels_T: int64, the id that should follow the token, or IGNORE. Already shifted and masked: the last token of a
    row has IGNORE.
    cu_seqlens: row boundaries in the stream, N + 1 host integers. slots: the slot of each row.
    rows: the index of each row in its data set (for messages).
    segments: maximal runs of one slot. attention: which tokens see which. supervised_L: int64 indices of the tokens
    that have a label. row_tokens: tokens that the rows have when each is counted in full (more than T when a prefix is
    shared). positions_end: no position is as large.
    draw_T: int32 random key of each token for dropout (None without dropout): depends on (seed, step, row, position)
    alone, never on how rows were packed.
    routes: which slot tiles of tokens belong to, for fused kernels alone.
    """

    ids_T: Tensor
    positions_T: Tensor
    labels_T: Tensor
    cu_seqlens: tuple[int, ...]
    slots: tuple[int, ...]
    rows: tuple[int, ...]
    segments: tuple[Segment, ...]
    attention: AttentionLayout
    supervised_L: Tensor
    row_tokens: int
    positions_end: int
    draw_T: Tensor | None = None
    routes: SlotRoutes | None = None

    @property
    def tokens(self) -> int:
        """Tokens that are computed (T)."""
        return self.ids_T.shape[0]
