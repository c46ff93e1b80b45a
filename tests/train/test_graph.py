"""What graphs are recorded of: batches padded to a bucket give what they give unpadded. (Recording: tests/gpu.)"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tenon.adapters.bank import AdapterBank
from tenon.batch import NO_SLOT, Batch
from tenon.data.pack import PackOptions, PackRow, pack_rows
from tenon.models.decoder import Decoder
from tenon.train.graph import StepGraphs, is_launch_bound
from tenon.train.step import StepOptions, coefficients, gradient_of, supervised_count
from tests.tiny import CPU, random_slot, slot_shape, tiny_decoder

OPTIONS = StepOptions(4096, share_prefix=False)


def window(lengths: list[int], slots: int) -> list[PackRow]:
    draw = np.random.default_rng(len(lengths))
    return [PackRow(i % slots, draw.integers(1, 97, n), draw.random(n) < 0.5, i) for i, n in enumerate(lengths)]


def gradient(
    decoder: Decoder, bank: AdapterBank, rows: list[PackRow], *, bucket: bool
) -> tuple[Batch, torch.Tensor, list[torch.Tensor]]:
    """(the batch, summed nll of each slot's tokens, the slots' gradients, which are then zero again)."""
    (batch,) = pack_rows(rows, PackOptions(4096, False, tile_tokens=64, bucket=bucket), CPU)
    counts = {slot: sum(supervised_count(r) for r in rows if r.slot == slot) for slot in bank.slots}
    nll_T = gradient_of(decoder, bank, OPTIONS)(batch, coefficients(batch, counts, 1.0, CPU))
    sums = torch.stack([nll_T[s.start : s.stop].sum() for s in batch.segments if s.slot >= 0])
    found = []
    for slot in bank.slots.values():
        assert slot.gradients_P is not None
        found.append(slot.gradients_P.clone())
        slot.gradients_P.zero_()
    return batch, sums, found


@pytest.mark.parametrize("lengths", [[5], [64, 63], [30, 2, 41, 17, 60], [128]])
def test_padding_to_a_bucket_changes_neither_loss_nor_gradient(lengths: list[int]) -> None:
    decoder = tiny_decoder()
    bank = AdapterBank(decoder.facts, dtype=torch.float32, device=CPU)
    slots = min(2, len(lengths))
    for seed in range(slots):
        random_slot(bank, slot_shape(decoder.facts), seed)
    rows = window(lengths, slots)
    _, sums, expected = gradient(decoder, bank, rows, bucket=False)
    batch, padded_sums, found = gradient(decoder, bank, rows, bucket=True)
    assert batch.tokens % 128 == 0 and batch.tokens > sum(lengths) and len(batch.supervised_L) % 64 == 0
    assert batch.segments[-1].slot == NO_SLOT and batch.row_tokens == sum(lengths)
    torch.testing.assert_close(padded_sums, sums)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_batches_of_a_bucket_share_a_shape() -> None:
    shapes = set()
    for lengths in ([30, 20, 31], [25, 25, 40], [3, 60, 9]):
        (batch,) = pack_rows(window(lengths, 1), PackOptions(4096, False, tile_tokens=64, bucket=True), CPU)
        assert batch.routes is not None
        shapes.add((batch.tokens, len(batch.supervised_L), len(batch.routes.tiles_N3), len(batch.routes.segments_M3)))
    assert len(shapes) == 1


def test_without_variable_length_attention_a_batch_runs_as_it_is() -> None:
    decoder = tiny_decoder()
    assert not is_launch_bound(decoder, 100)
    told: list[str] = []
    graphs = StepGraphs(decoder, on_failure=told.append)
    (batch,) = pack_rows(window([9, 9], 1), PackOptions(4096, False, tile_tokens=64), CPU)
    assert graphs.run(batch, torch.ones(18), lambda given, c: c * given.tokens).tolist() == [18.0] * 18
    assert not told
