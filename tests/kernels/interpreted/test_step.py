"""The fused step against the plain one: loss and every slot's gradient, through all kernels at once, in fp32.

What the cases vary is what the kernels branch on: query/key norms, dropout, ranks that fit no power of two or no single
pass, slots with other targets, tokens of no slot, sums over tokens in one chunk or several, one slot that rides in the
weights' borders, layers that are computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from tenon.adapters.bank import AdapterBank
from tenon.batch import NO_SLOT
from tenon.data import pack
from tenon.data.pack import PackOptions, PackRow, bare_row, pack_rows
from tenon.kernels import blocks_triton, low_rank, low_rank_classes, swiglu_triton
from tenon.kernels.linear_cross_entropy import loss_and_gradient
from tenon.models import decoder as decoders
from tenon.models.decoder import Decoder
from tenon.models.layer import Keep
from tests.tiny import random_slot, slot_shape, tiny_decoder, tiny_facts

QV = ("q_proj", "v_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", *MLP)


@dataclass(frozen=True)
class Case:
    """ranks, modules: of each slot. chunk: tokens above which sums are cut.

    most_rank: of one pass. most_held: of one program's sums. cut: whether classes of rank, the narrowest up to 8, have
    launches of their own. long: whether every slot has so many tokens that products are torch's own.
    """

    ranks: Sequence[int]
    modules: Sequence[tuple[str, ...]]
    drop: float = 0.0
    qk_norm: bool = False
    tied: bool = True
    bare: bool = False
    chunk: int = 2048
    ride: bool = False
    keep: Keep = Keep.ALL
    scale: float = 1.5
    most_rank: int = 64
    most_held: int = 64
    cut: bool = False
    long: bool = False


CASES = {
    "one slot": Case([4], [ALL]),
    "norms of queries and keys": Case([4, 8], [ALL, ALL], qk_norm=True),
    "dropout": Case([3, 5], [ALL, ALL], drop=0.3, qk_norm=True),
    "other targets, a bare row": Case([2, 6, 7], [QV, MLP, ("o_proj",)], bare=True),
    "several chunks": Case([4, 3], [ALL, MLP], chunk=32),
    "chunks and dropout": Case([4, 3], [ALL, QV], chunk=32, drop=0.2),
    "more ranks than one pass takes": Case([14, 4], [ALL, ALL], most_rank=16),
    "the same in chunks": Case([14, 4], [ALL, MLP], most_rank=16, chunk=32, drop=0.1),
    "ranks whose sums no program holds": Case([13, 4], [ALL, MLP], most_held=4),
    "classes of rank": Case([14, 3, 5], [ALL, ALL, MLP], cut=True),
    "one class of rank": Case([3, 5], [ALL, MLP], cut=True, bare=True),
    "classes, dropout, chunks, a bare row": Case([3, 14, 22], [QV, ALL, MLP], 0.2, True, bare=True, chunk=32, cut=True),
    "classes in chunks": Case([3, 14, 5], [ALL, ALL, MLP], chunk=32, cut=True),
    "classes, some that no program holds": Case([3, 30, 14], [ALL, MLP, ALL], most_held=16, chunk=32, cut=True),
    "the same, dropped out": Case([30, 14, 3], [MLP, QV, ALL], most_held=8, drop=0.2, cut=True, bare=True),
    "the same, computed again": Case([14, 3], [ALL, ALL], most_held=8, cut=True, keep=Keep.MOST),
    "classes of long parts": Case([14, 3, 30], [ALL, ALL, MLP], most_held=16, cut=True, long=True, bare=True),
    "computed again": Case([4], [ALL], keep=Keep.INPUT),
    "half computed again": Case([4], [ALL], keep=Keep.MOST),
    "one slot in the borders": Case([5], [ALL], ride=True),
    "in the borders, some targets": Case([4], [(*QV, "down_proj")], ride=True, qk_norm=True),
    "in the borders, computed again": Case([16], [ALL], ride=True, keep=Keep.INPUT, chunk=32),
}


def rows_of(case: Case) -> list[PackRow]:
    draw, rows = np.random.default_rng(3), []
    for slot in range(len(case.ranks)):
        for index, length in enumerate((17, 40, 2, 33)):
            ids = draw.integers(1, 97, length)
            rows.append(PackRow(slot, ids, draw.random(length) < 0.5, index, draw=slot * 100 + index))
    return rows + ([bare_row(NO_SLOT, list(range(1, 20)))] if case.bare else [])


def step(case: Case, device: torch.device, *, fuse: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(every labelled token's nll, each slot's gradient)."""
    facts = tiny_facts(layers=2, qk_norm=case.qk_norm, tied=case.tied)
    plain = tiny_decoder(facts)
    decoder = Decoder(
        facts, dtype=torch.float32, device=device, fuse=fuse, ride_rank=max(case.ranks) if case.ride else 0
    )
    decoder.load_tensors(plain.named_tensors().items())
    bank = AdapterBank(facts, dtype=torch.float32, device=device)
    for i, (rank, modules) in enumerate(zip(case.ranks, case.modules, strict=True)):
        random_slot(bank, slot_shape(facts, rank=rank, scale=case.scale, modules=modules, drop=case.drop), i)
    packing = PackOptions(10_000, False, case.drop > 0.0, tile_tokens=decoder.tile_tokens)
    (batch,) = pack_rows(rows_of(case), packing, device)
    recording = decoder.record(batch, bank, [case.keep] * 2)
    hidden, index = recording.hidden_TD, batch.supervised_L
    weights = torch.linspace(0.5, 1.5, len(index), device=device)
    nll, grad = loss_and_gradient(hidden[index], decoder.head_VD, batch.labels_T[index], weights, fuse=fuse)
    recording.backward(torch.zeros_like(hidden).index_copy_(0, index, grad))
    return nll.cpu(), [s.gradients_P.cpu() for s in bank.slots.values() if s.gradients_P is not None]


@pytest.mark.parametrize("name", CASES)
def test_fused_and_plain_steps_are_the_same(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    # The tiny batch stands for one of real size: every size that a branch looks at is made small.
    monkeypatch.setattr(pack, "_WHOLE_TOKENS", case.chunk)
    monkeypatch.setattr(pack, "_CHUNKS", 2)
    monkeypatch.setattr(pack, "_CHUNK_TOKENS", 32)
    monkeypatch.setattr(blocks_triton, "MOST_RANK", case.most_rank)
    monkeypatch.setattr(swiglu_triton, "_MOST_HELD", case.most_held)
    monkeypatch.setattr(decoders, "_RIDE_TOKENS", 1)
    monkeypatch.setattr(low_rank, "_LONG_TOKENS", 1 if case.ride or case.long else 10_000)
    monkeypatch.setattr(decoders, "CUT_TOKENS", 1 if case.cut else 10_000)
    monkeypatch.setattr(low_rank_classes, "_LEAST", 8)
    nll, gradients = step(case, device, fuse=True)
    reference_nll, references = step(case, device, fuse=False)
    torch.testing.assert_close(nll, reference_nll, rtol=1e-4, atol=1e-5)
    assert len(gradients) == len(case.ranks)
    for mine, reference in zip(gradients, references, strict=True):
        assert float(reference.abs().max()) > 0.0
        assert float((mine - reference).abs().max()) <= 1e-5 * float(reference.abs().max())


def test_the_same_step_gives_the_same_bits(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """No sum depends on which program comes first."""
    monkeypatch.setattr(pack, "_WHOLE_TOKENS", 32)
    case = CASES["several chunks"]
    first, second = step(case, device, fuse=True), step(case, device, fuse=True)
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_the_base_is_the_same_after_a_slot_rode_in_its_borders(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoders, "_RIDE_TOKENS", 1)
    facts = tiny_facts(layers=2)
    plain = tiny_decoder(facts).named_tensors()
    decoder = Decoder(facts, dtype=torch.float32, device=device, fuse=True, ride_rank=8)
    decoder.load_tensors(plain.items())
    bank = AdapterBank(facts, dtype=torch.float32, device=device)
    for seed, rank in ((0, 8), (1, 3)):
        random_slot(bank, slot_shape(facts, rank=rank), seed)
    outputs = []
    for slot in (0, 1, 0, NO_SLOT):
        (batch,) = pack_rows([bare_row(slot, [5, 6, 7, 8])], PackOptions(99, tile_tokens=decoder.tile_tokens), device)
        outputs.append(decoder.forward(batch, bank))
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], outputs[1]) and not torch.allclose(outputs[0], outputs[3])
    assert all(torch.equal(tensor.cpu(), plain[name]) for name, tensor in decoder.named_tensors().items())
