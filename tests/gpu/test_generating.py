"""Continuing sequences on a GPU: recorded passes against passes that are not, mixed slots against each alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from tenon.adapters.bank import AdapterBank, SiteShape, SlotShape, initialise
from tenon.bases.facts import MODULE_PATHS, site_name
from tenon.batch import NO_SLOT
from tenon.data.pack import PackRow
from tenon.infer.engine import Engine
from tenon.infer.pass_graphs import PassGraphs
from tenon.infer.requests import Completion, Request
from tenon.infer.score import score
from tenon.models.cache import KvCache
from tenon.models.decoder import Decoder
from tenon.models.frozen import FrozenKind
from tests.gpu.kit import INTERPRETED
from tests.gpu.small import small_decoder, small_facts

pytestmark = pytest.mark.skipif(INTERPRETED, reason="needs a GPU: passes are recorded there")
RANKS = (4, 16, 24, 64)
PASS_TOKENS = 256


def random_base(
    device: torch.device,
    *,
    shelf_rank: int = 0,
    kind: FrozenKind = "dense",
    qk_norm: bool = False,
    window: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Decoder:
    facts = small_facts(qk_norm=qk_norm, window=window)
    return small_decoder(facts, dtype, device, fuse=True, kind=kind, shelf_rank=shelf_rank)


def make_bank(decoder: Decoder, ranks: Sequence[int] = RANKS) -> AdapterBank:
    bank = AdapterBank(decoder.facts, dtype=decoder.dtype, device=decoder.device)
    bank.keep_room(8)
    for number, rank in enumerate(ranks):
        add_slot(bank, rank, number)
    return bank


def add_slot(bank: AdapterBank, rank: int, seed: int) -> int:
    """An adapter that leaves one module of every layer out, and changes what is said."""
    modules = [m for i, m in enumerate(MODULE_PATHS) if i != seed % len(MODULE_PATHS)]
    sites = {site_name(i, m): SiteShape(rank, 2.0) for i in range(bank.facts.layers) for m in modules}
    number = bank.add(f"a{seed}", SlotShape(sites), trained=False)
    slot = bank.slots[number]
    initialise(slot, "kaiming", seed)
    generator = torch.Generator(bank.device).manual_seed(seed)
    for _, b_OR in slot.matrices().values():
        b_OR.normal_(std=0.05, generator=generator)
    slot.refresh()
    return number


def answers(
    decoder: Decoder, bank: AdapterBank, requests: Sequence[Request], *, recorded: bool, rows: int = 16
) -> list[Completion]:
    cache = KvCache(decoder.facts, places=rows, tokens=256, dtype=decoder.dtype, device=decoder.device)
    graphs = PassGraphs(decoder, bank, cache, pass_tokens=PASS_TOKENS) if recorded else None
    engine = Engine(decoder, bank, cache=cache, pass_tokens=PASS_TOKENS, graphs=graphs)
    for index, request in enumerate(requests):
        engine.submit(index, request)
    while engine.busy:
        engine.step()
    return [engine.completions[index] for index in range(len(requests))]


def requests_of(decoder: Decoder, slots: Sequence[int], count: int = 12, tokens: int = 40) -> list[Request]:
    generator = torch.Generator().manual_seed(3)
    return [
        Request(
            torch.randint(0, decoder.facts.vocab, (5 + 11 * i,), generator=generator).tolist(),
            slot=slots[i % len(slots)],
            max_new_tokens=tokens,
        )
        for i in range(count)
    ]


def assert_alike(found: Sequence[Completion], wanted: Sequence[Completion], bound: float) -> None:
    """The same tokens with log probabilities within the bound; after the first near-tie that fell otherwise, nothing
    is asked. A random base has near-ties: up to half of the answers may have one.
    """
    parted = 0
    for one, other in zip(found, wanted, strict=True):
        same = 0
        while same < min(len(one.ids), len(other.ids)) and one.ids[same] == other.ids[same]:
            same += 1
        parted += same < len(other.ids)
        pairs = zip(one.logprobs[:same], other.logprobs[:same], strict=True)
        assert max((abs(a - b) for a, b in pairs), default=0.0) <= bound
    assert parted <= len(wanted) // 2, f"{parted} of {len(wanted)} answers went another way"


def largest_difference(
    decoder: Decoder, bank: AdapterBank, requests: Sequence[Request], said: Sequence[Completion]
) -> float:
    """Between the log probabilities of what was said and those of one pass over all of it, by training's attention."""
    rows = [
        PackRow(
            request.slot,
            np.array([*request.prompt_ids, *one.ids], dtype=np.int32),
            np.array([False] * len(request.prompt_ids) + [True] * len(one.ids)),
            i,
        )
        for i, (request, one) in enumerate(zip(requests, said, strict=True))
    ]
    scores = score(decoder, bank, rows, share_prefix=False)
    pairs = zip(said, scores, strict=True)
    return max(float(np.abs(np.array(one.logprobs) - scored.logprobs).max()) for one, scored in pairs)


@pytest.mark.parametrize("shelf", [0, 32, 128], ids=["no shelf", "a shelf for some", "a shelf for all"])
def test_recorded_passes_say_what_others_do(device: torch.device, shelf: int) -> None:
    decoder = random_base(device, shelf_rank=shelf)
    bank = make_bank(decoder)
    requests = requests_of(decoder, [NO_SLOT, 0, 1, 2, 3])
    assert_alike(answers(decoder, bank, requests, recorded=True), answers(decoder, bank, requests, recorded=False), 0.1)


@pytest.mark.parametrize("kind", ["fp8", "int8", "nf4"])
def test_quantised_bases(device: torch.device, kind: FrozenKind) -> None:
    """Their scores move more with the shape of a product, so the tokens of a random base part sooner."""
    decoder = random_base(device, kind=kind, shelf_rank=128)
    bank = make_bank(decoder)
    requests = requests_of(decoder, [NO_SLOT, 0, 1, 2, 3])
    for recorded in (True, False):
        said = answers(decoder, bank, requests, recorded=recorded)
        assert largest_difference(decoder, bank, requests, said) <= 0.3


@pytest.mark.parametrize("base", [{}, {"qk_norm": True}, {"window": 24}, {"dtype": torch.float16}], ids=str)
@pytest.mark.parametrize("recorded", [True, False])
def test_what_is_said_is_as_likely_as_without_a_cache(
    device: torch.device, recorded: bool, base: dict[str, Any]
) -> None:
    decoder = random_base(device, shelf_rank=128, **base)
    bank = make_bank(decoder)
    requests = requests_of(decoder, [NO_SLOT, 0, 1, 2, 3])
    said = answers(decoder, bank, requests, recorded=recorded)
    assert all(len(one.ids) == 40 for one in said)
    assert largest_difference(decoder, bank, requests, said) <= 0.1


def test_adapters_change_what_is_said(device: torch.device) -> None:
    """Else the test above would show nothing."""
    decoder = random_base(device, shelf_rank=128)
    bank = make_bank(decoder)
    said = [answers(decoder, bank, requests_of(decoder, [slot], 1), recorded=True)[0].ids for slot in (NO_SLOT, 0, 3)]
    assert len(set(said)) == 3


@pytest.mark.parametrize("shelf", [0, 128])
def test_recorded_passes_serve_slots_that_come_later(device: torch.device, shelf: int) -> None:
    """A slot goes, another of larger rank comes into its number; the same graphs, or new ones, say what it says."""
    decoder = random_base(device, shelf_rank=shelf)
    bank = make_bank(decoder, (8, 8))
    cache = KvCache(decoder.facts, places=8, tokens=256, dtype=decoder.dtype, device=decoder.device)
    graphs = PassGraphs(decoder, bank, cache, pass_tokens=PASS_TOKENS)
    graphs.record_all()

    def ask(slot: int) -> Completion:
        engine = Engine(decoder, bank, cache=cache, pass_tokens=PASS_TOKENS, graphs=graphs)
        engine.submit(0, requests_of(decoder, [slot], 1)[0])
        while engine.busy:
            engine.step()
        return engine.completions[0]

    before = ask(0)
    bank.remove(0)
    assert add_slot(bank, 40, 7) == 0
    after = ask(0)
    assert after.ids != before.ids
    assert largest_difference(decoder, bank, requests_of(decoder, [0], 1), [after]) <= 0.1
    bank.remove(0)
    assert add_slot(bank, 8, 0) == 0
    assert ask(0) == before


def test_company_changes_little(device: torch.device) -> None:
    """The same request alone and among others: other buckets have other products, so last bits may differ."""
    decoder = random_base(device, shelf_rank=128)
    bank = make_bank(decoder)
    requests = requests_of(decoder, [NO_SLOT, 0, 1, 2, 3])
    alone = [answers(decoder, bank, [request], recorded=True)[0] for request in requests]
    assert_alike(answers(decoder, bank, requests, recorded=True), alone, 0.1)


def test_a_full_cache_makes_rows_wait(device: torch.device) -> None:
    """Rows that lost their blocks are computed again, and say the same."""
    decoder = random_base(device, shelf_rank=128)
    bank = make_bank(decoder)
    requests = requests_of(decoder, [NO_SLOT, 0, 1], count=8, tokens=60)
    roomy = answers(decoder, bank, requests, recorded=True)
    small = KvCache(
        decoder.facts,
        places=8,
        tokens=256,
        dtype=decoder.dtype,
        device=decoder.device,
        budget_bytes=2 * 24 * 16 * 2 * decoder.facts.layers * decoder.facts.kv_heads * decoder.facts.head_dim,
    )
    engine = Engine(
        decoder,
        bank,
        cache=small,
        pass_tokens=PASS_TOKENS,
        graphs=PassGraphs(decoder, bank, small, pass_tokens=PASS_TOKENS),
    )
    for index, request in enumerate(requests):
        engine.submit(index, request)
    while engine.busy:
        engine.step()
    assert engine.stats().preemptions > 0
    assert_alike([engine.completions[i] for i in range(len(requests))], roomy, 0.1)
