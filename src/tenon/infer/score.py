"""How likely the supervised tokens of given rows are: likelihoods without generation, many rows of any slots in a pass.

Shape legend: L labelled tokens. This module does not know text or metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tenon.batch import IGNORE, Batch
from tenon.data.pack import PackOptions, PackRow, pack_rows
from tenon.kernels.linear_cross_entropy import token_nll
from tenon.models.decoder import Bank, Decoder


@dataclass(frozen=True, slots=True, eq=False)
class RowScore:
    """One row: logprobs (float32, nats) of its supervised tokens, in order, each given all tokens before it."""

    logprobs: np.ndarray

    @property
    def nll(self) -> float:
        """Summed negative log likelihood, in nats."""
        return -float(self.logprobs.sum(dtype=np.float64))

    @property
    def tokens(self) -> int:
        """Supervised tokens that have one before them."""
        return len(self.logprobs)


@torch.inference_mode()
def score(
    decoder: Decoder,
    bank: Bank | None,
    rows: Sequence[PackRow],
    *,
    pass_tokens: int = 2048,
    share_prefix: bool = True,
    on_rows: Callable[[int], None] | None = None,
) -> list[RowScore]:
    """The score of every row, in order; rows are packed by slot and length, without padding.

    pass_tokens: most tokens of one pass (one longer row still goes alone). share_prefix: compute the beginning that a
    slot's rows share once a pass. on_rows: called after each pass with the number of rows that it finished.
    A row's own `index` and `draw` are not used.
    """
    numbered = [PackRow(row.slot, row.ids, row.supervised, index) for index, row in enumerate(rows)]
    usable = [row for row in numbered if len(row.ids) > 1]
    packing = PackOptions(pass_tokens, share_prefix, packed=decoder.attends_packed, tile_tokens=decoder.tile_tokens)
    found: dict[int, np.ndarray] = {row.index: np.zeros(0, dtype=np.float32) for row in numbered}
    for batch in pack_rows(usable, packing, decoder.device) if usable else ():
        finished = _score_batch(decoder, bank, batch)
        found |= finished
        if on_rows is not None:
            on_rows(len(finished))
    return [RowScore(found[index]) for index in range(len(rows))]


def _score_batch(decoder: Decoder, bank: Bank | None, batch: Batch) -> dict[int, np.ndarray]:
    """logprobs of each row's labelled tokens, by the row's index."""
    hidden_TD = decoder.forward(batch, bank)
    supervised_L = batch.supervised_L
    nll_L = token_nll(hidden_TD[supervised_L], decoder.head_VD, batch.labels_T[supervised_L])
    labelled_T = (batch.labels_T != IGNORE).cpu().numpy()
    logprobs = -nll_L.float().cpu().numpy()
    ends = np.concatenate([[0], np.cumsum(labelled_T)])[list(batch.cu_seqlens)]
    # A shared prefix is a piece of its own under the index of its first row; it has no label, so the row overwrites it.
    return {row: logprobs[ends[i] : ends[i + 1]] for i, row in enumerate(batch.rows)}
