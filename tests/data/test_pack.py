"""Packed equals unpacked: whatever the packing, hidden states and gradients are those of the rows run alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenon.adapters.bank import AdapterBank
from tenon.batch import IGNORE, NO_SLOT
from tenon.data.pack import PackOptions, PackRow, pack_rows
from tenon.kernels.linear_cross_entropy import loss_and_gradient
from tenon.models.decoder import Decoder
from tests.tiny import CPU, random_slot, slot_shape, tiny_decoder, tiny_facts


def make_rows(lengths: list[int], slots: list[int], *, prefix: int = 0, seed: int = 0) -> list[PackRow]:
    """Rows with a common unsupervised beginning; the last third of each is supervised."""
    draw = np.random.default_rng(seed)
    start = draw.integers(1, 97, prefix)
    rows = []
    for i, (length, slot) in enumerate(zip(lengths, slots, strict=True)):
        ids = np.concatenate([start, draw.integers(1, 97, length)]).astype(np.int64)
        supervised = np.zeros(len(ids), dtype=bool)
        supervised[prefix + (2 * length) // 3 :] = True
        rows.append(PackRow(slot, ids, supervised, index=i, draw=1000 + i))
    return rows


def loss_and_gradients(
    decoder: Decoder, bank: AdapterBank, rows: list[PackRow], options: PackOptions
) -> tuple[float, dict[int, torch.Tensor]]:
    """The summed loss over all batches, and each slot's flat gradient."""
    for slot in bank.slots.values():
        assert slot.gradients_P is not None
        slot.gradients_P.zero_()
    total = 0.0
    for batch in pack_rows(rows, options, CPU):
        recording = decoder.record(batch, bank)
        index, hidden = batch.supervised_L, recording.hidden_TD
        c = torch.full((len(index),), 0.1)
        nll, grad = loss_and_gradient(hidden[index], decoder.head_VD, batch.labels_T[index], c, fuse=False)
        recording.backward(torch.zeros_like(hidden).index_copy_(0, index, grad))
        total += float(nll.sum()) * 0.1
    return total, {n: s.gradients_P.clone() for n, s in bank.slots.items() if s.gradients_P is not None}


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=9),
    prefix=st.integers(0, 30),
    budget=st.integers(8, 400),
    share=st.booleans(),
    drop=st.sampled_from([0.0, 0.2]),
    seed=st.integers(0, 10_000),
)
def test_p04_p06_packing_changes_nothing(
    lengths: list[int], prefix: int, budget: int, share: bool, drop: float, seed: int
) -> None:
    facts = tiny_facts()
    decoder = tiny_decoder(facts)
    bank = AdapterBank(facts, dtype=torch.float32, device=CPU)
    random_slot(bank, slot_shape(facts, rank=4, drop=drop), 1)
    random_slot(bank, slot_shape(facts, rank=2, modules=("q_proj", "v_proj", "down_proj"), drop=drop), 2)
    slots = [int(s) for s in np.random.default_rng(seed).integers(-1, 2, len(lengths))]
    rows = make_rows(lengths, slots, prefix=prefix, seed=seed)
    dropping = drop > 0
    alone = [
        loss_and_gradients(decoder, bank, [row], PackOptions(10_000, share_prefix=False, dropout=dropping))
        for row in rows
    ]
    loss, gradients = loss_and_gradients(decoder, bank, rows, PackOptions(budget, share, dropping))
    assert loss == pytest.approx(sum(a for a, _ in alone), rel=1e-5, abs=1e-6)
    for number, gradient in gradients.items():
        expected = torch.stack([g[number] for _, g in alone]).sum(0)
        assert float((gradient - expected).abs().max()) <= 1e-5 * float(expected.abs().max()) + 1e-9


@pytest.mark.parametrize("window", [0, 5])
def test_p04_hidden_states_of_a_packed_row_are_its_own(window: int) -> None:
    facts = tiny_facts(window=window, qk_norm=True)
    decoder = tiny_decoder(facts)
    rows = make_rows([20, 7, 7, 3, 18], [NO_SLOT] * 5, prefix=24)
    (packed,) = pack_rows(rows, PackOptions(10_000), CPU)
    assert packed.tokens == 24 + 55 and packed.row_tokens == 5 * 24 + 55
    hidden = decoder.forward(packed)
    for start, stop, index in zip(packed.cu_seqlens[1:], packed.cu_seqlens[2:], packed.rows[1:], strict=False):
        (alone,) = pack_rows([rows[index]], PackOptions(10_000), CPU)
        torch.testing.assert_close(hidden[start:stop], decoder.forward(alone)[24:], rtol=1e-4, atol=1e-5)


def test_labels_are_shifted_and_the_last_token_predicts_nothing() -> None:
    row = PackRow(NO_SLOT, np.array([5, 6, 7, 8]), np.array([True, False, True, True]))
    assert row.labels.tolist() == [IGNORE, 7, 8, IGNORE]
    (batch,) = pack_rows([row], PackOptions(100), CPU)
    assert batch.supervised_L.tolist() == [1, 2]


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30),
    prefix=st.integers(0, 40),
    budget=st.integers(1, 300),
)
def test_every_token_is_in_exactly_one_batch_within_the_limit(lengths: list[int], prefix: int, budget: int) -> None:
    rows = make_rows(lengths, [0] * len(lengths), prefix=prefix)
    batches = pack_rows(rows, PackOptions(budget), CPU)
    longest = max(len(row.ids) for row in rows)
    assert sum(b.row_tokens for b in batches) == sum(len(row.ids) for row in rows)
    assert sorted(i for b in batches for i in dict.fromkeys(b.rows)) == list(range(len(rows)))
    assert all(b.tokens <= max(budget, longest) for b in batches)
    assert all(b.cu_seqlens[-1] == b.tokens for b in batches)
    labels = sum(int((b.labels_T != IGNORE).sum()) for b in batches)
    assert labels == sum(int((row.labels != IGNORE).sum()) for row in rows)


def test_one_prefix_is_computed_once_for_each_slot() -> None:
    rows = make_rows([10] * 6, [0, 1, 0, 1, 0, 1], prefix=50)
    (batch,) = pack_rows(rows, PackOptions(10_000), CPU)
    assert [(s.slot, s.stop - s.start) for s in batch.segments] == [(0, 80), (1, 80)]
