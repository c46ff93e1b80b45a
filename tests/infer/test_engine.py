"""The engine as a server uses it: likeliest tokens, scores of the prompt, ending a request from outside, failures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tenon.adapters.bank import AdapterBank
from tenon.batch import NO_SLOT
from tenon.data.pack import PackOptions, bare_row, pack_rows
from tenon.errors import TenonError
from tenon.infer.engine import Engine
from tenon.infer.generate import generate
from tenon.infer.requests import OnFailure, OnToken, Request, Token
from tenon.models.cache import KvCache
from tenon.models.decoder import Decoder
from tests.tiny import CPU, random_slot, slot_shape, tiny_decoder

PROMPTS = ([5, 9, 33, 60, 8], [70, 71], [12, 3, 3, 40, 41, 42, 43, 44, 45], [88])


@pytest.fixture
def house() -> tuple[Decoder, AdapterBank, list[int]]:
    decoder = tiny_decoder()
    bank = AdapterBank(decoder.facts, dtype=torch.float32, device=CPU)
    return decoder, bank, [random_slot(bank, slot_shape(decoder.facts, rank=r), r, trained=False) for r in (2, 5)]


def engine_of(
    decoder: Decoder,
    bank: AdapterBank,
    *,
    rows: int,
    pass_tokens: int = 64,
    on_token: OnToken | None = None,
    on_failure: OnFailure | None = None,
) -> Engine:
    cache = KvCache(decoder.facts, places=rows, tokens=64, dtype=torch.float32, device=CPU)
    return Engine(decoder, bank, cache=cache, pass_tokens=pass_tokens, on_token=on_token, on_failure=on_failure)


def run(engine: Engine) -> None:
    while engine.busy:
        engine.step()


def scores_of(decoder: Decoder, bank: AdapterBank, slot: int, ids: list[int]) -> torch.Tensor:
    """Log probabilities (tokens, vocabulary) of a sequence, computed at once."""
    (batch,) = pack_rows([bare_row(slot, ids)], PackOptions(10_000), CPU)
    with torch.no_grad():
        return decoder.logits(decoder.forward(batch, bank)).log_softmax(-1)


@pytest.mark.parametrize("pass_tokens", [1, 3, 64])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_likeliest_tokens_and_scores_of_the_prompt_are_those_of_the_whole_sequence(
    house: tuple[Decoder, AdapterBank, list[int]], pass_tokens: int, temperature: float
) -> None:
    decoder, bank, slots = house
    told: dict[int, list[Token]] = {}

    def tell(index: int, token: Token) -> None:
        told.setdefault(index, []).append(token)

    engine = engine_of(decoder, bank, rows=3, pass_tokens=pass_tokens, on_token=tell)
    requests = [
        Request(p, slot=[NO_SLOT, *slots][i % 3], max_new_tokens=5, seed=i, temperature=temperature)
        for i, p in enumerate(PROMPTS)
    ]
    wishes = ((3, True), (0, False), (0, True), (2, False))
    asking = [
        replace(request, top_logprobs=top, prompt_logprobs=prompt)
        for request, (top, prompt) in zip(requests, wishes, strict=True)
    ]
    for index, request in enumerate(asking):
        engine.submit(index, request)
    run(engine)
    plain = generate(decoder, bank, requests)
    for index, request in enumerate(asking):
        found, prompt = engine.completions[index], list(request.prompt_ids)
        assert found.ids == plain[index].ids
        scores = scores_of(decoder, bank, request.slot, [*prompt, *found.ids])
        scored = [*found.prompt, *told[index]]
        first = 1 if request.prompt_logprobs else len(prompt)
        assert [token.id for token in scored] == [*prompt, *found.ids][first:]
        for position, token in enumerate(scored, start=first):
            row = scores[position - 1]
            assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
            assert [i for i, _ in token.top] == row.topk(request.top_logprobs).indices.tolist()
            if token.top and token.id == token.top[0][0]:
                assert token.logprob == token.top[0][1]


def test_a_request_is_ended_from_outside_wherever_it_is(house: tuple[Decoder, AdapterBank, list[int]]) -> None:
    decoder, bank, slots = house
    engine = engine_of(decoder, bank, rows=2, pass_tokens=4)
    requests = [Request(PROMPTS[2], slot=slots[i % 2], max_new_tokens=20) for i in range(4)]
    for index, request in enumerate(requests):
        engine.submit(index, request)
    engine.step()  # the first two have places, their prompts are not read yet
    assert (engine.running, engine.waiting) == (2, 2)
    engine.cancel(0)
    engine.cancel(3)
    engine.cancel(77)
    assert (engine.running, engine.waiting) == (1, 1)
    run(engine)
    found = [engine.completions[index] for index in range(4)]
    assert [c.finish for c in found] == ["cancelled", "length", "length", "cancelled"]
    alone = generate(decoder, bank, requests[1:3])
    assert [c.ids for c in found[1:3]] == [c.ids for c in alone]


def test_a_running_request_that_is_ended_keeps_what_it_has(house: tuple[Decoder, AdapterBank, list[int]]) -> None:
    decoder, bank, _ = house
    engine = engine_of(decoder, bank, rows=1)
    engine.submit(0, Request(PROMPTS[0], max_new_tokens=20))
    for _ in range(3):
        engine.step()
    engine.cancel(0)
    assert not engine.busy
    assert engine.completions[0].ids == generate(decoder, bank, [Request(PROMPTS[0], max_new_tokens=3)])[0].ids


def test_p15_scores_that_are_not_finite_end_their_own_request_alone(
    house: tuple[Decoder, AdapterBank, list[int]],
) -> None:
    decoder, bank, slots = house
    bank.slots[slots[0]].parameters_P.fill_(float("nan"))
    failed: dict[int, TenonError] = {}

    def note(index: int, error: TenonError) -> None:
        failed[index] = error

    engine = engine_of(decoder, bank, rows=3, on_failure=note)
    requests = [Request(p, slot=[slots[1], slots[0], NO_SLOT][i % 3], max_new_tokens=8) for i, p in enumerate(PROMPTS)]
    for index, request in enumerate(requests):
        engine.submit(index, request)
    run(engine)
    assert {index: error.code for index, error in failed.items()} == {1: "adapter-not-finite"}
    assert sorted(engine.completions) == [0, 2, 3]
    for index in (0, 2, 3):
        assert engine.completions[index].ids == generate(decoder, bank, [requests[index]])[0].ids


@pytest.mark.parametrize("pass_tokens", [1, 64])
def test_a_prompt_can_be_read_without_an_answer(
    house: tuple[Decoder, AdapterBank, list[int]], pass_tokens: int
) -> None:
    decoder, bank, slots = house
    told: list[Token] = []

    def tell(index: int, token: Token) -> None:
        told.append(token)

    engine = engine_of(decoder, bank, rows=2, pass_tokens=pass_tokens, on_token=tell)
    for index, prompt in enumerate(PROMPTS):
        engine.submit(index, Request(prompt, slot=slots[0], max_new_tokens=0, prompt_logprobs=index != 1))
    run(engine)
    for index, prompt in enumerate(PROMPTS):
        found, scores = engine.completions[index], scores_of(decoder, bank, slots[0], prompt)
        assert (found.ids, found.finish) == ((), "length")
        expected = [float(scores[i, token]) for i, token in enumerate(prompt[1:])] if index != 1 else []
        assert [token.logprob for token in found.prompt] == pytest.approx(expected, abs=1e-4)
    assert not told
