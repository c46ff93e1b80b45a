"""The step: for every slot, loss = sum over its supervised tokens / their number in its whole window.

The window of a slot is all rows of one optimiser step, however they are cut into batches and whoever shares them. A
slot's gradient does not depend on who shares the batch.

Shape legend: T tokens, L labelled tokens, S slots. This module does not know schedules, files, or where rows come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tenon.adapters.bank import AdapterBank
from tenon.batch import Batch
from tenon.data.pack import PackOptions, PackRow, pack_rows
from tenon.kernels.linear_cross_entropy import loss_and_gradient
from tenon.models.decoder import Decoder
from tenon.models.layer import Keep


@dataclass(frozen=True, slots=True)
class WindowLoss:
    """What one window of one slot came to. loss: nats per supervised token (NaN stays NaN). tokens: rows counted in
    full.
    """

    loss: float
    supervised_tokens: int
    tokens: int
    rows: int


@dataclass(frozen=True, slots=True)
class StepOptions:
    """micro_tokens, share_prefix: how a window is cut. recompute: compute each layer again on the way back.

    loss_scale: for fp16, else 1.
    """

    micro_tokens: int
    share_prefix: bool
    recompute: bool
    loss_scale: float = 1.0


def supervised_count(row: PackRow) -> int:
    """Tokens of a row that carry loss: supervised ones that have a token before them."""
    return int(np.count_nonzero(row.supervised[1:]))


def accumulate_window(
    decoder: Decoder,
    bank: AdapterBank,
    rows: Sequence[PackRow],
    options: StepOptions,
    *,
    before_batch: Callable[[], None] = lambda: None,
) -> dict[int, WindowLoss]:
    """Add the gradient of one window per slot into the slots' flat gradients (times the loss scale).

    rows: of any slots, in any order. before_batch is called before each batch (to stop between two).
    """
    counts: dict[int, int] = {}
    for row in rows:
        counts[row.slot] = counts.get(row.slot, 0) + supervised_count(row)
    dropout = any(slot.shape.dropout > 0.0 for slot in bank.slots.values())
    packing = PackOptions(
        options.micro_tokens,
        options.share_prefix,
        dropout,
        packed=decoder.attends_packed,
        tile_tokens=decoder.tile_tokens,
    )
    sums = {slot: torch.zeros((), dtype=torch.float64) for slot in counts}
    for batch in pack_rows(rows, packing, decoder.device):
        before_batch()
        _accumulate_batch(decoder, bank, batch, counts, sums, options)
    return {
        slot: WindowLoss(
            loss=float(total) / counts[slot] if counts[slot] else 0.0,
            supervised_tokens=counts[slot],
            tokens=sum(len(row.ids) for row in rows if row.slot == slot),
            rows=sum(1 for row in rows if row.slot == slot),
        )
        for slot, total in sums.items()
    }


def _accumulate_batch(
    decoder: Decoder,
    bank: AdapterBank,
    batch: Batch,
    counts: Mapping[int, int],
    sums: dict[int, Tensor],
    options: StepOptions,
) -> None:
    recording = decoder.record(batch, bank, keep_layers(decoder.facts.layers, options))
    index_L = batch.supervised_L
    shares = torch.tensor([options.loss_scale / max(1, counts[s.slot]) for s in batch.segments])
    lengths = torch.tensor([s.stop - s.start for s in batch.segments])
    coefficient_T = shares.repeat_interleave(lengths).to(decoder.device, non_blocking=True)
    hidden_TD = recording.hidden_TD
    nll_L, d_hidden_LD = loss_and_gradient(
        hidden_TD[index_L], decoder.head_VD, batch.labels_T[index_L], coefficient_T[index_L], fuse=decoder.fuse
    )
    d_hidden_TD = torch.zeros_like(hidden_TD).index_copy_(0, index_L, d_hidden_LD)
    del hidden_TD, d_hidden_LD
    recording.backward(d_hidden_TD)
    nll_T = torch.zeros(batch.tokens, dtype=torch.float64, device=decoder.device)
    nll_T.index_copy_(0, index_L, nll_L.double())
    for segment in batch.segments:
        sums[segment.slot] = sums[segment.slot].to(nll_T.device) + nll_T[segment.start : segment.stop].sum()


def keep_layers(layers: int, options: StepOptions) -> list[Keep]:
    """What each layer keeps for the way back."""
    return [Keep.INPUT if options.recompute else Keep.ALL] * layers


def is_finite(*values: float) -> bool:
    """Whether no value is NaN or infinite."""
    return all(math.isfinite(v) for v in values)
