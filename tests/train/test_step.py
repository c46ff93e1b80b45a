"""The step's arithmetic: any split of a window, any company, the last short window, nothing supervised."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenon.adapters.bank import AdapterBank
from tenon.data.pack import PackRow
from tenon.models.decoder import Decoder
from tenon.models.layer import Keep
from tenon.train.step import StepOptions, accumulate_window, supervised_count
from tests.tiny import CPU, random_slot, slot_shape, tiny_decoder


def rows_of(slot: int, count: int, seed: int) -> list[PackRow]:
    """Rows of 2 to 30 tokens, a random part of each supervised."""
    draw = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        ids = draw.integers(1, 97, int(draw.integers(2, 31)))
        rows.append(PackRow(slot, ids, draw.random(len(ids)) < 0.4, index, draw=seed * 100 + index))
    return rows


def bank_of(shapes: int, decoder: Decoder, dtype: torch.dtype = torch.float32) -> AdapterBank:
    """Slots of rank 2, 4, … at different modules."""
    facts = decoder.facts
    bank = AdapterBank(facts, dtype=dtype, device=CPU)
    modules = [
        ("q_proj", "v_proj"),
        ("gate_proj", "up_proj", "down_proj"),
        ("o_proj",),
        ("q_proj", "k_proj", "up_proj"),
    ]
    for i in range(shapes):
        random_slot(bank, slot_shape(facts, rank=2 * i + 2, scale=0.5 + i, modules=modules[i]), i)
    return bank


def gradients(bank: AdapterBank) -> dict[int, torch.Tensor]:
    """Each slot's flat gradient, which is then zero again."""
    found = {}
    for number, slot in bank.slots.items():
        assert slot.gradients_P is not None
        found[number] = slot.gradients_P.clone()
        slot.gradients_P.zero_()
    return found


@settings(max_examples=20, deadline=None)
@given(micro=st.integers(20, 400), seed=st.integers(0, 1000), share=st.booleans())
def test_p01_any_split_of_a_window_gives_the_same_gradient(micro: int, seed: int, share: bool) -> None:
    decoder = tiny_decoder()
    bank = bank_of(1, decoder)
    rows = rows_of(0, 12, seed)
    whole = accumulate_window(decoder, bank, rows, StepOptions(100_000, False))
    expected = gradients(bank)[0]
    split = accumulate_window(decoder, bank, rows, StepOptions(micro, share))
    torch.testing.assert_close(gradients(bank)[0], expected, rtol=0, atol=1e-6)
    assert split[0].loss == pytest.approx(whole[0].loss, rel=1e-5)


def test_p01_the_loss_is_the_mean_over_supervised_tokens_not_over_rows() -> None:
    """Two rows with 1 and 20 supervised tokens: the mean of 21 tokens, whatever the batches."""
    decoder = tiny_decoder()
    bank = bank_of(1, decoder)
    draw = np.random.default_rng(0)
    short, long = draw.integers(1, 97, 3), draw.integers(1, 97, 21)
    rows = [
        PackRow(0, short, np.array([False, False, True])),
        PackRow(0, long, np.array([False] + [True] * 20)),
    ]
    both = accumulate_window(decoder, bank, rows, StepOptions(8, False))[0]
    one, other = (accumulate_window(decoder, bank, [r], StepOptions(99, False))[0] for r in rows)
    assert (one.supervised_tokens, other.supervised_tokens, both.supervised_tokens) == (1, 20, 21)
    assert both.loss == pytest.approx((one.loss + 20 * other.loss) / 21, rel=1e-6)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), micro=st.integers(40, 2000))
def test_p06_slots_trained_together_get_the_gradients_of_each_alone(seed: int, micro: int) -> None:
    decoder = tiny_decoder()
    bank = bank_of(4, decoder)
    rows = [row for slot in range(4) for row in rows_of(slot, 3 + slot, seed + slot)]
    np.random.default_rng(seed).shuffle(rows)  # type: ignore[arg-type]
    together_losses = accumulate_window(decoder, bank, rows, StepOptions(micro, True))
    together = gradients(bank)
    for slot in range(4):
        alone = accumulate_window(decoder, bank, [r for r in rows if r.slot == slot], StepOptions(9999, True))
        own = gradients(bank)[slot]
        assert float((together[slot] - own).abs().max()) <= 1e-5 * float(own.abs().max())
        assert together_losses[slot].loss == pytest.approx(alone[slot].loss, rel=1e-5)


def test_a_window_with_nothing_supervised_gives_zero_and_no_gradient() -> None:
    decoder = tiny_decoder()
    bank = bank_of(1, decoder)
    rows = [PackRow(0, np.array([3, 4, 5]), np.zeros(3, dtype=bool))]
    assert accumulate_window(decoder, bank, rows, StepOptions(99, False))[0].loss == 0.0
    assert not gradients(bank)[0].any()


def test_the_first_token_of_a_row_carries_no_loss() -> None:
    assert supervised_count(PackRow(0, np.array([3, 4, 5]), np.array([True, False, True]))) == 1


def test_recomputed_layers_give_the_same_gradient() -> None:
    decoder = tiny_decoder()
    bank = bank_of(2, decoder)
    rows = rows_of(0, 5, 3) + rows_of(1, 5, 4)
    accumulate_window(decoder, bank, rows, StepOptions(200, True))
    expected = gradients(bank)
    accumulate_window(decoder, bank, rows, StepOptions(200, True, (Keep.INPUT,) * decoder.facts.layers))
    for number, gradient in gradients(bank).items():
        torch.testing.assert_close(gradient, expected[number], rtol=0, atol=0)


def test_bf16_gradients_point_the_same_way() -> None:
    exact, rounded = tiny_decoder(), tiny_decoder(dtype=torch.bfloat16)
    banks = [bank_of(1, exact), bank_of(1, rounded, torch.bfloat16)]
    rows = rows_of(0, 8, 5)
    found = []
    for decoder, bank in zip((exact, rounded), banks, strict=True):
        accumulate_window(decoder, bank, rows, StepOptions(9999, True))
        found.append(gradients(bank)[0])
    assert torch.cosine_similarity(found[0], found[1], dim=0) > 0.995
