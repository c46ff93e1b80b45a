"""Prompts as vectors: what a whole pass says, however the prompt was cut and whoever shared the batch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tenon.data.pack import PackOptions, bare_row, pack_rows
from tenon.errors import TenonError
from tenon.infer.engine import Engine
from tenon.infer.generate import generate
from tenon.infer.requests import OnFailure, OnToken, Pooling, Request, Token
from tenon.models.cache import KvCache, token_bytes
from tests.infer.test_paged import BLOCK, HOUSE, House, make_house
from tests.tiny import CPU

PROMPTS = ([5, 9, 33, 60, 8], [88], [12, 3, 3, 40, 41, 42, 43, 44, 45] * 5, [70, 71] * 11)
POOLINGS: tuple[Pooling, ...] = ("last", "mean")


def engine_of(
    house: House,
    *,
    blocks: int = 200,
    rows: int = 4,
    pass_tokens: int = 64,
    tokens: int = 200,
    on_token: OnToken | None = None,
    on_failure: OnFailure | None = None,
) -> Engine:
    decoder, bank, _ = house
    budget = blocks * BLOCK * token_bytes(decoder.facts, torch.float32)
    cache = KvCache(
        decoder.facts,
        places=rows,
        tokens=tokens,
        dtype=torch.float32,
        device=CPU,
        budget_bytes=budget,
        block_tokens=BLOCK,
    )
    return Engine(
        decoder,
        bank,
        cache=cache,
        pass_tokens=pass_tokens,
        keep_prefixes=True,
        on_token=on_token,
        on_failure=on_failure,
    )


def run(engine: Engine) -> None:
    while engine.busy:
        engine.step()


def expected(house: House, request: Request) -> list[float]:
    """The vector from one pass over the whole prompt, alone."""
    decoder, bank, _ = house
    (batch,) = pack_rows([bare_row(request.slot, list(request.prompt_ids))], PackOptions(10_000), CPU)
    hidden_TD = decoder.forward(batch, bank).double()
    vector_D = hidden_TD[-1] if request.pooling == "last" else hidden_TD.mean(dim=0)
    return (vector_D / vector_D.norm()).tolist()


def requests_of(house: House) -> list[Request]:
    """Each prompt as both vectors, by three slots, beside a longer answer for each slot."""
    _, _, slots = house
    vectors = [
        Request(prompt, slot=slots[(i + j) % 3], pooling=pooling)
        for i, prompt in enumerate(PROMPTS)
        for j, pooling in enumerate(POOLINGS)
    ]
    answers = [Request(PROMPTS[i], slot=slot, max_new_tokens=30, seed=i) for i, slot in enumerate(slots)]
    return [answers[0], *vectors[:4], answers[1], *vectors[4:], answers[2]]


@pytest.mark.parametrize("pass_tokens", [1, 3, 64])
def test_vectors_are_those_of_a_whole_pass_and_answers_beside_them_stay_the_same(pass_tokens: int) -> None:
    engine = engine_of(HOUSE, pass_tokens=pass_tokens)
    requests = requests_of(HOUSE)
    for index, request in enumerate(requests):
        engine.submit(index, request)
    run(engine)
    for index, request in enumerate(requests):
        found = engine.completions[index]
        if request.pooling is None:
            assert found.ids == generate(HOUSE[0], HOUSE[1], [request])[0].ids and found.embedding == ()
            continue
        assert (found.ids, found.finish) == ((), "stop")
        assert found.embedding == pytest.approx(expected(HOUSE, request), abs=1e-5)
        assert math.fsum(x * x for x in found.embedding) == pytest.approx(1, abs=1e-12)
    assert engine.stats().blocks_used == 0


@hypothesis_settings(max_examples=25, deadline=None)
@given(
    blocks=st.integers(13, 40),
    pass_tokens=st.integers(1, 40),
    rows=st.integers(1, 5),
    order=st.permutations(range(len(requests_of(HOUSE)))),
)
def test_a_small_pool_makes_rows_wait_and_changes_no_vector(
    blocks: int, pass_tokens: int, rows: int, order: list[int]
) -> None:
    engine = engine_of(HOUSE, blocks=blocks, rows=rows, pass_tokens=pass_tokens)
    requests = requests_of(HOUSE)
    for index in order:
        engine.submit(index, requests[index])
    run(engine)
    for index, request in enumerate(requests):
        if request.pooling is not None:
            assert engine.completions[index].embedding == pytest.approx(expected(HOUSE, request), abs=1e-5)


def test_a_row_that_gives_its_place_up_half_read_adds_no_token_twice() -> None:
    """The decoding row is older and grows; the vector's row is the youngest, and loses its blocks."""
    engine = engine_of(HOUSE, blocks=14, rows=2, pass_tokens=2)
    engine.submit(0, Request(PROMPTS[0], max_new_tokens=45))
    asked = Request(PROMPTS[2][:40], slot=HOUSE[2][1], pooling="mean")
    engine.submit(1, asked)
    run(engine)
    assert engine.stats().preemptions >= 1
    assert engine.completions[1].embedding == pytest.approx(expected(HOUSE, asked), abs=1e-5)


def test_what_decodes_goes_in_every_pass_while_a_long_prompt_is_read() -> None:
    told: list[int] = []

    def tell(index: int, token: Token) -> None:
        told.append(index)

    engine = engine_of(HOUSE, pass_tokens=4, on_token=tell)
    engine.submit(0, Request(PROMPTS[0], max_new_tokens=20))
    while not told:
        engine.step()
    engine.submit(1, Request(PROMPTS[2], pooling="mean"))
    passes, before = 0, len(told)
    while 1 not in engine.completions:
        engine.step()
        passes += 1
    assert passes >= len(PROMPTS[2]) // 4 and len(told) - before == passes


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_prompt_may_fill_the_context_and_remembered_beginnings_change_nothing(pooling: Pooling) -> None:
    engine = engine_of(HOUSE, tokens=45)
    asked = Request(PROMPTS[2], pooling=pooling, slot=HOUSE[2][2])
    for index in range(2):
        engine.submit(index, asked)
        run(engine)
        assert engine.completions[index].embedding == pytest.approx(expected(HOUSE, asked), abs=1e-5)
    assert (engine.stats().prefix_hit_tokens > 0) == (pooling == "last")
    engine.submit(2, Request([*PROMPTS[2], 5], pooling=pooling))
    assert (engine.completions[2].finish, engine.completions[2].embedding) == ("context", ())


def test_a_vector_that_is_ended_from_outside_leaves_nothing() -> None:
    engine = engine_of(HOUSE, pass_tokens=4)
    engine.submit(0, Request(PROMPTS[2], pooling="mean"))
    engine.step()
    engine.cancel(0)
    assert (engine.completions[0].finish, engine.completions[0].embedding) == ("cancelled", ())
    asked = Request(PROMPTS[0], pooling="mean")
    engine.submit(0, asked)  # the same number again: nothing of the first may be left in it
    run(engine)
    assert engine.completions[0].embedding == pytest.approx(expected(HOUSE, asked), abs=1e-5)


def test_p15_vectors_that_are_not_finite_fail_their_own_request_alone() -> None:
    house = make_house()
    decoder, bank, slots = house
    bank.slots[slots[1]].parameters_P.fill_(float("nan"))
    failed: dict[int, TenonError] = {}

    def note(index: int, error: TenonError) -> None:
        failed[index] = error

    engine = engine_of(house, on_failure=note)
    requests = [Request(PROMPTS[0], slot=slot, pooling="mean") for slot in slots]
    for index, request in enumerate(requests):
        engine.submit(index, request)
    run(engine)
    assert {index: error.code for index, error in failed.items()} == {1: "adapter-not-finite"}
    for index in (0, 2):
        assert engine.completions[index].embedding == pytest.approx(expected(house, requests[index]), abs=1e-5)
    with pytest.raises(TenonError, match="not finite"):
        generate(decoder, bank, requests)
