"""Optimisers over flat parameters: the zeros that fill ranks up, their memory, and states that do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tenon.adapters import bank as banks
from tenon.adapters.bank import AdapterBank, Slot
from tenon.data.pack import PackOptions, bare_row, pack_rows
from tenon.plan.memory import adapter_parameters, stored_parameters
from tenon.train.optimizers import SlotOptimizer
from tests.tiny import CPU, random_slot, slot_shape, tiny_decoder, tiny_facts
from tests.train.world import Asked, optimizer_plan

FACTS = tiny_facts()
KINDS = ["adamw", "sgd", "adamw8bit"]


def filling(slot: Slot, flat_P: Tensor) -> float:
    """The largest element of a flat tensor that belongs to no matrix."""
    rest_P = flat_P.detach().clone()
    for pair in slot.views(rest_P).values():
        for matrix in pair:
            matrix.zero_()
    return float(rest_P.abs().max())


def train(kind: str, rank: int) -> tuple[Slot, SlotOptimizer]:
    """A few steps with decay, momentum and clipping; all fillings are looked at on the way."""
    decoder, bank = tiny_decoder(FACTS), AdapterBank(FACTS, dtype=torch.float32, device=CPU)
    slot = bank.slots[random_slot(bank, slot_shape(FACTS, rank=rank), 1)]
    plan = optimizer_plan(kind, lr=0.05, clip=0.5).model_copy(update={"weight_decay": 0.3})
    optimizer = SlotOptimizer(slot, plan)
    (batch,) = pack_rows([bare_row(0, [5, 9, 77, 3, 42])], PackOptions(99), CPU)
    for _ in range(5):
        recording = decoder.record(batch, bank)
        recording.backward(torch.randn(recording.hidden_TD.shape, generator=torch.Generator().manual_seed(3)))
        assert filling(slot, optimizer.gradients_P) == 0.0 and bool(optimizer.gradients_P.any())
        optimizer.clip()
        optimizer.step(1.0)
        assert filling(slot, slot.parameters_P) == 0.0
    return slot, optimizer


@pytest.mark.parametrize("kind", KINDS)
def test_the_zeros_that_fill_ranks_up_stay_zero(kind: str) -> None:
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    slot, optimizer = train(kind, rank=3)
    assert slot.parameters_P.numel() > sum(a.numel() + b.numel() for a, b in slot.matrices().values())
    assert len(optimizer.state()) >= 2


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_slot_learns_what_it_would_without_them(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    filled = train(kind, rank=3)[0].matrices()
    monkeypatch.setattr(banks, "RANK_STEP", 1)
    alone = train(kind, rank=3)[0].matrices()
    for site, pair in alone.items():
        torch.testing.assert_close(filled[site], pair, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rank", [3, 8, 12])
def test_a_slot_takes_the_memory_that_is_planned(rank: int) -> None:
    slot = train("adamw", rank)[0]
    plan = Asked(rank=rank).plan().lora.model_copy(update={"sites": tuple(slot.shape.sites)})
    assert stored_parameters(FACTS, plan) == slot.parameters_P.numel()
    assert adapter_parameters(FACTS, plan) == sum(a.numel() + b.numel() for a, b in slot.matrices().values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_another_size_is_refused(kind: str) -> None:
    """Such as one that was saved when ranks were not filled up."""
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    _, own = train(kind, rank=3)
    _, other = train(kind, rank=9)
    own.load_state(own.state())
    with pytest.raises(ValueError, match="elements"):
        own.load_state(other.state())
