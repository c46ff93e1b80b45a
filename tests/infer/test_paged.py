"""The engine over a paged cache: a small pool, remembered prefixes and cancelled requests change no token."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tenon.adapters.bank import AdapterBank
from tenon.batch import NO_SLOT
from tenon.errors import TenonError
from tenon.infer.engine import Engine
from tenon.infer.generate import generate
from tenon.infer.requests import Completion, OnToken, Request, Token
from tenon.models.cache import KvCache, token_bytes
from tenon.models.decoder import Decoder
from tests.tiny import CPU, random_slot, slot_shape, tiny_decoder, tiny_facts

BLOCK = 4
House = tuple[Decoder, AdapterBank, list[int]]


def make_house(window: int = 0) -> House:
    decoder = tiny_decoder(tiny_facts(window=window))
    bank = AdapterBank(decoder.facts, dtype=torch.float32, device=CPU)
    return decoder, bank, [NO_SLOT, *(random_slot(bank, slot_shape(decoder.facts, rank=r), r) for r in (2, 5))]


HOUSE = make_house()


def engine_of(
    house: House,
    *,
    blocks: int,
    rows: int = 4,
    pass_tokens: int = 64,
    keep_prefixes: bool = True,
    on_token: OnToken | None = None,
) -> Engine:
    decoder, bank, _ = house
    cache = KvCache(
        decoder.facts,
        places=rows,
        tokens=200,
        dtype=torch.float32,
        device=CPU,
        budget_bytes=blocks * BLOCK * token_bytes(decoder.facts, torch.float32),
        block_tokens=BLOCK,
    )
    assert cache.pool.total == blocks
    return Engine(decoder, bank, cache=cache, pass_tokens=pass_tokens, keep_prefixes=keep_prefixes, on_token=on_token)


def run(engine: Engine, requests: Sequence[Request]) -> list[Completion]:
    first = len(engine.completions)
    for index, request in enumerate(requests, start=first):
        engine.submit(index, request)
    while engine.busy:
        engine.step()
        stats = engine.stats()
        assert 0 <= stats.blocks_used + stats.blocks_cached <= stats.blocks_total
    assert engine.stats().blocks_used == 0
    return [engine.completions[index] for index in range(first, first + len(requests))]


def assert_same(found: Sequence[Completion], expected: Sequence[Completion]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.ids, one.finish) == (other.ids, other.finish)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        assert one.draft_logprobs == pytest.approx(other.draft_logprobs, abs=1e-5)
        assert [t.id for t in one.prompt] == [t.id for t in other.prompt]
        assert [t.logprob for t in one.prompt] == pytest.approx([t.logprob for t in other.prompt], abs=1e-5)


@st.composite
def requests_of_any_kind(draw: st.DrawFn) -> list[Request]:
    """Prompts of which many begin alike, with and without drafts, drawn and greedy, for any slot."""
    stems = [list(range(10, 10 + 3 * BLOCK)), list(range(40, 40 + 2 * BLOCK + 1))]
    made = []
    for seed in range(draw(st.integers(1, 6))):
        tail = draw(st.lists(st.integers(3, 96), min_size=1, max_size=9))
        made.append(
            Request(
                [*draw(st.sampled_from([[], *stems])), *tail],
                slot=draw(st.sampled_from(HOUSE[2])),
                max_new_tokens=draw(st.integers(1, 20)),
                temperature=draw(st.sampled_from([0.0, 1.0])),
                draft_ids=draw(st.sampled_from([(), (7, 8, 9), tuple(range(20, 34))])),
                prompt_logprobs=draw(st.booleans()),
                seed=seed,
            )
        )
    return made


@given(requests_of_any_kind(), st.integers(15, 40), st.sampled_from([1, 5, 64]), st.booleans())
@hypothesis_settings(deadline=None, max_examples=60)
def test_no_pool_and_no_memory_of_earlier_prompts_changes_an_answer(
    requests: list[Request], blocks: int, pass_tokens: int, keep_prefixes: bool
) -> None:
    decoder, bank, _ = HOUSE
    engine = engine_of(HOUSE, blocks=blocks, pass_tokens=pass_tokens, keep_prefixes=keep_prefixes)
    # Scores of a prompt are part of what `generate` gives to each alone.
    expected = [generate(decoder, bank, [request])[0] for request in requests]
    assert_same(run(engine, requests), expected)
    assert_same(run(engine, requests), expected)


def test_blocks_give_the_bits_of_a_contiguous_cache() -> None:
    """A block as long as the longest sequence is a plain cache: each place one stretch of it."""
    decoder, bank, slots = HOUSE
    requests = [Request(range(3, 8 + 5 * i), slot=slots[i % 3], max_new_tokens=9 + 7 * i) for i in range(9)]
    found = []
    for block_tokens in (BLOCK, 200):
        cache = KvCache(decoder.facts, places=4, tokens=200, dtype=torch.float32, device=CPU, block_tokens=block_tokens)
        assert cache.home_blocks == 200 // block_tokens
        found.append(run(Engine(decoder, bank, cache=cache, pass_tokens=32), requests))
    assert found[0] == found[1]


@pytest.mark.parametrize("window", [0, 6])
def test_who_is_preempted_answers_as_with_plenty_of_memory(window: int) -> None:
    house = make_house(window)
    told: dict[int, list[int]] = {}
    requests = [
        Request([5 + i, 9, 33, 60, 8 + i], slot=house[2][i % 3], max_new_tokens=40, temperature=i % 2, seed=i)
        for i in range(6)
    ]

    def tell(index: int, token: Token) -> None:
        told.setdefault(index, []).append(token.id)

    tight = engine_of(house, blocks=20, keep_prefixes=False, on_token=tell)
    found = run(tight, requests)
    plenty = engine_of(house, blocks=200, keep_prefixes=False)
    assert_same(found, run(plenty, requests))
    assert tight.stats().preemptions > 0 == plenty.stats().preemptions
    assert [list(c.ids) for c in found] == [told[i] for i in range(6)]  # each token was told once


def test_the_oldest_is_never_preempted() -> None:
    finished: list[int] = []
    engine = engine_of(HOUSE, blocks=14)
    for index in range(4):
        engine.submit(index, Request([5, 9, index + 3], max_new_tokens=50))
    while engine.busy:
        engine.step()
        finished += [index for index in engine.completions if index not in finished]
    assert finished == [0, 1, 2, 3] and engine.stats().preemptions > 0


def test_what_can_never_fit_is_refused_and_the_pool_is_the_longest_sequence() -> None:
    engine = engine_of(HOUSE, blocks=6)
    found = run(engine, [Request([9] * 24), Request([9] * 400), Request([9] * 20, max_new_tokens=50)])
    assert [(len(c.ids), c.finish) for c in found] == [(0, "context"), (0, "context"), (4, "context")]


def test_a_prompt_that_begins_alike_is_not_computed_again() -> None:
    engine = engine_of(HOUSE, blocks=100)
    stem = [int(i) for i in torch.randint(3, 97, (42,), generator=torch.Generator().manual_seed(0))]
    first = run(engine, [Request(stem, max_new_tokens=6)])[0]
    assert engine.stats().prefix_hit_tokens == 0
    assert engine.stats().blocks_cached == (42 + 5) // BLOCK
    again = run(engine, [Request(stem, max_new_tokens=6)])
    assert engine.stats().prefix_hit_tokens == 40  # whole blocks, and never the last token
    assert_same(again, [first])
    run(engine, [Request(stem[:40], max_new_tokens=1)])
    assert engine.stats().prefix_hit_tokens == 40 + 36
    talk = [*stem, *first.ids, 44, 45]
    found = run(engine, [Request(talk, max_new_tokens=6)])
    assert engine.stats().prefix_hit_tokens == 40 + 36 + 44
    assert_same(found, generate(HOUSE[0], None, [Request(talk, max_new_tokens=6)]))


def test_those_that_run_share_too() -> None:
    stem = list(range(10, 10 + 8 * BLOCK))
    requests = [Request([*stem, 50 + i], max_new_tokens=12) for i in range(4)]
    most = {}
    for blocks in (100, 20):
        engine = engine_of(HOUSE, blocks=blocks)
        for index, request in enumerate(requests):
            engine.submit(index, request)
            engine.step()
        assert engine.stats().prefix_hit_tokens == 3 * 8 * BLOCK
        most[blocks] = engine.stats().blocks_used
        while engine.busy:
            engine.step()
        assert engine.stats().preemptions == 0
        assert_same([engine.completions[i] for i in range(4)], generate(HOUSE[0], None, requests))
    # Blocks of one's own while half the pool is enough for all, else the same ones.
    assert most == {100: 4 * 9, 20: 8 + 4}


@pytest.mark.parametrize(
    ("salt", "adapter_key", "slot", "hits"),
    [
        ("a", "support@3", 0, True),
        ("a", "support@3", 1, True),  # the version counts, not where it lies
        ("b", "support@3", 0, False),
        ("a", "support@4", 0, False),
        ("a", None, 0, False),
        (("a",), "support@3", 0, False),
    ],
)
def test_salts_and_adapters_share_nothing(salt: Hashable, adapter_key: Hashable, slot: int, hits: bool) -> None:
    engine = engine_of(HOUSE, blocks=100)
    request = Request(range(3, 30), slot=0, max_new_tokens=2, salt="a", adapter_key="support@3")
    run(engine, [request])
    run(engine, [replace(request, salt=salt, adapter_key=adapter_key, slot=slot)])
    assert (engine.stats().prefix_hit_tokens > 0) == hits


def test_slots_and_the_base_share_nothing_by_default() -> None:
    decoder, bank, slots = HOUSE
    engine = engine_of(HOUSE, blocks=100)
    requests = [Request(range(3, 30), slot=slot, max_new_tokens=4) for slot in slots]
    assert_same(run(engine, requests), generate(decoder, bank, requests))
    assert engine.stats().prefix_hit_tokens == 0


def test_scores_of_a_prompt_are_computed_whatever_is_remembered() -> None:
    engine = engine_of(HOUSE, blocks=100)
    request = Request(range(3, 30), max_new_tokens=2, prompt_logprobs=True)
    assert_same(run(engine, [request]), run(engine, [request]))
    assert engine.stats().prefix_hit_tokens == 0


def test_cancelling_frees_blocks_at_once_and_keeps_what_was_said() -> None:
    engine = engine_of(HOUSE, blocks=16, rows=4, keep_prefixes=False)
    requests = [Request([5, 9, 3 + i], max_new_tokens=40) for i in range(4)]
    for index, request in enumerate(requests):
        engine.submit(index, request)
    while not engine.stats().preemptions:
        engine.step()
    before = engine.stats()
    assert (before.running, before.waiting) == (3, 1)
    engine.cancel(3)  # waits, with tokens that it has answered
    engine.cancel(0)
    after = engine.stats()
    assert (after.running, after.waiting) == (2, 0) and after.blocks_used < before.blocks_used
    while engine.busy:
        engine.step()
    assert engine.stats().blocks_used == 0
    plain = generate(HOUSE[0], None, requests)
    for index, finish in enumerate(("cancelled", "length", "length", "cancelled")):
        found = engine.completions[index]
        assert found.finish == finish and found.ids
        assert found.ids == plain[index].ids[: len(found.ids)]


def test_p15_p33_a_spoilt_sequence_leaves_nothing_in_the_blocks_that_others_take() -> None:
    decoder, bank, slots = make_house()
    bank.slots[slots[1]].parameters_P.fill_(float("nan"))
    failed: list[int] = []
    cache = KvCache(decoder.facts, places=2, tokens=48, dtype=torch.float32, device=CPU, block_tokens=BLOCK)

    def note(index: int, error: TenonError) -> None:
        assert error.code == "adapter-not-finite"
        failed.append(index)

    engine = Engine(decoder, bank, cache=cache, pass_tokens=8, on_failure=note, keep_prefixes=True)
    requests = [Request(range(3, 20 + i), slot=slots[i % 2], max_new_tokens=6) for i in range(8)]
    for index, request in enumerate(requests):
        engine.submit(index, request)
    while engine.busy:
        engine.step()
    assert failed == [1, 3, 5, 7]
    assert bool(cache.keys.isfinite().all()) and bool(cache.values.isfinite().all())
    sound = generate(decoder, None, [requests[i] for i in (0, 2, 4, 6)])
    assert_same([engine.completions[i] for i in (0, 2, 4, 6)], sound)
