"""The shelf below the frozen weights: who lies where, what goes with whom, and what the product says."""

from __future__ import annotations

import pytest
import torch

from tenon.adapters.bank import AdapterBank, Slot
from tenon.adapters.shelf import Shelf
from tenon.adapters.table_bank import BARE, BankTables, TableKind
from tenon.bases.facts import STACKS
from tenon.batch import NO_SLOT
from tenon.data.pack import list_tiles
from tenon.infer.pass_graphs import few_buckets, wide_buckets
from tenon.models.decoder import Decoder
from tenon.models.frozen import DenseLinear
from tests.tiny import CPU, random_slot, slot_shape, tiny_facts

FACTS = tiny_facts()
RANKS = 32


def shelved_decoder() -> Decoder:
    """Fused as on a GPU; nothing of it is run but single products."""
    decoder = Decoder(FACTS, dtype=torch.float32, device=CPU, fuse=True, shelf_rank=RANKS)
    torch.manual_seed(0)
    for place in decoder.places().values():
        place.put(torch.randn(place.shape))
    return decoder


def slot_of(bank: AdapterBank, rank: int, seed: int) -> Slot:
    number = random_slot(bank, slot_shape(FACTS, rank=rank), seed, trained=False)
    return bank.slots[number]


@pytest.fixture
def bank() -> AdapterBank:
    return AdapterBank(FACTS, dtype=torch.float32, device=CPU)


def test_slots_take_the_first_gap_that_is_wide_enough(bank: AdapterBank) -> None:
    shelf = Shelf(shelved_decoder())
    for seed, rank in enumerate((8, 16, 8)):
        slot_of(bank, rank, seed)
    shelf.update(bank.slots)
    assert [shelf.shift(n, "o") for n in range(3)] == [0, 8, 24]
    assert [shelf.shift(n, "qkv") for n in range(3)] == [0, 24, 72]
    bank.remove(0)
    slot_of(bank, 16, 7)  # slot 0 again: too wide for the gap of 8, and nothing else is left
    slot_of(bank, 8, 8)
    shelf.update(bank.slots)
    assert [shelf.holds(n) for n in range(4)] == [False, True, True, True]
    assert [shelf.shift(n, "o") for n in (1, 2, 3)] == [8, 24, 0]


def test_one_product_says_what_each_slots_a_says_and_leaves_the_weight_alone(bank: AdapterBank) -> None:
    decoder, x_TD = shelved_decoder(), torch.randn(5, FACTS.hidden)
    before = decoder.layers[0].stacks["qkv"].dense(0, 8).clone()
    shelf = Shelf(decoder)
    slot_of(bank, 8, 1)
    slot_of(bank, 16, 2)
    shelf.update(bank.slots)
    linear = decoder.layers[0].stacks["qkv"]
    assert isinstance(linear, DenseLinear)
    both_TX = linear.apply_shelved(x_TD, 3 * RANKS)
    assert torch.allclose(both_TX[:, : linear.outputs], linear.apply(x_TD), atol=1e-5)
    for number, slot in bank.slots.items():
        a_RD = slot.groups[0, "qkv"].a_RD
        start = linear.outputs + shelf.shift(number, "qkv")
        assert torch.allclose(both_TX[:, start : start + len(a_RD)], x_TD @ a_RD.t(), atol=1e-5)
    assert torch.equal(linear.dense(0, 8), before)


def test_a_slot_that_changed_or_came_later_is_copied_again(bank: AdapterBank) -> None:
    """Also when somebody else has brought the bank's own tables up to date in between."""
    decoder = shelved_decoder()
    bank.keep_room(2)
    tables = BankTables(bank, decoder)
    assert tables.kind([NO_SLOT], few=True) == BARE
    first = slot_of(bank, 8, 1)
    bank.fill_tables()
    kind = tables.kind([0], few=True)
    assert kind == TableKind(0, RANKS, kind.moves)
    linear = decoder.layers[0].stacks["o"]
    assert isinstance(linear, DenseLinear)
    assert torch.equal(linear.shelf(0, 8), first.groups[0, "o"].a_RD)
    bank.remove(0)
    second = slot_of(bank, 8, 2)
    bank.fill_tables()
    assert tables.kind([0], few=True) == kind
    assert torch.equal(linear.shelf(0, 8), second.groups[0, "o"].a_RD)


def test_a_slot_without_room_is_multiplied_apart(bank: AdapterBank) -> None:
    tables = BankTables(bank, shelved_decoder())
    for seed, rank in enumerate((16, 16, 8)):
        slot_of(bank, rank, seed)
    assert tables.kind([0, 1, NO_SLOT], few=True).shelved == RANKS
    assert tables.kind([0, 2], few=True) == TableKind(16, 0, bank.tables.moves)
    assert (tables.kind([0], few=False).rank, tables.kind([0], few=True).rank) == (16, 0)


def test_buckets_hold_every_pass() -> None:
    assert [bucket.tokens for bucket in few_buckets(4)] == [1, 2, 4, 8, 16, 32, 48, 64]
    assert few_buckets(100)[-1].tokens == 112
    wide = [bucket.tokens for bucket in wide_buckets(256)]
    assert wide == [128, 256, 384], "one token more than the longest pass, for what fills up"


def test_tiles_are_runs_of_one_slot() -> None:
    slots = torch.tensor([3, 3, 3, NO_SLOT, 1, 1]).numpy()
    assert list_tiles(slots, 2).tolist() == [[3, 0, 2], [3, 2, 3], [NO_SLOT, 3, 4], [1, 4, 6]]
    assert list_tiles(slots[:0], 2).shape == (0, 3)


def test_every_stack_has_room_for_all_its_modules() -> None:
    decoder = shelved_decoder()
    for stack, modules in STACKS.items():
        linear = decoder.layers[0].stacks[stack]
        assert isinstance(linear, DenseLinear) and len(linear.shelf(0, len(modules) * RANKS)) == len(modules) * RANKS
