"""The bank: numbers, strictness, shadow copies, and starts that are distributed as PEFT's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from tenon.adapters.bank import AdapterBank, SiteShape, SlotShape, initialise
from tenon.adapters.peft_files import fill_slot, load_adapter, read_adapter, write_adapter
from tenon.bases.facts import MODULE_PATHS, STACKS, site_name
from tenon.batch import NO_SLOT
from tenon.data.pack import PackOptions, bare_row, pack_rows
from tenon.errors import AdapterError
from tests.tiny import CPU, random_slot, slot_shape, tiny_decoder, tiny_facts

FACTS = tiny_facts()
IDS = [5, 9, 77, 3, 42]


def empty_bank(dtype: torch.dtype = torch.float32) -> AdapterBank:
    return AdapterBank(FACTS, dtype=dtype, device=CPU)


def test_a_slot_gets_the_lowest_free_number() -> None:
    bank = empty_bank()
    assert [bank.add(name, slot_shape(FACTS), trained=False) for name in "abc"] == [0, 1, 2]
    bank.remove(1)
    bank.remove(0)
    assert bank.add("d", slot_shape(FACTS), trained=False) == 0
    assert bank.add("e", slot_shape(FACTS), trained=False) == 1
    assert bank.add("f", slot_shape(FACTS), trained=False) == 3
    assert [bank.slots[n].name for n in range(4)] == ["d", "e", "c", "f"]


def test_a_batch_of_a_slot_that_was_removed_is_refused() -> None:
    decoder, bank = tiny_decoder(FACTS), empty_bank()
    random_slot(bank, slot_shape(FACTS), 1)
    (batch,) = pack_rows([bare_row(0, IDS)], PackOptions(99), CPU)
    decoder.forward(batch, bank)
    bank.remove(0)
    with pytest.raises(KeyError):
        decoder.forward(batch, bank)


def test_p17_another_adapter_in_the_same_place_is_never_taken_for_the_one_before() -> None:
    decoder, bank, other = tiny_decoder(FACTS), empty_bank(), empty_bank()
    random_slot(bank, slot_shape(FACTS, rank=2), 1)
    random_slot(other, slot_shape(FACTS, rank=5), 2)
    (batch,) = pack_rows([bare_row(NO_SLOT, IDS), bare_row(0, IDS)], PackOptions(99, share_prefix=False), CPU)
    before = decoder.forward(batch, bank)
    assert torch.equal(decoder.forward(batch, bank), before)
    bank.remove(0)
    random_slot(bank, slot_shape(FACTS, rank=5), 2)
    assert torch.equal(decoder.forward(batch, bank), decoder.forward(batch, other))
    assert not torch.equal(decoder.forward(batch, bank), before)


def test_a_fresh_slot_changes_nothing_and_a_filled_one_only_its_own_rows() -> None:
    decoder, bank = tiny_decoder(FACTS), empty_bank()
    bank.add("zero", slot_shape(FACTS), trained=True)
    initialise(bank.slots[0], "kaiming", 0)
    random_slot(bank, slot_shape(FACTS), 1)
    (batch,) = pack_rows([bare_row(s, IDS) for s in (NO_SLOT, 0, 1)], PackOptions(99, share_prefix=False), CPU)
    with torch.no_grad():
        bare, fresh, filled = decoder.forward(batch, bank).chunk(3)
    torch.testing.assert_close(fresh, bare, rtol=0, atol=0)
    assert (filled - bare).abs().max() > 1e-3


def test_p17_the_bytes_of_the_base_never_change() -> None:
    decoder, bank = tiny_decoder(FACTS), empty_bank()
    before = {name: tensor.clone() for name, tensor in decoder.named_tensors().items()}
    for seed in (1, 2):
        random_slot(bank, slot_shape(FACTS), seed)
    for batch in pack_rows([bare_row(s, IDS) for s in (0, 1, NO_SLOT)], PackOptions(99), CPU):
        recording = decoder.record(batch, bank)
        recording.backward(torch.ones_like(recording.hidden_TD))
    bank.remove(0)
    assert len(before) == 2 + 3 * (2 + 7)
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.named_tensors().items())


@pytest.mark.parametrize(
    ("site", "named"),
    [("layers.3.self_attn.q_proj", "layers.3."), ("layers.0.self_attn.qkv", "layers.0.self_attn.qkv")],
)
def test_p13_a_matrix_that_the_base_lacks_is_an_error_that_names_it(site: str, named: str) -> None:
    bank = empty_bank()
    good = site_name(0, "q_proj")
    with pytest.raises(AdapterError) as caught:
        bank.add("x", SlotShape({good: SiteShape(2, 1.0), site: SiteShape(2, 1.0)}), trained=False)
    assert caught.value.code == "adapter-target-missing" and named in caught.value.what
    assert "1 of 2" in caught.value.got and not bank.slots


def test_p13_a_slot_that_adapts_nothing_is_refused() -> None:
    with pytest.raises(AdapterError, match="adapter-target-missing"):
        empty_bank().add("x", SlotShape({}), trained=False)


@pytest.mark.parametrize(("module", "rank", "most"), [("q_proj", 33, 32), ("k_proj", 17, 16), ("down_proj", 0, 32)])
def test_a_rank_that_does_not_fit_is_refused_with_those_that_do(module: str, rank: int, most: int) -> None:
    bank = empty_bank()
    with pytest.raises(AdapterError) as caught:
        bank.add("x", SlotShape({site_name(1, module): SiteShape(rank, 1.0)}), trained=False)
    assert caught.value.code == "adapter-rank" and f"1 to {most}" in caught.value.hint
    bank.add("x", SlotShape({site_name(1, module): SiteShape(most, 1.0)}), trained=False)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_every_parameter_belongs_to_exactly_one_matrix(data: st.DataObject) -> None:
    """Whatever ranks and targets: A matrices first, then B, no overlap, nothing between them but the zeros that fill
    ranks up, and stacks are one view.
    """
    names = [site_name(layer, module) for layer in range(3) for module in MODULE_PATHS]
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    shape = SlotShape({site: SiteShape(data.draw(st.integers(1, 10)), 1.0) for site in chosen})
    bank = empty_bank()
    slot = bank.slots[bank.add("x", shape, trained=True)]
    for number, (a_RD, b_OR) in enumerate(slot.matrices().values(), start=1):
        a_RD.add_(number)
        b_OR.add_(-number)
    halves = slot.parameters_P[: slot.a_parameters], slot.parameters_P[slot.a_parameters :]
    assert bool((halves[0] >= 0).all()) and bool((halves[1] <= 0).all())
    for half, mine in zip(halves, zip(*slot.matrices().values(), strict=True), strict=True):
        assert int(half.count_nonzero()) == sum(matrix.numel() for matrix in mine)
        assert half.numel() == sum(
            -(-shape.sites[site].rank // 8) * 8 * (m.numel() // shape.sites[site].rank)
            for site, m in zip(slot.matrices(), mine, strict=True)
        )
    seen = 0
    for (layer, stack), group in slot.groups.items():
        own = [site_name(layer, module) for module in STACKS[stack] if site_name(layer, module) in shape.sites]
        assert len(group.members) == len(own) and group.members[-1].rank_stop == group.a_RD.shape[0]
        for site, m in zip(own, group.members, strict=True):
            a_RD, b_OR = slot.matrices()[site]
            rank = shape.sites[site].rank
            assert torch.equal(group.a_RD[m.rank_start : m.rank_start + rank], a_RD) and not m.rank_start % 8
            assert torch.equal(m.b_OR[:, :rank], b_OR) and not m.b_OR[:, rank:].any()
            assert not group.a_RD[m.rank_start + rank : m.rank_stop].any()
        seen += len(own)
    assert seen == len(chosen)


def test_ordinary_ranks_are_stored_as_they_are() -> None:
    for rank in (8, 16):
        bank = empty_bank()
        slot = bank.slots[bank.add("x", slot_shape(FACTS, rank=rank), trained=True)]
        assert slot.parameters_P.numel() == sum(a.numel() + b.numel() for a, b in slot.matrices().values())
        assert all(matrix.is_contiguous() for pair in slot.matrices().values() for matrix in pair)


def test_a_rider_is_never_taken_for_one_that_is_gone() -> None:
    """Though it lies where that one lay, and was refreshed as often."""
    bank, seen = empty_bank(), []
    (batch,) = pack_rows([bare_row(0, IDS)], PackOptions(99), CPU)
    for seed in range(5):
        random_slot(bank, slot_shape(FACTS), seed)
        rider = bank.rider(batch)
        assert rider is not None and bank.rider(batch) == rider and rider.state not in seen
        seen.append(rider.state)
        bank.remove(0)


def test_refresh_brings_the_shadow_copy_up_to_date_in_bf16() -> None:
    bank = empty_bank(torch.bfloat16)
    slot = bank.slots[bank.add("x", slot_shape(FACTS, rank=4), trained=True)]
    group = slot.groups[0, "qkv"]
    assert group.a_RD.dtype == torch.bfloat16 and slot.parameters_P.dtype == torch.float32
    assert group.grad_a_RD is not None and group.grad_a_RD.dtype == torch.float32
    slot.parameters_P.fill_(1.0 + 2.0**-12)
    assert not group.a_RD.any()
    slot.refresh()
    assert bool((group.a_RD == 1.0).all()) and bool((group.members[2].b_OR == 1.0).all())
    assert bool((slot.parameters_P == 1.0 + 2.0**-12).all())


def test_initialise_and_fill_refresh_by_themselves(tmp_path: Path) -> None:
    bank = empty_bank(torch.bfloat16)
    slot = bank.slots[bank.add("x", slot_shape(FACTS, rank=4), trained=True)]
    initialise(slot, "gaussian", 3)
    a_RD = slot.matrices()[site_name(0, "o_proj")][0].clone()
    assert torch.equal(slot.groups[0, "o"].a_RD[:4], a_RD.bfloat16()) and bool(a_RD.any())
    write_adapter(tmp_path, slot, base="b")
    initialise(slot, "gaussian", 4)
    fill_slot(slot, read_adapter(tmp_path))
    assert torch.equal(slot.groups[0, "o"].a_RD[:4], a_RD.bfloat16())
    assert torch.equal(slot.matrices()[site_name(0, "o_proj")][0], a_RD)


def test_filling_wants_the_same_matrices(tmp_path: Path) -> None:
    bank = empty_bank()
    own = bank.slots[bank.add("own", slot_shape(FACTS, rank=4, modules=("q_proj",)), trained=True)]
    for name, modules, rank in (("more", ("q_proj", "v_proj"), 4), ("rank", ("q_proj",), 3)):
        other = bank.slots[bank.add(name, slot_shape(FACTS, rank=rank, modules=modules), trained=False)]
        (tmp_path / name).mkdir()
        write_adapter(tmp_path / name, other, base="b")
    before = own.parameters_P.clone()
    with pytest.raises(AdapterError, match=r"v_proj.*recipe"):
        fill_slot(own, read_adapter(tmp_path / "more"))
    with pytest.raises(AdapterError, match=r"q_proj.lora_A does not fit"):
        fill_slot(own, read_adapter(tmp_path / "rank"))
    assert torch.equal(own.parameters_P, before)


def test_a_pickle_beside_an_adapter_is_not_looked_at(tmp_path: Path) -> None:
    """Trainers leave training_args.bin beside what they save; reading takes the two files of the adapter alone."""
    bank = empty_bank()
    random_slot(bank, slot_shape(FACTS), 1)
    write_adapter(tmp_path, bank.slots[0], base="b")
    (tmp_path / "training_args.bin").write_bytes(b"\x80\x04.")
    number = load_adapter(bank, "again", read_adapter(tmp_path))
    assert torch.equal(bank.slots[number].parameters_P, bank.slots[0].parameters_P)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(.*)(.*)(.*)x", "[a-z]*" * 9])
def test_p35_a_pattern_of_a_foreign_config_cannot_make_reading_run_for_ever(tmp_path: Path, pattern: str) -> None:
    bank = empty_bank()
    random_slot(bank, slot_shape(FACTS), 1)
    write_adapter(tmp_path, bank.slots[0], base="b")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rank_pattern": {pattern: 4}}))
    with pytest.raises(AdapterError) as caught:
        read_adapter(tmp_path)
    assert caught.value.code == "adapter-config" and "too complicated" in caught.value.what


class _OneLinear(nn.Module):
    """What PEFT needs to draw the start of one matrix."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(inputs, outputs, bias=False)


def pefts_start(kind: bool | str, rank: int, inputs: int) -> torch.Tensor:
    """A of a fresh PEFT adapter."""
    torch.manual_seed(0)
    config = LoraConfig(r=rank, target_modules=["q_proj"], init_lora_weights=kind)  # type: ignore[arg-type]
    return get_peft_model(_OneLinear(inputs, 8), config).q_proj.lora_A["default"].weight.detach()  # type: ignore[union-attr]


def our_start(kind: str, rank: int, hidden: int = 512, seed: int = 0) -> torch.Tensor:
    facts = FACTS.model_copy(update={"hidden": hidden, "head_dim": hidden // 4})
    bank = AdapterBank(facts, dtype=torch.float32, device=CPU)
    site = site_name(0, "q_proj")
    slot = bank.slots[bank.add("x", SlotShape({site: SiteShape(rank, 1.0)}), trained=False)]
    initialise(slot, kind, seed)  # type: ignore[arg-type]
    a_RD, b_OR = slot.matrices()[site]
    assert not b_OR.any()
    return a_RD.clone()


@pytest.mark.parametrize(("kind", "theirs"), [("kaiming", True), ("gaussian", "gaussian")])
def test_starts_are_distributed_as_pefts(kind: str, theirs: bool | str) -> None:
    """The same quantiles, of 16 x 512 draws."""
    ours, other = our_start(kind, 16).flatten(), pefts_start(theirs, 16, 512).flatten()
    assert ours.numel() == other.numel() == 8192
    levels = [0.001, 0.05, 0.25, 0.5, 0.75, 0.95, 0.999]
    spread = float(other.std())
    np.testing.assert_allclose(
        np.quantile(ours.numpy(), levels), np.quantile(other.numpy(), levels), atol=0.25 * spread, rtol=0
    )
    assert float(ours.std()) == pytest.approx(spread, rel=0.05) and abs(float(ours.mean())) < 0.05 * spread
    if kind == "kaiming":
        assert float(ours.abs().max()) <= 512**-0.5


def test_orthogonal_rows_are_orthonormal() -> None:
    a_RD = our_start("orthogonal", 16)
    torch.testing.assert_close(a_RD @ a_RD.t(), torch.eye(16), rtol=0, atol=1e-5)


def test_p21_a_start_depends_on_seed_and_matrix_alone() -> None:
    assert torch.equal(our_start("kaiming", 8, seed=7), our_start("kaiming", 8, seed=7))
    assert not torch.equal(our_start("kaiming", 8, seed=7), our_start("kaiming", 8, seed=8))
    alone, among = empty_bank(), empty_bank()
    alone.add("x", slot_shape(FACTS, modules=("v_proj",)), trained=False)
    among.add("y", slot_shape(FACTS), trained=False)
    for bank in (alone, among):
        initialise(bank.slots[0], "kaiming", 1)
    for site, (a_RD, _) in alone.slots[0].matrices().items():
        assert torch.equal(a_RD, among.slots[0].matrices()[site][0])
