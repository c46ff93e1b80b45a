"""Likelihoods of supervised tokens: equal to the plain formula, row by row, packed, shared and with any slots."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tenon.adapters.bank import AdapterBank
from tenon.batch import NO_SLOT
from tenon.data.pack import PackOptions, PackRow, bare_row, pack_rows
from tenon.infer.score import score
from tests.tiny import CPU, random_slot, slot_shape, tiny_decoder


def _rows(slots: list[int]) -> list[PackRow]:
    """Rows of all lengths from 1 on, half of them with a common beginning, with masks of every kind."""
    draw = np.random.default_rng(0)
    common = draw.integers(0, 97, 30)
    rows = []
    for i, length in enumerate([1, 2, 3, 17, 40, 41, 60, 9, 33, 50]):
        ids = draw.integers(0, 97, length)
        if i % 2:
            ids = np.concatenate([common, ids])
        supervised = draw.random(len(ids)) < 0.5
        supervised[: 30 if i % 2 else 0] = False
        rows.append(PackRow(slots[i % len(slots)], ids, supervised))
    rows.append(PackRow(slots[0], common, np.zeros(30, dtype=bool)))
    rows.append(PackRow(slots[0], common, np.ones(30, dtype=bool)))
    return rows


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("pass_tokens", [20, 150, 5000])
def test_scores_equal_the_formula(share: bool, pass_tokens: int) -> None:
    decoder = tiny_decoder()
    bank = AdapterBank(decoder.facts, dtype=torch.float32, device=CPU)
    slots = [NO_SLOT, random_slot(bank, slot_shape(decoder.facts), 1), random_slot(bank, slot_shape(decoder.facts), 2)]
    rows, finished = _rows(slots), []
    found = score(decoder, bank, rows, pass_tokens=pass_tokens, share_prefix=share, on_rows=finished.append)
    assert len(found) == len(rows) == 12
    assert sum(finished) == len(rows) - 1  # all but the row of one token, which has nothing to score
    for row, got in zip(rows, found, strict=True):
        (batch,) = pack_rows([bare_row(row.slot, row.ids.tolist())], PackOptions(1000), CPU)
        with torch.no_grad():
            logprobs = decoder.logits(decoder.forward(batch, bank)).log_softmax(-1)
        wanted = [float(logprobs[i, row.ids[i + 1]]) for i in range(len(row.ids) - 1) if row.supervised[i + 1]]
        assert got.tokens == len(wanted)
        assert got.logprobs == pytest.approx(wanted, abs=1e-4)
        assert got.nll == pytest.approx(-sum(wanted), abs=1e-3)


def test_no_rows_have_no_scores() -> None:
    assert score(tiny_decoder(), None, []) == []
