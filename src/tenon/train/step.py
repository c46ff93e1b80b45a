"""The step: for every slot, loss = sum over its supervised tokens / their number in its whole window.

The window of a slot is all rows of one optimiser step, however they are cut into batches and whoever shares them. A
slot's gradient does not depend on who shares the batch. Several ranks share out the rows of a window; each divides by
the number of the whole window, so that losses and gradients of all ranks add up to those of one.

Shape legend: T tokens, L labelled tokens, S slots. This module does not know schedules, files, or where rows come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tenon.adapters.bank import AdapterBank
from tenon.batch import Batch
from tenon.data.pack import PackOptions, PackRow, pack_rows
from tenon.kernels.linear_cross_entropy import loss_and_gradient
from tenon.models.decoder import Decoder
from tenon.models.layer import Keep
from tenon.ranks.group import ALONE, Ranks
from tenon.train.graph import StepGraphs, Work, is_launch_bound
from tenon.train.share import share_rows


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
    """micro_tokens, share_prefix: how a window is cut. keep: what each layer leaves behind for the way back; empty: all
    of them all. loss_scale: for fp16, else 1. attention_bytes: see `Decoder.record`.
    """

    micro_tokens: int
    share_prefix: bool
    keep: tuple[Keep, ...] = ()
    loss_scale: float = 1.0
    attention_bytes: int = 0


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
    ranks: Ranks = ALONE,
    graphs: StepGraphs | None = None,
) -> dict[int, WindowLoss]:
    """Add the gradient of one window per slot into the slots' flat gradients (times the loss scale).

    rows: of any slots, in any order. before_batch is called before each batch (to stop between two). ranks: this one
    works on its share of the rows; losses and gradients are its shares until `add_up`. graphs: for small batches.
    """
    counts: dict[int, int] = {}
    for row in rows:
        counts[row.slot] = counts.get(row.slot, 0) + supervised_count(row)
    dropout = any(slot.shape.dropout > 0.0 for slot in bank.slots.values())
    share = share_rows(rows, ranks.number, ranks.count)
    # A graph has no place for what goes to the host and comes back.
    records = graphs is not None and Keep.HOST not in options.keep
    small = records and is_launch_bound(decoder, sum(len(row.ids) for row in share))
    packing = PackOptions(
        options.micro_tokens,
        options.share_prefix,
        dropout,
        packed=decoder.attends_packed,
        tile_tokens=decoder.tile_tokens,
        bucket=small,
    )
    sums = {slot: torch.zeros((), dtype=torch.float64) for slot in counts}
    work = gradient_of(decoder, bank, options)
    for batch in pack_rows(share, packing, decoder.device):
        before_batch()
        coefficient_T = coefficients(batch, counts, options.loss_scale, decoder.device)
        nll_T = graphs.run(batch, coefficient_T, work) if graphs and small else work(batch, coefficient_T)
        for s in batch.segments:
            if s.slot in sums:
                sums[s.slot] = sums[s.slot].to(nll_T.device) + nll_T[s.start : s.stop].sum()
    decoder.walk.follow()
    return {
        slot: WindowLoss(
            loss=float(total) / counts[slot] if counts[slot] else 0.0,
            supervised_tokens=counts[slot],
            tokens=sum(len(row.ids) for row in rows if row.slot == slot),
            rows=sum(1 for row in rows if row.slot == slot),
        )
        for slot, total in sums.items()
    }


def add_up(losses: Mapping[int, WindowLoss], gradients: Sequence[Tensor], ranks: Ranks) -> dict[int, WindowLoss]:
    """The whole window's losses from each rank's shares; the gradients become those of the whole window."""
    total_S = torch.tensor([found.loss for found in losses.values()], dtype=torch.float64)
    ranks.add_up([*gradients, total_S])
    return {
        slot: replace(found, loss=total) for (slot, found), total in zip(losses.items(), total_S.tolist(), strict=True)
    }


def coefficients(batch: Batch, counts: Mapping[int, int], scale: float, device: torch.device) -> Tensor:
    """(T) what a token's loss counts for: 1 / supervised tokens of its slot's window; 0 for tokens of no slot."""
    shares = torch.tensor([scale / max(1, counts[s.slot]) if s.slot in counts else 0.0 for s in batch.segments])
    lengths = torch.tensor([s.stop - s.start for s in batch.segments])
    return shares.repeat_interleave(lengths).to(device, non_blocking=True)


def gradient_of(decoder: Decoder, bank: AdapterBank, options: StepOptions) -> Work:
    """What adds a batch's gradient into the slots' buffers; it gives each token's nll (T) fp64, 0 without a label.

    It waits for nothing on the host, so that it can be recorded as a graph.
    """

    def gradient(batch: Batch, coefficient_T: Tensor) -> Tensor:
        recording = decoder.record(batch, bank, options.keep, attention_bytes=options.attention_bytes)
        index_L, hidden_TD = batch.supervised_L, recording.hidden_TD
        nll_L, d_hidden_LD = loss_and_gradient(
            hidden_TD[index_L], decoder.head_VD, batch.labels_T[index_L], coefficient_T[index_L], fuse=decoder.fuse
        )
        d_hidden_TD = torch.zeros_like(hidden_TD).index_copy_(0, index_L, d_hidden_LD)
        del hidden_TD, d_hidden_LD
        recording.backward(d_hidden_TD)
        nll_T = torch.zeros(batch.tokens, dtype=torch.float64, device=decoder.device)
        return nll_T.index_copy_(0, index_L, nll_L.double())

    return gradient


def is_finite(*values: float) -> bool:
    """Whether no value is NaN or infinite."""
    return all(math.isfinite(v) for v in values)
