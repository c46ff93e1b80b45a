"""Why a loss is not finite: each row of the step is run alone to find those at fault.

This module knows the step's arithmetic and nothing of the loop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tenon.adapters.bank import AdapterBank
from tenon.data.pack import PackOptions, PackRow, pack_rows
from tenon.errors import TrainError
from tenon.kernels.linear_cross_entropy import token_nll
from tenon.models.decoder import Decoder
from tenon.train.slot import SlotTraining

_NAMED_ROWS = 3


def not_finite_error(
    decoder: Decoder, bank: AdapterBank, training: SlotTraining, rows: Sequence[PackRow], loss: float
) -> TrainError:
    """The error for a step of one slot whose loss or gradient is not finite, naming adapter, step and rows."""
    step = training.cursor.step + 1
    if math.isfinite(loss):
        what = f"the gradient of adapter {training.plan.name} is not finite at step {step} (the loss is {loss:.4g})"
    else:
        bad = [training.rows.row(row.index).source for row in rows if not _row_is_finite(decoder, bank, row)]
        named = ", ".join(bad[:_NAMED_ROWS]) + (f" and {len(bad) - _NAMED_ROWS} more" if len(bad) > _NAMED_ROWS else "")
        what = f"the loss of adapter {training.plan.name} is not finite at step {step}; rows: {named or 'none alone'}"
    return TrainError(
        "train-not-finite",
        what,
        got=str(loss),
        hint="no weight was changed by this step, and checkpoints are kept; look at the rows with `tenon data RECIPE`, "
        "or start again with a lower optimizer.lr",
    )


@torch.no_grad()
def _row_is_finite(decoder: Decoder, bank: AdapterBank, row: PackRow) -> bool:
    packing = PackOptions(len(row.ids), packed=decoder.attends_packed, tile_tokens=decoder.tile_tokens)
    for batch in pack_rows([row], packing, decoder.device):
        hidden_TD = decoder.forward(batch, bank)
        index_L = batch.supervised_L
        nll_L = token_nll(hidden_TD[index_L], decoder.head_VD, batch.labels_T[index_L])
        if not math.isfinite(float(nll_L.sum())):
            return False
    return True
