"""On two GPUs: a spread base computes the bits of a whole one, and both ranks get the sums of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tenon.adapters.bank import AdapterBank
from tenon.bases.facts import ModelFacts
from tenon.data.pack import PackRow
from tenon.models.decoder import Decoder
from tenon.models.frozen import FrozenKind
from tenon.models.layer import Keep
from tenon.models.shards import Sharing
from tenon.ranks.group import ALONE, Ranks, rank_device
from tenon.train.step import StepOptions, accumulate_window, add_up
from tests.company import together
from tests.models.test_shards import NoStop
from tests.tiny import random_slot, slot_shape, tiny_facts
from tests.train.test_step import gradients, rows_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
KINDS: tuple[FrozenKind, ...] = ("dense", "fp8", "nf4")


def facts_of() -> ModelFacts:
    """Large enough for the fused kernels."""
    sizes = {"hidden": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "feed_forward": 512}
    return tiny_facts(layers=6, tied=False, qk_norm=True).model_copy(update=sizes)


def decoder_of(kind: FrozenKind, ranks: Ranks, device: torch.device, *, spread: bool) -> Decoder:
    facts = facts_of()
    sharing = Sharing(ranks, NoStop()) if spread else None
    decoder = Decoder(facts, dtype=torch.bfloat16, device=device, kind=kind, sharing=sharing)
    torch.manual_seed(0)
    for name, place in decoder.places().items():
        drawn = 0.1 * torch.randn(place.shape, device=device)
        place.put(1 + drawn if "norm" in name else drawn)
    return decoder


def window(rank: int) -> list[PackRow]:
    """Ranks with batches of different numbers."""
    return rows_of(0, 20 - 12 * rank, rank) + rows_of(1, 6, 7 + rank)


def taken(decoder: Decoder, rows: list[PackRow], ranks: Ranks) -> dict[int, torch.Tensor]:
    """The gradients of a window of two slots."""
    bank = AdapterBank(decoder.facts, dtype=decoder.dtype, device=decoder.device)
    for seed in range(2):
        random_slot(bank, slot_shape(decoder.facts, rank=8 * seed + 8), seed)
    options = StepOptions(100, True, (Keep.INPUT,) * decoder.facts.layers)
    losses = accumulate_window(decoder, bank, rows, options, ranks=ranks)
    add_up(losses, [slot.gradients_P for slot in bank.slots.values() if slot.gradients_P is not None], ranks)
    return {number: gradient.cpu() for number, gradient in gradients(bank).items()}


def both(ranks: Ranks) -> dict[str, Any]:
    """A spread base beside a whole one on this rank's own rows; then a window of both ranks beside one rank's."""
    device, found = rank_device("cuda", ranks), dict[str, Any]()
    for kind in KINDS:
        spread, whole = (decoder_of(kind, ranks, device, spread=spread) for spread in (True, False))
        found[f"{kind} spread"] = taken(spread, window(ranks.number), ALONE)
        found[f"{kind} whole"] = taken(whole, window(ranks.number), ALONE)
        found[f"{kind} both"] = taken(spread, window(0), ranks)
        found[f"{kind} one"] = taken(whole, window(0), ALONE)
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("gpus")
    return together(both, folder, kind="cuda", seconds=400)


@pytest.mark.parametrize("kind", KINDS)
def test_a_spread_base_gives_the_bits_of_a_whole_one(two: list[dict[str, Any]], kind: str) -> None:
    for found in two:
        for slot, gradient in found[f"{kind} whole"].items():
            assert gradient.abs().max() > 0
            assert torch.equal(gradient, found[f"{kind} spread"][slot])


@pytest.mark.parametrize("kind", KINDS)
def test_p03_both_ranks_have_the_gradient_of_one(two: list[dict[str, Any]], kind: str) -> None:
    for slot, gradient in two[0][f"{kind} one"].items():
        a, b = (found[f"{kind} both"][slot] for found in two)
        assert torch.equal(a, b)
        assert torch.nn.functional.cosine_similarity(a.double(), gradient.double(), dim=0) > 0.999
